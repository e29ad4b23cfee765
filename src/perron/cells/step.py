"""One step of a cell: all that anything else asks of a step, and affine steps v -> A v + c.

A step speaks for itself: nobody asks of what class it is. What it cannot answer it refuses.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from perron._numerics.compilers import constant
from perron._numerics.rounding import Rounding, compound, flushes_subnormals, gamma
from perron.activations import Activation
from perron.cells.refusal import Refusal
from perron.cells.sizes import Sizes

__all__ = [
    "AffineStep",
    "Linearization",
    "Map",
    "Refusal",
    "Side",
    "Step",
    "Weightless",
    "check_arithmetic",
    "check_rounding",
    "check_tensors",
    "full_float32",
    "is_known",
    "known",
    "largest",
]


_PRECISIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# By these oneDNN lets every float32 product be computed in bfloat16.
_FAST_MATH = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")


@constant
def full_float32() -> bool:
    """Whether no setting of torch or oneDNN lets float32 products on the CPU have shorter mantissas."""
    if any(os.environ.get(name, "STRICT").upper() != "STRICT" for name in _FAST_MATH):
        return False
    library: Any = torch.backends.mkldnn
    if not hasattr(library, "matmul"):
        return torch.get_float32_matmul_precision() == "highest"
    # The older functions set these, too, and raise where the newer settings disagree with them.
    settings = (library, library.matmul, library.conv)
    return all(s.fp32_precision in ("none", "ieee") for s in settings)


def check_rounding() -> None:
    """Raise Refusal where no rounding bound holds."""
    if flushes_subnormals():
        raise Refusal(
            "subnormal numbers count as zero (torch.set_flush_denormal), and no rounding bound allows for that"
        )


def check_tensors(tensors: Sequence[Tensor]) -> None:
    """Raise Refusal unless the tensors hold real floating-point numbers, in memory, and compute as usual."""
    check_arithmetic(tensors)
    for t in tensors:
        if t.device.type == "meta":
            raise Refusal("a weight of the cell is on the meta device and has no values")
        if t.layout != torch.strided:
            raise Refusal(f"a weight of the cell has the layout {t.layout}; use perron.nn.SparseLinear")
        if t.dtype not in _PRECISIONS:
            raise Refusal(f"a weight of the cell is {t.dtype}; only real floating-point numbers are verified")


def check_arithmetic(tensors: Sequence[Tensor]) -> None:
    """Raise Refusal where a tensor computes in a way of its own, as quantised ones do."""
    for t in tensors:
        if type(t) not in (Tensor, nn.Parameter):
            raise Refusal(f"a weight of the cell is a {type(t).__name__}, whose arithmetic is not known")


Side = Literal["upper", "lower"]


class Step(ABC):
    """One step of a cell, v -> s(v; b), on (batch, ...) tensors.

    * evaluation: `__call__`;
    * tensors: `tensors`, `rebind`, `gradients`; for some samples only `per_sample`, `select`;
    * what was read: `check`, `dtypes`, and that its class is `known`;
    * shapes: `track`;
    * arithmetic: `rigorous`, `rounded`;
    * the Jacobian in v: `affine` (the matrices it multiplies with) or `elementwise` (a diagonal), `normalizes` (neither);
    * its place in the cell: `injects`, `keeps_zero`, `is_affine`;
    * what solvers use: `scalar`, `supremum`, `projects`, `signature`.

    Every class of steps is declared `known`, and is one of the module that computes it, in the same file.
    """

    @abstractmethod
    def __call__(self, v: Tensor, injection: Tensor) -> Tensor:
        """s(v; b). Steps that do not inject need no injection."""

    # -------------------------------------------------------------------------------------------------------- tensors

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """All that it computes with and that may need a gradient."""

    @abstractmethod
    def rebind(self, tensors: Sequence[Tensor]) -> Step:
        """The same step with other `tensors`."""

    @abstractmethod
    def gradients(self, v: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """Gradients of <y, s(v)> for `tensors`; differentiable."""

    @property
    @abstractmethod
    def per_sample(self) -> bool:
        """Whether every sample has tensors of its own: they then have a batch dimension."""

    @abstractmethod
    def select(self, index: Tensor) -> Step:
        """The step for these samples only."""

    # --------------------------------------------------------------------------------------------------- what was read

    @abstractmethod
    def check(self) -> None:
        """Raise Refusal unless all it was read from is as proofs take it to be."""

    @property
    def dtypes(self) -> frozenset[torch.dtype]:
        """The precisions of the numbers that the cell keeps in it."""
        return frozenset(t.dtype for t in self.tensors)

    # ---------------------------------------------------------------------------------------------------------- shapes

    @abstractmethod
    def track(self, sizes: Sizes) -> None:
        """Enter into `sizes` what this step takes and gives.

        Raises:
            Refusal: it cannot take what the steps before it give.
        """

    # ------------------------------------------------------------------------------------------------------ arithmetic

    @abstractmethod
    def rigorous(self) -> Step | None:
        """The step with rigorous sums in the precision of its tensors, or None if this device offers none.

        Those are sums of products, each product once, in whatever order: only such sums obey the rounding bound of
        `perron._numerics.rounding`. Libraries may compute convolutions by transforms, which cancel.
        """

    @abstractmethod
    def rounded(self, before: Rounding, dtype: torch.dtype, entries: int) -> Rounding:
        """The rounding of s(v) for v >= 0 with the rounding `before`, of a step with rigorous sums, in `dtype`.

        Args:
            before: of v.
            dtype: what is computed in.
            entries: of a sample, at most.
        """

    # ---------------------------------------------------------------------------------------------------- the Jacobian

    @property
    @abstractmethod
    def affine(self) -> tuple[AffineStep, ...]:
        """The affine maps that it consists of; none for other steps."""

    @property
    @abstractmethod
    def elementwise(self) -> bool:
        """Whether it applies a scalar function to every entry, so that J is a diagonal; adding b does not count."""

    @property
    @abstractmethod
    def normalizes(self) -> bool:
        """Whether it divides by a norm: then J is neither a matrix nor a diagonal."""

    def derivative(self, v: Tensor) -> Tensor:
        """The diagonal of J at v, of an elementwise step; differentiable.

        Raises:
            Refusal: it is none.
        """
        raise Refusal(f"a {type(self).__name__} has no slopes")

    def bounded_derivative(self, v: Tensor, side: Side, slack: float) -> Tensor:
        """A rigorous bound on the slopes at every v' >= v (`side` "upper") or v' <= v ("lower"), for v, v' >= 0.

        Args:
            v: computed.
            slack: what rounding may amount to in v and in v', relative to v.

        Raises:
            Refusal: it is no elementwise step.
        """
        raise Refusal(f"a {type(self).__name__} has no slopes")

    def derivative_of_value(self, value: Tensor, side: Side | None) -> Tensor | None:
        """The slopes where s(v) has that value, or with `side` bounds as above; None where values do not tell."""
        return None

    # ------------------------------------------------------------------------------------------------ place in the cell

    @property
    @abstractmethod
    def injects(self) -> bool:
        """Whether it adds b, and does nothing else."""

    @property
    @abstractmethod
    def keeps_zero(self) -> bool:
        """Whether s(0) = 0, and it takes no evaluation to say so."""

    @property
    @abstractmethod
    def is_affine(self) -> bool:
        """Whether s is affine in v."""

    # ---------------------------------------------------------------------------------------------- what solvers use

    @property
    def scalar(self) -> Activation | None:
        """The function that it applies to every entry, where that is one of `perron.activations`."""
        return None

    @property
    def supremum(self) -> float:
        """At least s(v) for every v >= 0; inf where no bound is known."""
        return math.inf

    @property
    def projects(self) -> bool:
        """Whether it is known to project every entry onto an interval."""
        return False

    def signature(self) -> Hashable:
        """What tells its structure from that of other steps, whatever its tensors hold, for compiled code.

        Raises:
            Refusal: it is not compiled.
        """
        raise Refusal(f"steps of class {type(self).__name__} are not compiled")


_KNOWN: set[type[Step]] = set()
AnyStep = TypeVar("AnyStep", bound=type[Step])


def known(cls: AnyStep) -> AnyStep:
    """Declares a class of steps whose answers are right. A decorator; subclasses may compute anything, and are not known."""
    _KNOWN.add(cls)
    return cls


def is_known(step: object) -> bool:
    return type(step) in _KNOWN


class Weightless(Step):
    """A step without tensors."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return ()

    def rebind(self, tensors: Sequence[Tensor]) -> Step:
        return self

    def gradients(self, v: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return ()

    @property
    def per_sample(self) -> bool:
        return False

    def select(self, index: Tensor) -> Step:
        return self

    def track(self, sizes: Sizes) -> None:
        """What has no tensors takes every shape, and keeps it."""

    def rigorous(self) -> Step:
        return self

    @property
    def affine(self) -> tuple[AffineStep, ...]:
        return ()


@dataclass(frozen=True, kw_only=True)
class AffineStep(Step):
    """v -> A v + c on (batch, ...) tensors; A is given by `weights` (none for pooling), c by `bias`."""

    weights: tuple[Tensor, ...]
    bias: Tensor | None = None

    @property
    @abstractmethod
    def terms(self) -> int:
        """Products in the longest sum of A v, or of A^T g."""

    @abstractmethod
    def apply(self, v: Tensor, bias: Tensor | None) -> Tensor:
        """A v + bias."""

    @abstractmethod
    def transpose(self, g: Tensor, shape: torch.Size) -> Tensor:
        """A^T g, where A acts on tensors of `shape`."""

    @abstractmethod
    def sizes(self) -> dict[str, tuple[int, int]]:
        """What A takes and gives: "features" (the last dimension), "channels" (the second), "dimensions" with the batch.

        What is not named may be anything, and stays as it is but for `growth`.

        Raises:
            Refusal: the tensors of this step do not fit each other.
        """

    def growth(self) -> tuple[int, ...]:
        """What A adds to each side of an image, whatever its size.

        Raises:
            Refusal: that depends on the size.
        """
        return ()

    @abstractmethod
    def positive(self) -> bool:
        """Whether A v > 0 for every v > 0, as far as can be told."""

    @abstractmethod
    def largest_row(self) -> Tensor:
        """A scalar: the largest row sum of an A >= 0, with the rounding of at most `terms` + 8 operations."""

    def row_sums(self) -> Tensor:
        """A float64 scalar: at least the largest sum of |A_ij| over a row, of the very tensors, rounding included."""
        found = self.exact().magnitude().largest_row()
        return found * (1 + 2 * gamma(self.terms + 12, torch.float64))

    def exact(self) -> AffineStep:
        """The same step in float64, which holds every weight exactly: what bounds are computed from."""
        return self.rebind([t.detach().double() for t in self.tensors])

    def check(self) -> None:
        check_tensors(self.tensors)

    def track(self, sizes: Sizes) -> None:
        sizes.change(self.sizes(), self.growth())

    @property
    def affine(self) -> tuple[AffineStep, ...]:
        return (self,)

    @property
    def elementwise(self) -> bool:
        return False

    @property
    def normalizes(self) -> bool:
        return False

    @property
    def injects(self) -> bool:
        return False

    @property
    def keeps_zero(self) -> bool:
        return self.bias is None

    @property
    def is_affine(self) -> bool:
        return True

    def rounded(self, before: Rounding, dtype: torch.dtype, entries: int) -> Rounding:
        # What is exact has lost nothing that row sums would count.
        passed = before.absolute if before.exact else 2 * self.row_sums() * before.absolute
        return Rounding(compound(before.relative, gamma(self.terms + 2, dtype)), passed + self.underflow(dtype))

    def structure(self) -> Hashable:
        """The `signature` of a class that has no options but its tensors."""
        return type(self), tuple((tuple(t.shape), t.dtype) for t in self.tensors), self.bias is None

    def matrix(self) -> Tensor | None:
        """A (out, in) on the last dimension, where it is at hand as a matrix."""
        return None

    def kernel_of_same_shape(self) -> Tensor | None:
        """The kernel (out, in, ...), where A is a convolution that keeps the shape: odd, padded by half of it with zeros."""
        return None

    def resolvent(self, state: Tensor, *, transposed: bool = False) -> Callable[[Tensor], Tensor]:
        """r -> (2 I - A)^{-1} r, or with A^T for A, for states like this one.

        Raises:
            Refusal: no factorisation of A is known.
        """
        raise Refusal(f"the resolvent of a {type(self).__name__} is not known")

    def check_bias(self, features: int) -> None:
        """Raise Refusal where the bias would broadcast, or does not fit."""
        if self.bias is not None and self.bias.shape != (features,):
            raise Refusal(f"a bias of shape {tuple(self.bias.shape)} does not fit {features} outputs")

    def underflow(self, dtype: torch.dtype) -> Tensor | float:
        """What underflow adds at most to the error of an entry of A v + c, computed in this precision."""
        return 2 * (self.terms + 2) * torch.finfo(dtype).tiny

    def __call__(self, v: Tensor, injection: Tensor | None = None) -> Tensor:
        return self.apply(v, self.bias)

    def linear(self, v: Tensor) -> Tensor:
        """A v."""
        return self.apply(v, None)

    def magnitude(self) -> AffineStep:
        """|A| v + |c|, or more."""
        return self.rebind([t.abs() for t in self.tensors])

    @property
    def signs(self) -> tuple[Tensor, ...] | None:
        """Tensors such that A >= 0 if all of them are; None where A may have negative entries all the same."""
        return self.weights

    def margin(self) -> float:
        """A rigorous lower bound on min v^T (I - A) v / |v|^2; -inf where none is known."""
        return -math.inf

    def norm(self) -> float:
        """A bound on the Euclidean norm of A, as far as a step with a `margin` needs it."""
        return math.inf

    def over(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds of A v + c for lower <= v <= upper, rounding included: |A| acts on the radius. For float64, rigorous sums."""
        centre = (lower + upper) / 2
        # Rounded up: the box must stay inside centre +/- radius.
        radius = torch.maximum(upper - centre, centre - lower) * (1 + 1e-15)
        magnitude = self.magnitude()
        slack = 4 * gamma(self.terms + 8, lower.dtype) * magnitude(centre.abs() + radius)
        spread = magnitude.linear(radius) + slack + self.underflow(lower.dtype)
        middle = self(centre)
        return middle - spread, middle + spread

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.weights if self.bias is None else (*self.weights, self.bias)

    def rebind(self, tensors: Sequence[Tensor]) -> AffineStep:
        count = len(self.weights)
        return replace(self, weights=tuple(tensors[:count]), bias=None if self.bias is None else tensors[count])

    def gradients(self, v: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        found = torch.func.vjp(lambda *w: replace(self, weights=w).linear(v), *self.weights)[1](y)
        return (*found, *self._bias_gradient(y))

    def _bias_gradient(self, y: Tensor) -> tuple[Tensor, ...]:
        if self.bias is None:
            return ()
        return (y.sum([0, *range(2, y.dim())]),)

    def rigorous(self) -> AffineStep | None:
        # On other devices float32 products may be computed with shorter mantissas.
        dtype = self.tensors[0].dtype if self.tensors else torch.float64
        exact = dtype == torch.float64 or (
            dtype == torch.float32 and all(t.device.type == "cpu" for t in self.tensors) and full_float32()
        )
        return self if exact else None

    @property
    def per_sample(self) -> bool:
        return False

    def select(self, index: Tensor) -> AffineStep:
        return self

    def channels(self) -> tuple[AffineStep, ...]:
        """Steps on features, float64, whose product M bounds an A >= 0 on constants over space, w >= 0: A w <= M w.

        Each with at most `terms` + 2 roundings, those of its own weights included.

        Raises:
            Refusal: no such bound is known.
        """
        raise Refusal(f"the spectral radius of a {type(self).__name__} is not bounded here")


def largest(sums: Tensor) -> Tensor:
    return sums.detach().max() if sums.numel() else sums.detach().new_zeros(())


class Linearization(Protocol):
    """The Jacobian J of a cell at a point, as an operator on (batch, ...) tensors."""

    def matvec(self, w: Tensor) -> Tensor:
        """J w."""

    def rmatvec(self, g: Tensor) -> Tensor:
        """J^T g."""


class Map(Protocol):
    """f(z; b), a function of the tensors it was read with."""

    @property
    def tensors(self) -> tuple[Tensor, ...]: ...

    def rebind(self, tensors: Sequence[Tensor]) -> Map: ...

    def with_kept(self, z: Tensor, injection: Tensor) -> Map:
        """The same map, whose `tensors` are all that f needs a gradient for.

        Raises:
            ValueError: f depends on another tensor that requires a gradient, which would be lost.
        """

    def __call__(self, z: Tensor, injection: Tensor) -> Tensor: ...

    def linearize(self, z: Tensor, injection: Tensor) -> Linearization: ...
