"""Picard iteration, stopped and extrapolated rigorously for positive concave cells.

From z = 0 the iterates rise to z*. Two increments in a row, d = z - p with z = f(p) and e = f(z) - z, bound the rest:

    r = max_i e_i / d_i < 1   implies   z* <= q = p + d/(1 - r).

Where the ratios e_i / d_i agree with each other, q is almost z* itself, long before z is. So the iteration stops as soon
as their spread promises the tolerance, and `perron.enclosure.prove` proves it from the pair (z, q) by one evaluation
more: the chord between them gives the lower bound. If the promise was not kept, the iteration goes on where it was.
The ratios are differences of differences, so this runs in float64 unless no proof is wanted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from perron._batch import all_finite, amax, per_sample
from perron.cells import Chain
from perron.enclosure import Enclosure, Evaluated, chord, prove, prove_around, relative_error_bound, round_outward
from perron.rounding import unit_roundoff
from perron.solvers.base import FixedPointProblem, OnFailure, Solution, report_failure

__all__ = ["Picard"]


@dataclass(frozen=True)
class Picard:
    """Picard iteration z <- f(z) from z = 0.

    Args:
        tol: tolerance on the entrywise relative error; certified where the cell is, else on the relative residual.
        max_steps: at most this many evaluations of f per sample; an enclosure takes at least three, and where rounding
            is in the way of a proof, a few more are spent on it.
        stop: "auto" stops by certified error where the cell has a certificate and by residual elsewhere;
            "residual" always by residual, without extrapolation.
        verify: precision of the solve and its proof, float64 (default) or float32 (only where its sums can be bounded,
            else float64); None solves in the precision of the layer, and nothing is certified.
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
        enclosing = problem.proven and self.stop == "auto"
        solution = _Enclosing(self, problem).run() if enclosing else _by_residual(self, problem)
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
            raise ValueError(
                f"the cell maps shape {tuple(z.shape)} to {tuple(new.shape)}; a fixed point needs equal shapes"
            )
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
        b = problem.injection
        precision = solver.verify
        if precision is not None and problem.map.to(precision).plainly() is None:
            precision = torch.float64
        self.solver = solver
        self.working = b.dtype
        # Never coarser than the layer.
        self.dtype = b.dtype if precision is None or b.dtype == torch.float64 else precision
        self.proving = precision is not None
        self.problem = problem.to(self.dtype)
        if self.proving:
            plain = self.problem.map.plainly()  # type: ignore[union-attr]
            assert plain is not None
            self.problem = replace(self.problem, map=plain)
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

    def run(self) -> Solution:
        finite = all_finite(self.problem.injection)
        index = finite.nonzero().flatten()
        if index.numel():
            self._iterate(index)
        middle = torch.where(self.upper.isinf(), self.lower, (self.lower + self.upper) / 2).to(self.working)
        value = torch.where(per_sample(finite, middle), middle, torch.nan)
        bound = torch.where(self.proven, relative_error_bound(value, self.lower, self.upper), math.inf)
        certified = self.proving and bool(self.proven.all())
        lower, upper = round_outward(self.lower, self.upper, self.working)
        return Solution(
            value,
            lower,
            upper,
            self.steps,
            torch.where(finite, self.residual, torch.nan),
            bound,
            self.rate,
            (bound <= self.solver.tol) & finite,
            certified,
            self.dtype if certified else None,
            "enclosure",
        )

    def _iterate(self, index: Tensor) -> None:
        """Iterate the samples of `index` until each is done, or at the end of its steps."""
        problem = self.problem.select(index)
        z = torch.zeros_like(problem.injection)
        s = _checked(problem, z)
        at_zero = s
        # How much of the tolerance the predicted width may take; halved for a sample whose proof missed it.
        share = torch.ones_like(z.flatten(1)[:, :1].sum(1))
        steps = 1
        while True:
            p, z, s = z, s, problem(s)
            steps += 1
            q, predicted, r, still = _extrapolate(p, z, s, self.map.supremum, 4 * unit_roundoff(self.dtype))  # type: ignore[union-attr]
            # NaN compares false: such a sample is never ready.
            ready = (predicted <= share * self.solver.tol) | still
            exhausted = steps + 2 > self.solver.max_steps
            finish = torch.ones_like(ready) if exhausted else ready
            if not bool(finish.any()):
                continue
            steps += 1
            done = self._finish(problem, index, steps, Evaluated(at_zero, z, s, q, q), r, still, finish)
            share = torch.where(finish, share / 2, share)
            # A sample that stands still has met the rounding of this precision: more steps cannot help.
            keep = (~(done | still | exhausted)).nonzero().flatten()
            if not keep.numel():
                return
            if len(keep) < len(index):
                index, z, s, share, problem = index[keep], z[keep], s[keep], share[keep], problem.select(keep)
                at_zero = at_zero[keep]

    def _finish(
        self,
        problem: FixedPointProblem,
        index: Tensor,
        steps: int,
        trial: Evaluated,
        r: Tensor,
        still: Tensor,
        finish: Tensor,
    ) -> Tensor:
        """Evaluate f at q for the samples in `finish`, enclose them and store that; returns the mask of those done."""
        chosen = finish.nonzero().flatten()
        where = index[chosen]
        sub = problem.select(chosen)
        trial = Evaluated(*(getattr(trial, f.name)[chosen] for f in fields(Evaluated)))
        trial = replace(trial, at_q=sub(trial.q))
        found = prove(trial, self.rounding) if self.proving else _observe(trial)
        if self.proving:
            # Standing still, an iterate can be better than what its proof could make of it.
            hard = ~self._accepted(found) & (still[chosen] | ~found.proven) & all_finite(trial.at_p)
            found = self._prove_harder(sub, found, trial.at_p, hard.nonzero().flatten())
        self.steps[where] = steps + found.evaluations
        self.rate[where] = r[chosen]
        self.residual[where] = found.residual
        self.proven[where] = found.proven
        mask = per_sample(found.proven, found.lower)
        self.lower[where] = torch.where(mask, found.lower, 0.0)
        self.upper[where] = torch.where(mask, found.upper, math.inf)
        done = torch.zeros_like(finish)
        done[chosen] = self._accepted(found)
        return done

    def _accepted(self, found: Enclosure) -> Tensor:
        middle = ((found.lower + found.upper) / 2).to(self.working)
        return found.proven & (relative_error_bound(middle, found.lower, found.upper) <= self.solver.tol)

    def _prove_harder(self, problem: FixedPointProblem, found: Enclosure, candidate: Tensor, hard: Tensor) -> Enclosure:
        """Where scaling leaves little slack against rounding (f nearly homogeneous in a coordinate), widen along (I - J)^-1."""
        assert isinstance(problem.map, Chain)
        if not hard.numel():
            return found
        around = prove_around(problem.map, problem.injection[hard], candidate[hard], attempts=4)
        lower, upper, proven, residual = (t.clone() for t in (found.lower, found.upper, found.proven, found.residual))
        old, new = found.proven[hard], around.proven
        both = per_sample(old & new, around.lower)
        use = per_sample(new, around.lower)
        lower[hard] = torch.where(
            both, torch.maximum(lower[hard], around.lower), torch.where(use, around.lower, lower[hard])
        )
        upper[hard] = torch.where(
            both, torch.minimum(upper[hard], around.upper), torch.where(use, around.upper, upper[hard])
        )
        proven[hard], residual[hard] = old | new, around.residual
        return replace(
            found, lower=lower, upper=upper, proven=proven, residual=residual, evaluations=around.evaluations
        )


def _observe(trial: Evaluated) -> Enclosure:
    """The same bounds taken at face value, rounding ignored: nothing is proven by them."""
    z, s, high = trial.p, trial.at_p, torch.minimum(trial.at_q, trial.q)
    t = chord((s - z).clamp_min(0), trial.q - high, 4 * unit_roundoff(z.dtype) * s)
    lower = (1 - t) * s + t * high
    residual = amax((trial.q - high) / high.clamp_min(torch.finfo(z.dtype).tiny))
    return Enclosure(lower, torch.maximum(high, lower), all_finite(high) & all_finite(lower), z.dtype, residual)


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
