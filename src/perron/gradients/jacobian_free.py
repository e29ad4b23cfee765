"""The gradient of one evaluation at the fixed point."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from perron.gradients.base import Call, Gradient
from perron.gradients.phantom import Phantom
from perron.solution import Solution

__all__ = ["JacobianFree"]


@dataclass(frozen=True)
class JacobianFree(Gradient):
    """The gradient of one evaluation of f at the fixed point, as if it were given: no linear equation, and no bound.

    Source: Fung, Heaton, Li, McKenzie, Osher, Yin, "JFB: Jacobian-free backpropagation for implicit networks", AAAI 2022.
    """

    def solve(self, call: Call) -> tuple[Tensor, Solution]:
        return Phantom(steps=1, damping=1.0).solve(call)
