"""Affine steps of a cell, v -> A v + c: each with its transpose, its gradient and what the proofs need of it.

`rigorous()` gives the step in a form whose sums are rigorous sums of products, each product once, in whatever order: only
such sums obey the rounding bound of `perron._numerics.rounding`. Libraries may compute convolutions by transforms, which cancel.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from perron._numerics.compilers import constant
from perron._numerics.rounding import flushes_subnormals, gamma

__all__ = ["AffineStep", "Linearization", "Map", "Refusal", "Side", "check_rounding", "full_float32", "largest"]


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


class Refusal(ValueError):
    """Why a cell's structure, or a proof about it, could not be verified."""


def check_rounding() -> None:
    """Raise Refusal where no rounding bound holds."""
    if flushes_subnormals():
        raise Refusal(
            "subnormal numbers count as zero (torch.set_flush_denormal), and no rounding bound allows for that"
        )


@dataclass(frozen=True)
class AffineStep(ABC):
    """v -> A v + c on (batch, ...) tensors; A is given by `weights` (none for pooling), c by `bias`."""

    weights: tuple[Tensor, ...]
    bias: Tensor | None

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

    def check_tensors(self) -> None:
        """Raise Refusal unless the tensors hold real floating-point numbers in one precision, in memory."""
        self.check_arithmetic()
        for t in self.tensors:
            if t.device.type == "meta":
                raise Refusal("a weight of the cell is on the meta device and has no values")
            if t.layout != torch.strided:
                raise Refusal(f"a weight of the cell has the layout {t.layout}; use perron.nn.SparseLinear")
            if t.dtype not in _PRECISIONS:
                raise Refusal(f"a weight of the cell is {t.dtype}; only real floating-point numbers are verified")

    def check_arithmetic(self) -> None:
        """Raise Refusal where a tensor computes in a way of its own, as quantised ones do."""
        for t in self.tensors:
            if type(t) not in (Tensor, nn.Parameter):
                raise Refusal(f"a weight of the cell is a {type(t).__name__}, whose arithmetic is not known")

    def check_bias(self, features: int) -> None:
        """Raise Refusal where the bias would broadcast, or does not fit."""
        if self.bias is not None and self.bias.shape != (features,):
            raise Refusal(f"a bias of shape {tuple(self.bias.shape)} does not fit {features} outputs")

    def underflow(self, dtype: torch.dtype) -> Tensor | float:
        """What underflow adds at most to the error of an entry of A v + c, computed in this precision."""
        return 2 * (self.terms + 2) * torch.finfo(dtype).tiny

    def __call__(self, v: Tensor) -> Tensor:
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
        """The same step with other `tensors`."""
        count = len(self.weights)
        return replace(self, weights=tuple(tensors[:count]), bias=None if self.bias is None else tensors[count])

    def gradients(self, v: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """Gradients of <y, A v + c> for `tensors`; differentiable."""
        found = torch.func.vjp(lambda *w: replace(self, weights=w).linear(v), *self.weights)[1](y)
        return (*found, *self._bias_gradient(y))

    def _bias_gradient(self, y: Tensor) -> tuple[Tensor, ...]:
        if self.bias is None:
            return ()
        return (y.sum([0, *range(2, y.dim())]),)

    def rigorous(self) -> AffineStep | None:
        """A step with rigorous sums in the precision of its tensors, or None if this device offers none."""
        # On other devices float32 products may be computed with shorter mantissas.
        dtype = self.tensors[0].dtype if self.tensors else torch.float64
        exact = dtype == torch.float64 or (
            dtype == torch.float32 and all(t.device.type == "cpu" for t in self.tensors) and full_float32()
        )
        return self if exact else None

    @property
    def per_sample(self) -> bool:
        """Whether every sample has an A of its own: then `weights` have a batch dimension."""
        return False

    def select(self, index: Tensor) -> AffineStep:
        """The step for these samples only."""
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


Side = Literal["upper", "lower"]


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
