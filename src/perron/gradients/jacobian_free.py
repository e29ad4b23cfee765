"""The gradient of one evaluation at the fixed point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from perron.gradients.base import Gradient, Pose
from perron.gradients.phantom import Phantom
from perron.problem import Cell
from perron.solution import AdjointSolution, Solution
from perron.solvers.base import Solver

__all__ = ["JacobianFree"]


@dataclass(frozen=True)
class JacobianFree(Gradient):
    """The gradient of one evaluation of f at the fixed point, as if it were given: no linear equation, and no bound.

    Source: Fung, Heaton, Li, McKenzie, Osher, Yin, "JFB: Jacobian-free backpropagation for implicit networks", AAAI 2022.
    """

    def solve(
        self,
        map: Cell,
        injection: Tensor,
        solver: Solver,
        *,
        pose: Pose,
        z0: Tensor | None = None,
        on_adjoint: Callable[[AdjointSolution], None] | None = None,
    ) -> tuple[Tensor, Solution]:
        return Phantom(steps=1, damping=1.0).solve(map, injection, solver, pose=pose, z0=z0)
