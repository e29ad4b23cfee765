"""Picard iteration, stopped and extrapolated rigorously for positive concave cells.

From z = 0 the iterates rise to z*. Two increments in a row, d = z - p with z = f(p) and e = f(z) - z, bound the rest:

    r = max_i e_i / d_i < 1   implies   z* <= q = p + d/(1 - r).

Where the ratios e_i / d_i agree with each other, q is almost z* itself, long before z is. So the iteration stops as soon
as their spread promises the tolerance, and `perron.theory.enclosure.prove` proves it from the pair (z, q) by one evaluation
more: the chord between them gives the lower bound. If the promise was not kept, the iteration goes on where it was.
The ratios are differences of differences, so this runs in float64 unless no proof is wanted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from perron._numerics.batch import all_finite, amax, per_sample
from perron._numerics.rounding import unit_roundoff
from perron.cells.chain import Chain
from perron.problem import FixedPointProblem
from perron.solution import Solution
from perron.solvers.base import IterativeSolver
from perron.solvers.proving import Proving
from perron.solvers.residual import solve_by_residual
from perron.solvers.splitting import Splitting
from perron.theory.enclosure import (
    Enclosure,
    Evaluated,
    chord,
    observe,
    prove,
    prove_around,
    relative_error_bound,
    round_outward,
)

__all__ = ["Picard"]

# Evaluations of the smallest enclosure, of one that begins at a guess, and of a proof around a point.
_SMALLEST, _WITH_GUESS, _AROUND = 3, 5, 6


@dataclass(frozen=True, kw_only=True)
class Picard(IterativeSolver):
    """Picard iteration z <- f(z), from z = 0 or from a multiple of z0 that is proven to lie below the fixed point.

    Cells of kind "monotone operator", on which it may diverge, take Peaceman and Rachford's steps instead.

    Args:
        tol, max_steps, stop, proof_dtype, on_failure, steps: as in every solver. The iteration itself runs in the precision
            of the proof.
    """

    def _solve(self, problem: FixedPointProblem, z0: Tensor | None) -> Solution:
        theory = problem.theory
        if theory is None or not self.encloses(problem):
            splits = theory is not None and theory.splits and self.stop == "auto" and problem.injection.numel() > 0
            return solve_by_residual(self, problem, Splitting(problem) if splits else None, z0)
        return _Enclosing(self, problem).run(z0) if theory.rises else Proving(self, problem, z0).run()


class _Enclosing:
    """One enclosing solve: full-size results, filled in as samples finish."""

    def __init__(self, solver: Picard, problem: FixedPointProblem) -> None:
        assert isinstance(problem.map, Chain)
        b = problem.injection
        self.solver = solver
        self.working = b.dtype
        self.proving = solver.proof_dtype is not None
        self.problem = solver.exact_problem(problem)
        self.dtype = self.problem.injection.dtype
        self.map = self.problem.map
        assert isinstance(self.map, Chain)
        self.rounding = self.map.rounding(self.dtype)
        batch = len(b)
        self.lower = torch.zeros_like(self.problem.injection)
        self.upper = torch.full_like(self.lower, math.inf)
        self.steps = torch.zeros(batch, dtype=torch.long, device=b.device)
        self.residual = self.lower.new_full((batch,), math.inf)
        self.rate = self.lower.new_zeros(batch)
        self.proven = torch.zeros(batch, dtype=torch.bool, device=b.device)
        # The last iterate, which stands where nothing is proven.
        self.point = self.lower.clone()

    def run(self, z0: Tensor | None) -> Solution:
        finite = all_finite(self.problem.injection)
        if self.solver.steps is not None:
            self._take(self.solver.steps, z0)
        elif (index := finite.nonzero().flatten()).numel():
            self._solve(index, z0)
        middle = torch.where(self.upper.isinf(), self.point, (self.lower + self.upper) / 2).to(self.working)
        value = torch.where(per_sample(finite, middle), middle, torch.nan)
        bound = torch.where(self.proven, relative_error_bound(value, self.lower, self.upper), math.inf)
        lower, upper = round_outward(self.lower, self.upper, self.working)
        return Solution(
            value=value,
            lower=lower,
            upper=upper,
            steps=self.steps,
            residual=torch.where(finite, self.residual, torch.nan),
            error_bound=bound,
            rate=self.rate,
            converged=(bound <= self.solver.tol) & finite,
            proven=self.proven & self.proving,
            proof_dtype=self.dtype if self.proving else None,
            stopping="enclosure",
        )

    def _solve(self, index: Tensor, z0: Tensor | None) -> None:
        """The samples of `index`: by a proof around the guess where it is a good one, else by iterating."""
        if z0 is None or self.solver.max_steps < _WITH_GUESS:
            self._iterate(index, None)
            return
        z0 = torch.where(z0.isfinite(), z0, 0.0).to(self.dtype).clamp_min(0)
        left = self._prove_guess(index, z0) if self.proving else index
        if left.numel():
            self._iterate(left, z0 if self.solver.max_steps - int(self.steps.max()) >= _WITH_GUESS else None)

    def _prove_guess(self, index: Tensor, z0: Tensor) -> Tensor:
        """Prove around the guess where f moves no entry by more than the tolerance; returns the samples that are left."""
        problem, z = self.problem.select(index), z0[index]
        fz = _checked(problem, z)
        self.steps[index] += 1
        moved = amax((fz - z).abs() / fz.clamp_min(torch.finfo(fz.dtype).tiny))
        near = (moved <= self.solver.tol).nonzero().flatten()
        room = self.solver.max_steps - 1 - _SMALLEST
        if not near.numel() or room < _AROUND:
            return index
        where = index[near]
        found = self._prove_around(problem.select(near), z[near], room)
        self.steps[where] += found.evaluations
        self._keep(found, where)
        done = torch.zeros_like(moved, dtype=torch.bool).index_copy(0, near, self._accepted(found))
        return index[~done]

    def _prove_around(self, problem: FixedPointProblem, z: Tensor, room: int) -> Enclosure:
        """`prove_around` in at most `room` evaluations."""
        assert isinstance(problem.map, Chain)
        attempts = min(4, (room - 2) // 3)
        return prove_around(problem.map, problem.injection, z, attempts=attempts, neumann_steps=room - 2 - 3 * attempts)

    def _start(self, problem: FixedPointProblem, z0: Tensor | None) -> tuple[Tensor, Tensor, Tensor, int]:
        """f(0), a point below the fixed point, f there, and the evaluations so far."""
        zero = torch.zeros_like(problem.injection)
        at_zero = _checked(problem, zero)
        if z0 is None:
            return at_zero, zero, at_zero, 1
        # The chord from 0 to z0: f(t z0) >= (1 - t) f(0) + t f(z0) >= t z0 for this t.
        low = 1 - 2 * self.rounding.relative
        _, t = chord(at_zero * low, z0 - problem(z0) * low)
        z = t * z0
        return at_zero, z, problem(z), 3

    def _take(self, steps: int, z0: Tensor | None) -> None:
        """Exactly so many evaluations, the proof included, without waiting for the device."""
        z0 = None if z0 is None else torch.where(z0.isfinite(), z0, 0.0).to(self.dtype).clamp_min(0)
        at_zero, z, s, taken = self._start(self.problem, z0)
        p = z
        for _ in range(max(steps - 1 - taken, 1)):
            p, z, s = z, s, self.problem(s)
        q, _, r, _ = _extrapolate(p, z, s, self.map.supremum, 4 * unit_roundoff(self.dtype))  # type: ignore[union-attr]
        # Where nothing bounds the rest, the last point still stands, unproven.
        q = torch.where(per_sample(r < 1, q), q, s)
        trial = Evaluated(at_zero=at_zero, p=z, at_p=s, q=q, at_q=self.problem(q))
        found = prove(trial, self.rounding) if self.proving else observe(trial)
        # A bounded activation makes something finite of an infinite injection.
        self._keep(replace(found, proven=found.proven & all_finite(self.problem.injection)), slice(None))
        self.point = s
        self.steps += max(steps, taken + 2)
        self.rate = r

    def _keep(self, found: Enclosure, where: Tensor | slice) -> None:
        self.residual[where] = found.residual
        self.proven[where] = found.proven
        mask = per_sample(found.proven, found.lower)
        self.lower[where] = torch.where(mask, found.lower, 0.0)
        self.upper[where] = torch.where(mask, found.upper, math.inf)

    def _iterate(self, index: Tensor, z0: Tensor | None) -> None:
        """Iterate the samples of `index` until each is done, or at the end of its steps."""
        problem, limit = self.problem.select(index), self.solver.max_steps
        spent = int(self.steps[index].max())
        at_zero, z, s, steps = self._start(problem, None if z0 is None else z0[index])
        # How much of the tolerance the predicted width may take; halved for a sample whose proof missed it.
        share = torch.ones_like(z.flatten(1)[:, :1].sum(1))
        while True:
            p, z, s = z, s, problem(s)
            steps += 1
            q, predicted, r, still = _extrapolate(p, z, s, self.map.supremum, 4 * unit_roundoff(self.dtype))  # type: ignore[union-attr]
            # NaN compares false: such a sample is never ready.
            ready = (predicted <= share * self.solver.tol) | still
            exhausted = spent + steps + 2 > limit
            finish = torch.ones_like(ready) if exhausted else ready
            if not bool(finish.any()):
                continue
            self.point[index] = s
            room = limit - spent - steps - 1
            done = self._finish(
                problem, index, room, Evaluated(at_zero=at_zero, p=z, at_p=s, q=q, at_q=q), r, still, finish
            )
            share = torch.where(finish, share / 2, share)
            # A sample that stands still has met the rounding of this precision: more steps cannot help.
            over = done | still | exhausted
            self.steps[index[over]] += steps
            keep = (~over).nonzero().flatten()
            if not keep.numel():
                return
            if len(keep) < len(index):
                index, z, s, share, problem = index[keep], z[keep], s[keep], share[keep], problem.select(keep)
                at_zero = at_zero[keep]
            spent = int(self.steps[index].max())

    def _finish(
        self,
        problem: FixedPointProblem,
        index: Tensor,
        room: int,
        trial: Evaluated,
        r: Tensor,
        still: Tensor,
        finish: Tensor,
    ) -> Tensor:
        """Evaluate f at q for the samples in `finish`, enclose them and store that; returns the mask of those done.

        With `room` evaluations more where that was not enough.
        """
        chosen = finish.nonzero().flatten()
        where = index[chosen]
        sub = problem.select(chosen)
        trial = Evaluated(**{f.name: getattr(trial, f.name)[chosen] for f in fields(Evaluated)})
        trial = replace(trial, at_q=sub(trial.q))
        self.steps[where] += 1
        found = prove(trial, self.rounding) if self.proving else observe(trial)
        if self.proving and room >= _AROUND:
            # Standing still, an iterate can be better than what its proof could make of it.
            accepted = self._accepted(found)
            hard = (~accepted & (still[chosen] | ~found.proven) & all_finite(trial.at_p)).nonzero().flatten()
            if hard.numel():
                around = self._prove_around(sub.select(hard), trial.at_p[hard], room)
                self.steps[where[hard]] += around.evaluations
                found = _sharpened(found, around, hard)
        self.rate[where] = r[chosen]
        self._keep(found, where)
        return torch.zeros_like(finish).index_copy(0, chosen, self._accepted(found))

    def _accepted(self, found: Enclosure) -> Tensor:
        middle = ((found.lower + found.upper) / 2).to(self.working)
        return found.proven & (relative_error_bound(middle, found.lower, found.upper) <= self.solver.tol)


def _sharpened(found: Enclosure, around: Enclosure, index: Tensor) -> Enclosure:
    """`found`, cut with what was proven of the samples of `index` besides."""
    lower, upper, proven, residual = (t.clone() for t in (found.lower, found.upper, found.proven, found.residual))
    old, new = found.proven[index], around.proven
    both = per_sample(old & new, around.lower)
    use = per_sample(new, around.lower)
    lower[index] = torch.where(
        both, torch.maximum(lower[index], around.lower), torch.where(use, around.lower, lower[index])
    )
    upper[index] = torch.where(
        both, torch.minimum(upper[index], around.upper), torch.where(use, around.upper, upper[index])
    )
    proven[index], residual[index] = old | new, around.residual
    return replace(found, lower=lower, upper=upper, proven=proven, residual=residual)


def _checked(problem: FixedPointProblem, z: Tensor) -> Tensor:
    """f(z), with a clear error if the cell changes the shape."""
    new = problem(z)
    if new.shape != z.shape:
        raise ValueError(
            f"the cell maps shape {tuple(z.shape)} to {tuple(new.shape)}; a fixed point needs equal shapes"
        )
    return new


def _extrapolate(
    p: Tensor, z: Tensor, s: Tensor, supremum: float, noise: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From p, z = f(p), s = f(z): the upper point q, its predicted relative distance to z*, r, and who stands still.

    Where an entry's own ratio r_i went on, its limit would be z_i + e_i/(1 - r_i); q is that for the largest ratio. The
    distance between the two predicts the width of the enclosure (a prediction only: it decides when to try a proof).
    """
    d, e = z - p, s - z
    floor = noise * s
    tiny = torch.finfo(z.dtype).tiny
    ratio = torch.where(e > floor, e / d.clamp_min(tiny), 0.0)
    r = amax(ratio)
    factor = per_sample(torch.where(r < 1, 1 / (1 - r), math.inf), z)
    # Where nothing moves the factor may be infinite; 0 * inf must not become NaN.
    ray = p + torch.where(d > 0, d * factor, 0.0)
    q = torch.maximum(ray, s).clamp_max(supremum)
    own = z + torch.where(e > 0, e, 0.0) / (1 - ratio).clamp_min(1e-30)
    predicted = amax((q - torch.minimum(own, q)) / s.clamp_min(tiny))
    return q, torch.where(r < 1, predicted, math.inf), r, r == 0
