"""Solving and proving where F contracts: steps in the layer's precision, then F once in float64 at what they found.

The contraction factor is known before the first step, so the residual that the tolerance asks for is, too. Samples on
which F is not known to contract are solved all the same; they stop by residual, and nothing is claimed of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from perron._numerics.batch import all_finite, amax, amin, per_sample
from perron._numerics.rounding import unit_roundoff
from perron.cells.chain import Chain
from perron.problem import FixedPointProblem
from perron.solution import Solution
from perron.solvers.base import IterativeSolver
from perron.solvers.iteration import Found, Method, PicardSteps, Rule, iterate
from perron.solvers.splitting import Splitting
from perron.theory.contraction import Contraction, contraction, gain
from perron.theory.enclosure import relative_error_bound, round_outward
from perron.theory.monotone_operator import Monotonicity, monotonicity

__all__ = ["solve_by_contraction"]

# Searches in float64 for samples that are not within the tolerance yet.
_SEARCHES = 3
# Residuals below so many units of roundoff are not asked of steps in the layer's precision.
_ROUNDING = 64


def solve_by_contraction(
    solver: IterativeSolver, problem: FixedPointProblem, method: Method | None, z0: Tensor | None
) -> Solution:
    """Iterate from z0, or zero, until the enclosure that the contraction factor or the margin gives is within the tolerance.

    Without a method it takes the one that is known to converge: Picard's steps, or operator splitting.
    """
    return _Contracting(solver, problem).run(method, z0)


@dataclass
class _Proven:
    """What is known of each sample, float64: bounds, the largest |F(z) - z| / |F(z)|, and whether the bounds are proven."""

    lower: Tensor
    upper: Tensor
    residual: Tensor
    proven: Tensor


class _Contracting:
    def __init__(self, solver: IterativeSolver, problem: FixedPointProblem) -> None:
        assert isinstance(problem.map, Chain)
        self.solver, self.problem = solver, problem
        exact = problem.to(torch.float64)
        assert isinstance(exact.map, Chain)
        rigorous = exact.map.rigorous()
        assert rigorous is not None
        self.exact = replace(exact, map=rigorous)
        monotone = monotonicity(rigorous, exact.injection) if gain(rigorous) >= 1 else None
        self.known: Contraction | Monotonicity = (
            contraction(rigorous, exact.injection) if monotone is None else monotone
        )
        self.steps = torch.zeros(len(problem.injection), dtype=torch.long, device=problem.injection.device)

    def _sure(self, problem: FixedPointProblem) -> Method:
        """A method that converges if anything is known of the map."""
        return Splitting(problem) if isinstance(self.known, Monotonicity) else PicardSteps()

    def run(self, method: Method | None, z0: Tensor | None) -> Solution:
        b, solver = self.problem.injection, self.solver
        if not b.numel():
            empty = b.double()
            none = empty.new_zeros(len(b))
            return self._solution(empty, _Proven(empty, empty, none, none == 0), none)
        fixed = solver.steps is not None
        start = torch.zeros_like(b) if z0 is None else z0
        factor = self.known.factor
        # The error is at most factor/(1 - factor) times the residual; half of the tolerance is left to its rounding.
        goal = 0.4 * solver.tol * torch.where(factor < 1, (1 - factor) / factor.clamp_min(0.1), 1.0)
        sure = self._sure(self.problem)
        # On a monotone cell only splitting is sure to converge; another method gets half of the steps.
        share = 2 if isinstance(self.known, Monotonicity) and method is not None and not fixed else 1
        # What rounding keeps these steps from is left to those in float64.
        coarse = goal.clamp_min(_ROUNDING * unit_roundoff(b.dtype)).to(b.dtype)
        rule = Rule(
            tol=coarse, slack=None, ahead=True, limit=max((solver.limit - 1) // share, 1), fixed=fixed, patient=True
        )
        found = self._search(self.problem, sure if method is None else method, start, rule)
        best = self._prove(found.candidate.double(), None)
        for _ in range(0 if fixed else _SEARCHES):
            left = (~self._accepted(best) & all_finite(b)).nonzero().flatten()
            room = solver.limit - 1 - int(self.steps[left].max()) if left.numel() else 0
            if room < 1:
                break
            again = self._search_again(left, best, found.value, goal, room)
            found.rate.index_copy_(0, left, again.rate.to(found.rate.dtype))
        return self._solution(self._middle(best), best, found.rate)

    def _search_again(self, left: Tensor, best: _Proven, value: Tensor, goal: Tensor, room: int) -> Found:
        """The samples of `left`, from where they are, in float64, to the residual that their bound asks for."""
        rest = self.exact.select(left)
        middle, lower = self._middle(best)[left], best.lower[left]
        start = torch.where(per_sample(all_finite(middle), middle), middle, value.double()[left])
        # A point that is no better than zero is not where to go on from.
        start = torch.where(per_sample(best.residual[left] < 0.5, start), start, 0.0)
        scale = torch.maximum(amax(start.abs()), amax(rest.injection.abs())).clamp_min(1e-30)
        size = torch.where((lower > 0) & (start > 0), lower, per_sample(scale, start))
        # The error is in proportion to the residual.
        bound = self._bound(self._middle(best), best)[left]
        asked = torch.where(best.proven[left], 0.5 * self.solver.tol / bound * best.residual[left], 0.5 * goal[left])
        before, self.steps = self.steps, torch.zeros_like(self.steps[left])
        rule = Rule(
            tol=torch.minimum(asked.clamp_min(1e-15), goal[left]), slack=size, ahead=True, limit=room, patient=True
        )
        again = self._search(rest, self._sure(rest), start, rule)
        new = self._prove(again.candidate, left)
        self.steps = before.index_add(0, left, self.steps)
        for name, value in vars(new).items():
            setattr(best, name, getattr(best, name).index_copy(0, left, value))
        return again

    def _search(self, problem: FixedPointProblem, method: Method, start: Tensor, rule: Rule) -> Found:
        found = iterate(problem, method, start, rule)
        self.steps = self.steps + found.steps
        return found

    def _prove(self, z: Tensor, index: Tensor | None) -> _Proven:
        """Evaluate F at z, moved into the box, and enclose."""
        known = self.known if index is None else self.known.select(index)
        exact = self.exact if index is None else self.exact.select(index)
        z = torch.minimum(torch.maximum(z, known.lower), known.upper)
        fz = exact(z)
        self.steps = self.steps + 1
        lower, upper, proven = known.enclose(z, fz)
        mask = per_sample(proven, fz)
        size = torch.maximum(amax(fz.abs()), amax(exact.injection.abs())).clamp_min(1e-300)
        # Where nothing is proven, the point itself stands in for its bounds, until the end.
        return _Proven(torch.where(mask, lower, fz), torch.where(mask, upper, fz), amax((fz - z).abs()) / size, proven)

    def _middle(self, best: _Proven) -> Tensor:
        return (best.lower + best.upper) / 2

    def _accepted(self, best: _Proven) -> Tensor:
        """Within the tolerance by the bounds, or by the residual where there are none."""
        bound = self._bound(self._middle(best).to(self.problem.injection.dtype), best)
        return torch.where(best.proven, bound, best.residual) <= self.solver.tol

    def _bound(self, value: Tensor, best: _Proven) -> Tensor:
        """(batch,) bound on the error of `value`; relative to each entry where all are proven positive, else to the largest of
        the fixed point and the injection.
        """
        entrywise = relative_error_bound(value, best.lower, best.upper)
        gap = amax(torch.maximum(best.upper - value.double(), value.double() - best.lower))
        size = torch.maximum(amax(torch.maximum(best.lower, -best.upper)), amax(self.exact.injection.abs()))
        # Where nothing bounds the size from below, neither is the error bounded; NaN compares false.
        largest = torch.where(gap > 0, gap / size.clamp_min(0), gap) * (1 + 8 * unit_roundoff(gap.dtype))
        bound = torch.where(amin(best.lower) > 0, entrywise, largest)
        return torch.where(best.proven & (bound >= 0), bound, math.inf)

    def _solution(self, middle: Tensor, best: _Proven, rate: Tensor) -> Solution:
        b = self.problem.injection
        finite = all_finite(b)
        best.proven = best.proven & finite
        value = torch.where(per_sample(finite, middle), middle, torch.nan).to(b.dtype)
        bound = self._bound(value, best)
        mask = per_sample(best.proven, middle)
        whole = torch.full_like(middle, math.inf)
        bounds = torch.where(mask, best.lower, -whole), torch.where(mask, best.upper, whole)
        lower, upper = round_outward(*bounds, b.dtype, signed=True)
        any_proven = bool(best.proven.any()) or not len(b)
        return Solution(
            value=value,
            lower=lower if any_proven else None,
            upper=upper if any_proven else None,
            steps=self.steps,
            residual=best.residual,
            error_bound=bound,
            rate=rate.to(torch.float64),
            converged=self._accepted(best) & finite,
            proven=best.proven,
            proof_dtype=torch.float64 if any_proven else None,
            stopping="enclosure" if any_proven else "residual",
        )
