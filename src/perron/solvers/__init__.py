"""Solvers: one file a method, one protocol, one result type."""

from perron.problem import FixedPointProblem
from perron.solution import AdjointSolution, Solution
from perron.solvers.accelerated import Accelerated
from perron.solvers.anderson import Anderson
from perron.solvers.auto import Auto
from perron.solvers.base import ConvergenceError, ConvergenceWarning, IterativeSolver, Solver
from perron.solvers.broyden import Broyden
from perron.solvers.compiled import Compiled
from perron.solvers.newton import Newton
from perron.solvers.operator_splitting import OperatorSplitting
from perron.solvers.picard import Picard

__all__ = [
    "Accelerated",
    "AdjointSolution",
    "Anderson",
    "Auto",
    "Broyden",
    "Compiled",
    "ConvergenceError",
    "ConvergenceWarning",
    "FixedPointProblem",
    "IterativeSolver",
    "Newton",
    "OperatorSplitting",
    "Picard",
    "Solution",
    "Solver",
]
