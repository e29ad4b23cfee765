"""The default: aggregation with Anderson mixing where the cell allows it, and what serves best elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from perron.cells import Chain
from perron.solvers.accelerated import Accelerated, Origin
from perron.solvers.aggregation import Aggregation
from perron.solvers.base import FixedPointProblem, Solution
from perron.solvers.iteration import Method, solve_by_residual
from perron.solvers.mixing import Mixed, Mixing
from perron.solvers.picard import Picard

__all__ = ["Auto"]

# Steps before Picard takes over; and Picard steps on a map without structure before its rate is judged.
_STEPS, _TRIAL = 14, 6


@dataclass(frozen=True)
class Auto(Accelerated):
    """Chooses the method from the structure of the cell and the residual ratio it sees.

    Certified cells with one activation, at their end, take aggregation steps mixed after Anderson, which reach the fixed
    point in a few evaluations however hard the map is for Picard; other certified cells take `Picard`, which
    extrapolates. Maps without structure take Picard steps, and `Anderson` steps where those converge slowly.

    Args:
        tol, max_steps, stop, verify, on_failure, steps, precision: as in every solver.
        window: of the mixing.
    """

    window: int = 3

    def patience(self, evaluations: int) -> int:
        return min(evaluations, _STEPS)

    def method(self, problem: FixedPointProblem, origin: Origin | None) -> tuple[Method, Tensor]:
        if origin is None or origin.model is None:
            return Mixed(None, Mixing(max(self.window, 5))), torch.zeros_like(problem.injection)
        assert isinstance(problem.map, Chain)
        base = Chain(problem.map.steps[:-1]).at_zero(problem.injection)
        return Mixed(origin.model, Mixing(self.window)), origin.model.start(base)

    def _solve(self, problem: FixedPointProblem, z0: Tensor | None) -> Solution:
        chain = problem.map
        if self.encloses(problem) and isinstance(chain, Chain) and not Aggregation.possible(chain):
            return Picard(self.tol, self.max_steps, self.stop, self.verify, "ignore", self.steps).solve(problem, z0)
        return super()._solve(problem, z0)

    def _observe(self, problem: FixedPointProblem, z0: Tensor | None) -> Solution:
        """Picard steps first: a map on which they are fast needs nothing else."""
        trial = min(_TRIAL, self.limit)
        first = solve_by_residual(replace(self, max_steps=trial, steps=None), problem, None, z0)
        left = (~first.converged).nonzero().flatten()
        if not left.numel() or trial == self.limit:
            return first
        rest = problem.select(left)
        slow = bool(first.rate[left].median() > 0.3)
        method = self.method(rest, None)[0] if slow else None
        budget = replace(self, max_steps=self.limit - trial, steps=None)
        return first.merged(solve_by_residual(budget, rest, method, first.value[left]), left)
