"""Approximate gradients of a fixed point, without a linear solve."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perron.gradients.base import Call, Gradient
from perron.gradients.implicit import Implicit
from perron.problem import Cell
from perron.solution import Solution

__all__ = ["Phantom"]


@dataclass(frozen=True, kw_only=True)
class Phantom(Gradient):
    """Approximate gradients of a fixed point: those of so many damped steps z <- (1 - d) z + d f(z) from it.

    No linear equation is solved, and no bound of the error is known. One undamped step is `JacobianFree`.

    Source: Geng, Zhang, Bai, Wang, Lin, "On training implicit models", NeurIPS 2021.

    Args:
        steps: at least 1; each is kept for the backward pass.
        damping: d, in (0, 1].

    Raises:
        ValueError: an option is out of range.
    """

    steps: int = 5
    damping: float = 0.5

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.damping <= 1:
            raise ValueError(
                f"steps must be at least 1 and damping in (0, 1], got steps={self.steps}, damping={self.damping}"
            )

    def solve(self, call: Call) -> tuple[Tensor, Solution]:
        with torch.no_grad():
            value, solution = Implicit().solve(call)
        return self._attach(call.map, call.injection, value.detach()), solution

    def _attach(self, map: Cell, injection: Tensor, value: Tensor) -> Tensor:
        """The value, unchanged, with these gradients with respect to the injection and the map's tensors."""
        z = value
        for _ in range(self.steps):
            y = map(z, injection)
            z = y if self.damping == 1 else torch.lerp(z, y, self.damping)
        # The steps move the value by less than its error; what was proven is proven of the value itself.
        return value + (z - z.detach())
