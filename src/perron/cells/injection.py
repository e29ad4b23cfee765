"""Where a cell adds its injection."""

from __future__ import annotations

from collections.abc import Hashable
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from perron._numerics.rounding import EXACT, Rounding, compound, gamma
from perron.cells import reading
from perron.cells.jacobian import Factor
from perron.cells.refusal import Refusal
from perron.cells.sizes import Sizes
from perron.cells.step import Reach, Side, Weightless, known

__all__ = ["INJECTION", "Inject", "InjectStep"]


_U = 2.0**-53
# The injection of the cell that is being evaluated.
INJECTION: ContextVar[Tensor | None] = ContextVar("injection", default=None)


class Inject(nn.Module):
    """Marks where a cell adds its injection: inside `nn.Sequential(Linear, Inject(), Activation)`, v -> v + b."""

    def forward(self, v: Tensor) -> Tensor:
        injection = INJECTION.get()
        if injection is None:
            raise RuntimeError("Inject() only has a meaning inside the cell of an equilibrium layer")
        return v + injection


@known
@dataclass(frozen=True, kw_only=True)
class InjectStep(Weightless):
    """v -> v + b."""

    def __call__(self, v: Tensor, injection: Tensor) -> Tensor:
        if v.shape != injection.shape:
            # Broadcasting would make a map whose Jacobian is not the one of these steps.
            raise ValueError(
                f"the injection has shape {tuple(injection.shape)}, but where the cell adds it the state has {tuple(v.shape)}"
            )
        return v + injection

    def check(self) -> None:
        """Nothing was read but that it is there."""

    def track(self, sizes: Sizes) -> None:
        sizes.require_state("injection", "adds it")

    def rounded(self, before: Rounding, dtype: torch.dtype, entries: int) -> Rounding:
        return Rounding(compound(before.relative, gamma(1, dtype)), 2 * before.absolute + torch.finfo(dtype).tiny)

    @property
    def elementwise(self) -> bool:
        return False

    def factors(self, v: Tensor, side: Side | None = None, slack: Rounding = EXACT) -> tuple[Factor, ...]:
        """None: J is the identity."""
        return ()

    def over(self, lower: Tensor, upper: Tensor, injection: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self(lower, injection), self(upper, injection)
        return low - 2 * _U * low.abs(), high + 2 * _U * high.abs()

    def reach(self, lower: Tensor, upper: Tensor, error: Tensor, injection: Tensor) -> Reach:
        low, high = self.over(lower, upper, injection)
        error = error + 2 * _U * torch.maximum(low.abs(), high.abs())
        return Reach(lower=low, upper=high, error=error, steep=(), flat=())

    @property
    def largest_slope(self) -> float:
        return 1.0

    def check_concave(self) -> None:
        """v + b is, for b >= 0."""

    def positive(self, before: bool, injected: bool) -> bool:
        return before or injected

    @property
    def least(self) -> float:
        return 0.0

    @property
    def asymptotic_slope(self) -> float:
        return 1.0

    def degree(self, least: float) -> tuple[float, float]:
        """v <= v + b for b >= 0: degree 1."""
        return 1.0, least

    def thompson(self, apart: Tensor) -> Tensor:
        raise Refusal("what another injection does to distances is not known")

    @property
    def normalizes(self) -> bool:
        return False

    @property
    def injects(self) -> bool:
        return True

    @property
    def keeps_zero(self) -> bool:
        return False

    @property
    def is_affine(self) -> bool:
        return True

    def signature(self) -> Hashable:
        return type(self)


@reading.reads(Inject)
def inject_step(module: Inject, path: str) -> InjectStep:
    return InjectStep()
