"""Steps that apply a scalar function to every entry."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from perron.cells.step import AffineStep, Side, Step

__all__ = ["ElementwiseStep"]


class ElementwiseStep(Step):
    """v -> s(v) entry by entry, s nondecreasing: J is a diagonal of slopes."""

    @abstractmethod
    def derivative(self, v: Tensor) -> Tensor:
        """The slopes at v; differentiable. At a kink one of those next to it."""

    @abstractmethod
    def bounded_derivative(self, v: Tensor, side: Side, slack: float) -> Tensor:
        """See `Step.bounded_derivative`; at a kink the upper bound is the larger of both slopes, and the lower the smaller."""

    @property
    def affine(self) -> tuple[AffineStep, ...]:
        return ()

    @property
    def elementwise(self) -> bool:
        return True

    @property
    def normalizes(self) -> bool:
        return False

    @property
    def injects(self) -> bool:
        return False

    @property
    def keeps_zero(self) -> bool:
        # Not without an evaluation.
        return False
