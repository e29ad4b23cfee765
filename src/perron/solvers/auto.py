"""The default: aggregation with Anderson mixing where the cell allows it, and what serves best elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from perron.cells import Chain
from perron.solvers.accelerated import Accelerated, Origin
from perron.solvers.aggregation import Aggregation
from perron.solvers.base import FixedPointProblem, Solution
from perron.solvers.contracting import solve_by_contraction
from perron.solvers.iteration import Method, solve_by_residual
from perron.solvers.mixing import Mixed, Mixing
from perron.solvers.picard import Picard
from perron.solvers.splitting import splitting_for

__all__ = ["Auto"]

# Steps before Picard takes over; and Picard steps on a map without structure before its rate is judged.
_STEPS, _TRIAL = 14, 6
# Multiplications of a product below which its overhead counts more; mismatch of the rank-one model beyond which Picard
# tries first; and how many steps it may take.
_SMALL, _POOR, _FEW = 10_000_000, 0.4, 30


@dataclass(frozen=True)
class Auto(Accelerated):
    """Chooses the method from the structure of the cell and the residual ratio it sees.

    Certified cells with one activation, at their end, take aggregation steps mixed after Anderson, which reach the fixed
    point in a few evaluations however hard the map is for Picard. Where the cell is small and far from rank one, and for
    other certified cells, `Picard` tries first, which extrapolates and whose steps are cheap. Maps without structure take
    Picard steps, and `Anderson` steps where those converge slowly.

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
        if self.contracts(problem):
            return solve_by_contraction(self, problem, None, z0)
        if not (self.encloses(problem) and isinstance(chain, Chain)):
            return super()._solve(problem, z0)
        picard = Picard(self.tol, self.max_steps, self.stop, self.verify, "ignore", self.steps)
        if not Aggregation.possible(chain):
            return picard.solve(problem, z0)
        if self.steps is None and self._simple_steps_pay(chain, problem.injection):
            few = min(_FEW, self.max_steps)
            found = replace(picard, max_steps=few).solve(problem, z0)
            left = (~found.converged).nonzero().flatten()
            if few < self.max_steps and left.numel():
                rest = replace(self, max_steps=self.max_steps - few)
                found = found.merged(super(Auto, rest)._solve(problem.select(left), None), left)
            return found
        return super()._solve(problem, z0)

    @staticmethod
    def _simple_steps_pay(chain: Chain, injection: Tensor) -> bool:
        """Whether a step's cost is its overhead rather than its products, and the model too poor to save many steps."""
        work = injection.numel() * sum(step.terms for step in chain.affine)
        if not 0 < work < _SMALL:
            return False
        model = Aggregation.of(chain, injection)
        return model is not None and model.mismatch(chain, injection) > _POOR

    def _observe(self, problem: FixedPointProblem, z0: Tensor | None) -> Solution:
        """Picard steps first: a map on which they are fast needs nothing else."""
        if (splitting := splitting_for(problem)) is not None:
            return solve_by_residual(self, problem, splitting, z0)
        if self.steps is not None:
            return super()._observe(problem, z0)
        trial = min(_TRIAL, self.limit)
        first = solve_by_residual(replace(self, max_steps=trial), problem, None, z0)
        left = (~first.converged).nonzero().flatten()
        if not left.numel() or trial == self.limit:
            return first
        rest = problem.select(left)
        slow = bool(first.rate[left].median() > 0.3)
        method = self.method(rest, None)[0] if slow else None
        budget = replace(self, max_steps=self.limit - trial)
        return first.merged(solve_by_residual(budget, rest, method, first.value[left]), left)
