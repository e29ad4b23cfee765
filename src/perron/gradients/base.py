"""What every way to differentiate a fixed point has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from perron.problem import Cell, FixedPointProblem
from perron.solution import AdjointSolution, Solution
from perron.solvers.base import Solver

__all__ = ["Call", "Gradient", "Pose"]

Pose = Callable[[Cell, Tensor], FixedPointProblem]


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a layer.

    Attributes:
        map: the cell; its tensors receive gradients where they require them.
        injection: (batch, ...) b, likewise.
        solver: solves the fixed point.
        pose: the problem, with what is known of the map and the injection; called with tensors without gradient, also where
            torch.func transforms the ones given here.
        z0: a first guess.
        on_adjoint: called in each backward pass that solves a linear equation, with how it was solved.
    """

    map: Cell
    injection: Tensor
    solver: Solver
    pose: Pose
    z0: Tensor | None = None
    on_adjoint: Callable[[AdjointSolution], None] | None = None


class Gradient(ABC):
    """A strategy that is handed to a layer: it solves, and attaches its derivatives to the value."""

    @abstractmethod
    def solve(self, call: Call) -> tuple[Tensor, Solution]:
        """The fixed point with derivatives, and the detached Solution."""
