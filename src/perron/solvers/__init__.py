"""Solvers: one file a method, one protocol, one result type."""

from perron.solvers.auto import Auto
from perron.solvers.base import (
    AdjointSolution,
    ConvergenceError,
    ConvergenceWarning,
    FixedPointProblem,
    Solution,
    Solver,
)
from perron.solvers.picard import Picard

__all__ = [
    "AdjointSolution",
    "Auto",
    "ConvergenceError",
    "ConvergenceWarning",
    "FixedPointProblem",
    "Picard",
    "Solution",
    "Solver",
]
