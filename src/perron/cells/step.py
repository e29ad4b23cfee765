"""One step of a cell: all that anything else asks of it.

A step speaks for itself: nobody asks of what class it is. What it cannot answer it refuses.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from perron._numerics.compilers import constant
from perron._numerics.rounding import EXACT, Rounding, flushes_subnormals
from perron.activations import Activation
from perron.cells.affine_map import AffineMap
from perron.cells.jacobian import Factor
from perron.cells.refusal import Refusal
from perron.cells.sizes import Sizes

__all__ = [
    "Reach",
    "Side",
    "Step",
    "Weightless",
    "check_arithmetic",
    "check_rounding",
    "check_tensors",
    "full_float32",
    "is_known",
    "known",
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


@dataclass(frozen=True, kw_only=True)
class Reach:
    """What a step makes of a box, entrywise, float64.

    Attributes:
        lower, upper: bounds of s.
        error: of the rounding of s on the box, absolute.
        steep, flat: factors with the largest and the smallest slopes in the box, and with |A|: they bound |J|.
    """

    lower: Tensor
    upper: Tensor
    error: Tensor
    steep: tuple[Factor, ...]
    flat: tuple[Factor, ...]


class Step(ABC):
    """One step of a cell, v -> s(v; b), on (batch, ...) tensors.

    * evaluation: `__call__`;
    * tensors: `tensors`, `rebind`, `gradients`; for some samples only `per_sample`, `select`;
    * what was read: `check`, `dtypes`, and that its class is `known`;
    * shapes: `track`;
    * arithmetic: `rigorous`, `rounded`;
    * the Jacobian in v: `factors`, `affine` (matrices), `elementwise` (a diagonal), `normalizes` (neither), `slope_of_value`;
    * boxes, of any sign: `over`, `reach`, `range`, `largest_slope`, `nonexpansive`, `rounding_of_value`;
    * the orthant: `check_concave`, `positive`, `least`, `supremum`, `asymptotic_slope`, `degree`, `thompson`;
    * its place in the cell: `name`, `injects`, `keeps_zero`, `is_affine`;
    * what solvers use: `scalar`, `projects`, `signature`.

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
    def affine(self) -> tuple[AffineMap, ...]:
        """The affine maps that it consists of; none for other steps."""

    @property
    @abstractmethod
    def elementwise(self) -> bool:
        """Whether it applies a nondecreasing function to every entry, so that J is a diagonal; adding b does not count."""

    @property
    @abstractmethod
    def normalizes(self) -> bool:
        """Whether it divides by a norm: then J is neither a matrix nor a diagonal."""

    @abstractmethod
    def factors(self, v: Tensor, side: Side | None = None, slack: Rounding = EXACT) -> tuple[Factor, ...]:
        """J at v, the first factor first; none where that is the identity. Differentiable.

        Args:
            v: the argument.
            side: for a step that `check_concave` lets pass, at v >= 0: "upper" or "lower" for rigorous bounds of J at every
                v' >= v or v' <= v, v' >= 0.
            slack: with `side`, what rounding may amount to in v and v' together.

        Raises:
            Refusal: J has no factors.
        """

    def slope_of_value(self, value: Tensor, side: Side | None) -> Tensor | None:
        """The diagonal of J where s(v) has that value, v >= 0, or with `side` bounds as above; None where values do not tell."""
        return None

    # --------------------------------------------------------------------------------------------- boxes, of any sign

    @abstractmethod
    def over(self, lower: Tensor, upper: Tensor, injection: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds of s(v) for lower <= v <= upper, its own rounding included; NaN or infinite where nothing is known. Float64.

        Raises:
            Refusal: no box is known.
        """

    def propagate(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """`over` outside of a cell, where nothing may be known of an entry: its ends are NaN then, or infinite."""
        return self.over(lower, upper, lower)

    @abstractmethod
    def reach(self, lower: Tensor, upper: Tensor, error: Tensor, injection: Tensor) -> Reach:
        """What is known of s and of J on a box, float64.

        Args:
            lower, upper: the box.
            error: bound on the rounding of v, absolute and entrywise.
            injection: b.

        Raises:
            Refusal: nothing is.
        """

    def range(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """A box that holds s(v) whatever v is, shaped like `like` and in its precision; None where none is known."""
        return None

    @property
    @abstractmethod
    def largest_slope(self) -> float:
        """Beside `affine`: at least |s(x) - s(y)| / |x - y| for any two numbers; inf or NaN where there is no bound."""

    @property
    def nonexpansive(self) -> bool:
        """Whether it is known to be elementwise, nondecreasing, with slopes up to 1 on the whole line."""
        return False

    def rounding_of_value(self, value: Tensor) -> Tensor:
        """Of s itself where it computed this value, absolute, entrywise, float64; for steps that are `nonexpansive`.

        Raises:
            Refusal: it is not known.
        """
        raise Refusal(f"the rounding of a {type(self).__name__} is not known by its value")

    # ---------------------------------------------------------------------------------------------------- the orthant

    @abstractmethod
    def check_concave(self) -> None:
        """Raise Refusal unless it maps the orthant into itself, nondecreasing and concave, for b >= 0."""

    @abstractmethod
    def positive(self, before: bool, injected: bool) -> bool:
        """Whether s(v; b) > 0 for all v >= 0 (`before`: v > 0) and b >= 0 (`injected`: b > 0), after `check_concave`."""

    @property
    @abstractmethod
    def least(self) -> float:
        """At most s(v) for every v >= 0, if it maps the orthant into itself."""

    @property
    def supremum(self) -> float:
        """At least s(v) for every v >= 0; inf where no bound is known."""
        return math.inf

    @property
    @abstractmethod
    def asymptotic_slope(self) -> float:
        """lim s(t)/t, at least, beside `affine`: the largest over all entries."""

    @abstractmethod
    def degree(self, least: float) -> tuple[float, float]:
        """mu with |J(v)| v <= mu s(v) for all v >= `least`, v > 0, and b >= 0; and a lower bound of s there.

        Raises:
            Refusal: none is known, or s does not map the orthant into itself.
        """

    @abstractmethod
    def thompson(self, apart: Tensor) -> Tensor:
        """(batch,) at least Thompson's distance of s(x) from s(y), from that of x from y; where it has a `degree`.

        Raises:
            Refusal: it is not known.
        """

    # ------------------------------------------------------------------------------------------------ place in the cell

    @property
    def name(self) -> str:
        """For people."""
        return type(self).__name__

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
    def affine(self) -> tuple[AffineMap, ...]:
        return ()
