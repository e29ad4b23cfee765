"""Steps that apply a nondecreasing function to every entry."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from perron._numerics.rounding import EXACT, Rounding
from perron.cells.affine_map import AffineMap
from perron.cells.jacobian import Diagonal
from perron.cells.step import Reach, Side, Step

__all__ = ["ElementwiseStep"]


class ElementwiseStep(Step):
    """v -> s(v) entry by entry, s nondecreasing: J is a diagonal of slopes, and a box goes to what its ends go to."""

    @abstractmethod
    def derivative(self, v: Tensor) -> Tensor:
        """The slopes at v; differentiable. At a kink one of those next to it."""

    @abstractmethod
    def bounded_derivative(self, v: Tensor, side: Side, slack: Rounding) -> Tensor:
        """Rigorous bounds of the slopes on the orthant, where s is concave: see `Step.factors`."""

    @abstractmethod
    def slopes(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """At least the largest and at most the smallest slope between `lower` and `upper`, float64; at a kink both of it count.

        The largest is NaN, and the smallest 0, where nothing is known.
        """

    @abstractmethod
    def own_rounding(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Of s for arguments between these, absolute, float64; not finite where it is not known."""

    @property
    def affine(self) -> tuple[AffineMap, ...]:
        return ()

    @property
    def elementwise(self) -> bool:
        return True

    @property
    def normalizes(self) -> bool:
        return False

    def factors(self, v: Tensor, side: Side | None = None, slack: Rounding = EXACT) -> tuple[Diagonal, ...]:
        return (Diagonal(self.derivative(v) if side is None else self.bounded_derivative(v, side, slack)),)

    def over(self, lower: Tensor, upper: Tensor, injection: Tensor | None = None) -> tuple[Tensor, Tensor]:
        slack = self.own_rounding(lower, upper)
        return self(lower, lower) - slack, self(upper, upper) + slack

    def reach(self, lower: Tensor, upper: Tensor, error: Tensor, injection: Tensor) -> Reach:
        """An error e of v leaves s(v) with at most the largest slope times e, and with its own; the box is widened by e."""
        steep, flat = self.slopes(lower - error, upper + error)
        passed = steep * error * (1 + 1e-12) + self.own_rounding(lower - error, upper + error)
        low, high = self.over(lower, upper)
        return Reach(lower=low, upper=high, error=passed, steep=(Diagonal(steep),), flat=(Diagonal(flat),))

    def thompson(self, apart: Tensor) -> Tensor:
        return apart * self.degree(0.0)[0]

    @property
    def injects(self) -> bool:
        return False

    @property
    def keeps_zero(self) -> bool:
        # Not without an evaluation.
        return False
