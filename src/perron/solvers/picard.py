"""Picard iteration, with rigorous extrapolation for positive concave cells.

One cycle takes a lower point p (f(p) >= p) and an upper point u (f(u) <= u) and evaluates f three times:

    z = f(p),  s = f(z),  r = max_i (s - z)_i / (z - p)_i,  q = min(u, p + (z - p)/(1 - r)),  f(q).

By concavity q >= z* (the ray bound), f(q) is the next upper point, and the chord between z and q gives the next lower
point (`perron.enclosure.chord`). Both bounds close in on z*: Aitken's extrapolation, made rigorous on both sides. What
is proven in the end is proven by `perron.enclosure.prove`, not by this loop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from perron._batch import all_finite, all_true, amax, per_sample
from perron.cells import Chain, unit_roundoff
from perron.enclosure import Enclosure, chord, prove, prove_around, relative_error_bound, round_outward
from perron.solvers.base import FixedPointProblem, OnFailure, Solution, report_failure

__all__ = ["Picard"]

CYCLE = 3
PROOF = 2


@dataclass(frozen=True)
class Picard:
    """Picard iteration z <- f(z) from z = 0.

    Args:
        tol: tolerance on the entrywise relative error; certified where the cell is, else on the relative residual.
        max_steps: at most this many evaluations of f per sample.
        stop: "auto" stops by certified error where the cell has a certificate and by residual elsewhere;
            "residual" always by residual, without extrapolation.
        verify: precision of the final proof, float64 or float32; None skips it, and nothing is certified.
        on_failure: "warn" (ConvergenceWarning), "raise" (ConvergenceError) or "ignore".

    Raises:
        ValueError: an option is out of range.
    """

    tol: float = 1e-4
    max_steps: int = 200
    stop: str = "auto"
    verify: torch.dtype | None = torch.float64
    on_failure: OnFailure = "warn"

    def __post_init__(self) -> None:
        if not (0 < self.tol < 1):
            raise ValueError(f"tol must be in (0, 1), got {self.tol}")
        if self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {self.max_steps}")
        if self.stop not in ("auto", "residual"):
            raise ValueError(f"stop must be 'auto' or 'residual', got {self.stop!r}")
        if self.verify not in (None, torch.float32, torch.float64):
            raise ValueError(f"verify must be torch.float64, torch.float32 or None, got {self.verify}")
        if self.on_failure not in ("warn", "raise", "ignore"):
            raise ValueError(f"on_failure must be 'warn', 'raise' or 'ignore', got {self.on_failure!r}")

    @torch.no_grad()
    def solve(self, problem: FixedPointProblem) -> Solution:
        """Solve for the whole batch; samples do not influence each other."""
        if problem.proven and self.stop == "auto":
            solution = _Enclosing(self, problem).run()
        else:
            solution = _by_residual(self, problem)
        measure = solution.error_bound if solution.stopping == "enclosure" else solution.residual
        report_failure(type(self).__name__, solution.converged, measure, self.tol, self.max_steps, self.on_failure)
        return solution


def _by_residual(solver: Picard, problem: FixedPointProblem) -> Solution:
    b = problem.injection
    z = torch.zeros_like(b)
    batch = len(b)
    steps = torch.zeros(batch, dtype=torch.long, device=b.device)
    residual = b.new_full((batch,), math.inf)
    rate = b.new_zeros(batch)
    active = torch.ones(batch, dtype=torch.bool, device=b.device)
    for _ in range(solver.max_steps if batch else 0):
        new = problem(z)
        if new.shape != z.shape:
            raise ValueError(f"the cell maps shape {tuple(z.shape)} to {tuple(new.shape)}; a fixed point needs equal shapes")
        difference = amax((new - z).abs())
        scale = amax(new.abs()).clamp_min(torch.finfo(new.dtype).tiny)
        now = difference / scale
        rate = torch.where(active, now / residual, rate)
        residual = torch.where(active, now, residual)
        z = torch.where(per_sample(active, z), new, z)
        steps += active
        active = active & ~(now <= solver.tol) & torch.isfinite(now)
        if not bool(active.any()):
            break
    converged = (residual <= solver.tol) if z.numel() else torch.ones_like(active)
    unknown = torch.full_like(residual, math.inf)
    return Solution(z, None, None, steps, residual, unknown, rate, converged, False, None, "residual")


class _Enclosing:
    """One enclosing solve: full-size results, filled in as samples finish."""

    def __init__(self, solver: Picard, problem: FixedPointProblem) -> None:
        assert isinstance(problem.map, Chain)
        self.solver = solver
        self.problem = problem
        b = problem.injection
        self.working = b.dtype
        self.precision = solver.verify
        if self.precision is not None and problem.map.trustworthy_in(self.precision, b.device) is not None:
            self.precision = torch.float64
        # Bounds live in the finer of the two precisions.
        self.fine = torch.float64 if torch.float64 in (self.working, self.precision) else self.working
        batch = len(b)
        self.lower = torch.zeros(b.shape, dtype=self.fine, device=b.device)
        self.upper = torch.full(b.shape, math.inf, dtype=self.fine, device=b.device)
        self.steps = torch.zeros(batch, dtype=torch.long, device=b.device)
        self.residual = torch.full((batch,), math.inf, dtype=self.working, device=b.device)
        self.rate = torch.zeros(batch, dtype=self.working, device=b.device)
        self.proven = torch.zeros(batch, dtype=torch.bool, device=b.device)

    def run(self) -> Solution:
        b = self.problem.injection
        finite = all_finite(b)
        pending = finite.nonzero().flatten()
        # float32 bounds cannot be narrower than its noise: such tolerances start in float64 at once.
        phases = [self.fine]
        if self.working != self.fine and self.solver.tol >= 256 * unit_roundoff(self.working):
            phases = [self.working, self.fine]
        for dtype in phases:
            if pending.numel():
                pending = self._phase(pending, dtype, last=dtype == phases[-1])
        return self._solution(finite)

    def _solution(self, finite: Tensor) -> Solution:
        middle = torch.where(self.upper.isinf(), self.lower, (self.lower + self.upper) / 2).to(self.working)
        value = torch.where(per_sample(finite, middle), middle, torch.nan)
        bound = relative_error_bound(value, self.lower, self.upper)
        certified = self.precision is not None and bool(self.proven.all())
        if self.precision is not None:
            bound = torch.where(self.proven, bound, torch.inf)
        lower, upper = round_outward(self.lower, self.upper, self.working)
        converged = (bound <= self.solver.tol) & finite
        return Solution(
            value,
            lower,
            upper,
            self.steps,
            torch.where(finite, self.residual, torch.nan),
            bound.to(self.fine),
            self.rate,
            converged,
            certified,
            self.precision if certified else None,
            "enclosure",
        )

    def _phase(self, index: Tensor, dtype: torch.dtype, *, last: bool) -> Tensor:
        """Cycle in `dtype` until the samples of `index` are done; returns those left for a finer precision."""
        problem = self.problem.select(index).to(dtype)
        chain = problem.map
        assert isinstance(chain, Chain)
        noise = 4 * unit_roundoff(dtype)
        p = torch.zeros_like(problem.injection)
        upper = torch.full_like(p, chain.supremum)
        width = p.new_full((len(p),), math.inf)
        rejected: list[Tensor] = []
        budget = int(self.solver.max_steps - self.steps[index].max()) if len(index) else 0
        while True:
            z, s, q, lower, high, r = _cycle(problem, p, upper, noise)
            budget -= CYCLE
            self.steps[index] += CYCLE
            new_width = amax((high - lower) / lower.clamp_min(torch.finfo(dtype).tiny))
            # NaN compares false: such a sample is never ready.
            ready = new_width <= self.solver.tol
            # In the coarser precision a sample that no longer improves has met its noise.
            stalled = (new_width > 0.5 * width) & (new_width < 1e-2) if not last else torch.zeros_like(ready)
            exhausted = budget < CYCLE + PROOF
            finish = (torch.ones_like(ready) if exhausted else ready) & ~stalled
            done = self._finish(problem, index, z, q, lower, high, r, finish, dtype) if bool(finish.any()) else finish
            budget -= PROOF * bool(finish.any())
            failed = finish & ~done
            leave = done | stalled | (failed & (not last)) | exhausted
            rejected.append(index[(stalled | failed) & ~done])
            p, upper, width = lower, high, new_width
            if bool(leave.any()):
                keep = (~leave).nonzero().flatten()
                if not keep.numel():
                    break
                index, p, upper, width, problem = index[keep], p[keep], upper[keep], width[keep], problem.select(keep)
        return torch.cat(rejected)

    def _finish(
        self,
        problem: FixedPointProblem,
        index: Tensor,
        z: Tensor,
        q: Tensor,
        lower: Tensor,
        high: Tensor,
        r: Tensor,
        finish: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        """Prove and store the enclosures of the samples in `finish`; returns the mask of those within the tolerance."""
        chosen = finish.nonzero().flatten()
        where = index[chosen]
        self.rate[where] = r[chosen].to(self.working)
        if self.precision is None:
            self.lower[where], self.upper[where] = lower[chosen].to(self.fine), high[chosen].to(self.fine)
            self.residual[where] = ((high - lower)[chosen] / lower[chosen]).flatten(1).amax(1).to(self.working)
            accepted = torch.ones_like(chosen, dtype=torch.bool)
        else:
            sub = problem.select(chosen).to(self.precision)
            assert isinstance(sub.map, Chain)
            rounding = sub.map.rounding(self.precision)
            # Trial points a little outside the iterates, by what rounding may have cost them.
            pad = max(32 * unit_roundoff(dtype), 32 * rounding.relative)
            low_trial = z[chosen].to(self.precision) * (1 - pad)
            high_trial = q[chosen].to(self.precision) * (1 + pad) + 64 * rounding.absolute
            found = prove(sub.map, sub.injection, low_trial, high_trial, rounding)
            self.steps[where] += PROOF
            if not bool(found.proven.all()):
                found = self._prove_harder(sub, where, found, (lower[chosen] + high[chosen]) / 2)
            self.residual[where] = found.residual.to(self.working)
            self.proven[where] = found.proven
            mask = per_sample(found.proven, found.lower)
            self.lower[where] = torch.where(mask, found.lower, 0.0).to(self.fine)
            self.upper[where] = torch.where(mask, found.upper, math.inf).to(self.fine)
            middle = ((found.lower + found.upper) / 2).to(self.working)
            accepted = found.proven & (relative_error_bound(middle, found.lower, found.upper) <= self.solver.tol)
        done = torch.zeros_like(finish)
        done[chosen] = accepted
        return done

    def _prove_harder(self, problem: FixedPointProblem, where: Tensor, found: Enclosure, candidate: Tensor) -> Enclosure:
        """Where scaling leaves no slack against rounding (f nearly homogeneous in a coordinate), widen along (I - J)^-1."""
        assert isinstance(problem.map, Chain)
        assert self.precision is not None
        open_ = (~found.proven & all_finite(candidate)).nonzero().flatten()
        if not open_.numel():
            return found
        sub = problem.select(open_)
        around = prove_around(problem.map, sub.injection, candidate[open_].to(self.precision), attempts=4)
        self.steps[where[open_]] += around.evaluations
        lower, upper, proven, residual = (t.clone() for t in (found.lower, found.upper, found.proven, found.residual))
        lower[open_], upper[open_] = around.lower, around.upper
        proven[open_], residual[open_] = around.proven, around.residual
        return replace(found, lower=lower, upper=upper, proven=proven, residual=residual)


def _cycle(
    problem: FixedPointProblem, p: Tensor, upper: Tensor, noise: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Three evaluations: returns z, f(z), the upper trial point q, the next lower and upper points, and the ratio r."""
    z = problem(p)
    if z.shape != p.shape:
        raise ValueError(f"the cell maps shape {tuple(p.shape)} to {tuple(z.shape)}; a fixed point needs equal shapes")
    s = problem(z)
    first, second = z - p, s - z
    floor = noise * s
    moving = second > floor
    ratio = torch.where(moving, second / first.clamp_min(torch.finfo(z.dtype).tiny), 0.0)
    r = amax(ratio)
    factor = per_sample(torch.where(r < 1, 1 / (1 - r), math.inf), z)
    # Where nothing moves the factor may be infinite; 0 * inf must not become NaN.
    ray = p + torch.where(first > 0, first * factor, 0.0)
    q = torch.minimum(upper, torch.maximum(ray, s))
    unbounded = per_sample(~all_true(q.isfinite()), q)
    q = torch.where(unbounded, s, q)
    fq = problem(q)
    t = chord(second.clamp_min(0), q - fq, floor)
    lower = torch.where(unbounded, fq, torch.maximum(s, (1 - t) * s + t * torch.minimum(fq, q)))
    high = torch.where(unbounded, math.inf, torch.maximum(fq, lower))
    return z, s, q, lower, high, r
