"""The default: aggregation in the layer's precision, one evaluation to prove the result, Picard for what is left.

Aggregation (see `perron.solvers.aggregation`) usually reaches a candidate z in a few evaluations of f, however hard the
map is for Picard. The proof needs one evaluation more, and one crude one at p = f(0) in any precision. By concavity

    f(z + rho (2 z - p)) - (z + rho (2 z - p)) <= (1 + 2 rho)(f(z) - z) + rho (p - f(p) - f(0))

so q = z + rho (2 z - p) is an upper bound as soon as f(z) - z <= rho f(p) entrywise, up to rounding and second order;
whether it is one, f(q) decides. The lower bound is the chord from p/2 to q, since f(p/2) >= (f(p) + f(0))/2 > p/2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from perron._batch import all_finite, amax, per_sample
from perron.cells import Chain
from perron.enclosure import Enclosure, Evaluated, prove, relative_error_bound, round_outward
from perron.rounding import Rounding, unit_roundoff
from perron.solvers.aggregation import Aggregation
from perron.solvers.base import FixedPointProblem, Solution, report_failure
from perron.solvers.mixing import Mixing
from perron.solvers.picard import Picard

__all__ = ["Auto"]

# Steps in the working precision before Picard takes over, and proofs tried on what they found.
_STEPS, _PROOFS, _WINDOW = 14, 3, 3


@dataclass(frozen=True)
class Auto(Picard):
    """Aggregation where the cell has one activation, at its end, and Picard for every sample that it does not finish.

    Takes the options of `Picard`. Without a proof to end with (`verify=None`, `stop="residual"`, cells without a
    certificate) it is Picard.
    """

    @torch.no_grad()
    def solve(self, problem: FixedPointProblem) -> Solution:
        """Solve for the whole batch."""
        chain, b = problem.map, problem.injection
        usable = problem.proven and self.stop == "auto" and self.verify == torch.float64 and self.max_steps >= 8
        if not (usable and isinstance(chain, Chain) and b.numel()):
            return super().solve(problem)
        model = Aggregation.of(chain, b)
        if model is None:
            return super().solve(problem)
        found = _Aggregated(self, problem, chain, model).run()
        left = (~found.converged).nonzero().flatten()
        if left.numel():
            budget = self.max_steps - int(found.steps.max())
            rest = Picard.solve(replace(self, on_failure="ignore", max_steps=max(budget, 1)), problem.select(left))
            found = _merged(found, rest, left)
        report_failure(
            type(self).__name__, found.converged, found.error_bound, self.tol, self.max_steps, self.on_failure
        )
        return found


class _Aggregated:
    """One solve: results of full size, filled in as samples are proven."""

    def __init__(self, solver: Auto, problem: FixedPointProblem, chain: Chain, model: Aggregation) -> None:
        self.solver, self.chain, self.model = solver, chain, model
        self.b = problem.injection
        self.exact_b = self.b.double()
        plain = chain.to(torch.float64).plainly()
        assert plain is not None, "float64 sums are plain on every device"
        self.exact_chain = plain
        self.rounding = plain.rounding(torch.float64)
        self.anchor = chain.at_zero(self.b)
        self._evaluate_anchor()

    def _evaluate_anchor(self) -> None:
        """f at p = f(0), and from it p/2 with a proven lower bound of f(p/2), both in float64."""
        plain = self.chain.plainly()
        if plain is None:
            at_anchor, rounding = self.exact_chain(self.anchor.double(), self.exact_b), self.rounding
        else:
            at_anchor, rounding = plain(self.anchor, self.b), plain.rounding(self.b.dtype)
        self.slack = at_anchor.to(self.b.dtype).clamp_min(torch.finfo(self.b.dtype).tiny)
        self.at_zero = self.exact_chain.at_zero(self.exact_b)
        self.low_point = self.anchor.double() / 2
        # f(p/2) >= (f(p) + f(0))/2; `prove` takes its own margin from f(0) and from the sum.
        self.at_low_point = (_below(at_anchor.double(), rounding) + _below(self.at_zero, self.rounding)) / 2

    def run(self) -> Solution:
        z, rho, rate, steps = self._iterate()
        batch, device = len(self.b), self.b.device
        shape = torch.zeros_like(self.exact_b)
        best = Enclosure(
            shape,
            shape + math.inf,
            torch.zeros(batch, dtype=torch.bool, device=device),
            torch.float64,
            shape.new_full((batch,), math.inf),
        )
        counted = torch.full((batch,), steps, dtype=torch.long, device=device)
        index = (rho <= self.solver.tol).nonzero().flatten()
        candidate, rho = (z.double(), rho.double()) if len(index) == batch else (z[index].double(), rho[index].double())
        for _ in range(_PROOFS if index.numel() else 0):
            found, at_q, q = self._prove(index, candidate, rho)
            counted[index] += 1
            accepted = self._accepted(found)
            best = found if len(index) == batch else _put(best, found, index)
            keep = (~accepted & all_finite(at_q)).nonzero().flatten()
            if not keep.numel():
                break
            # Go on from the exact residual that the failed proof has left.
            index, at_q, q = index[keep], at_q[keep], q[keep]
            residual = at_q - q
            model = replace(self.model, **{k: getattr(self.model, k).double() for k in ("rows", "columns", "total")})
            candidate = torch.maximum(q + model.correct(at_q, residual), self.anchor[index].double())
            slack = self.slack[index].double()
            rho = amax(residual.abs() / slack) * rate[index].double() + 1e-14 * amax(at_q / slack)
        return self._solution(best, counted, rate)

    def _iterate(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """Candidates, how far to push them up for the proof, the last residual ratios, and the evaluations so far."""
        noise = unit_roundoff(self.b.dtype)
        z = self.model.start(Chain(self.chain.steps[:-1]).at_zero(self.b))
        mixing = Mixing(_WINDOW)
        previous = torch.full((len(z),), math.inf, dtype=z.dtype, device=z.device)
        rate = torch.ones_like(previous)
        for k in range(1, _STEPS + 1):
            fz = self.chain(z, self.b)
            residual = fz - z
            weighted = amax(residual.abs() / self.slack)
            rate = (weighted / previous).clamp(0.02, 1.0) if k > 1 else rate
            previous = weighted
            floor = 4 * noise * amax(fz / self.slack)
            z = torch.maximum(mixing(z, self.model.correct(fz, residual)), self.anchor)
            rho = 2 * weighted * rate + floor
            # Comparisons with NaN are false: nobody waits for such a sample, nor for one that rounding keeps out.
            unready = (2 * rho > self.solver.tol) & (floor <= self.solver.tol)
            if k > 2:
                unready &= rho * rate ** (_STEPS - k) <= self.solver.tol
            if not bool(unready.any()) or bool((floor > self.solver.tol).double().mean() > 0.5):
                break
        return z, rho, rate, k + 1

    def _prove(self, index: Tensor, z: Tensor, rho: Tensor) -> tuple[Enclosure, Tensor, Tensor]:
        """Evaluate f a little above the candidates, and enclose; also returns f(q) and q."""
        whole = len(index) == len(self.b)

        def pick(t: Tensor) -> Tensor:
            return t if whole else t[index]

        q = z + per_sample(rho, z) * (2 * z - pick(self.anchor).double())
        at_q = self.exact_chain(q, pick(self.exact_b))
        trial = Evaluated(pick(self.at_zero), pick(self.low_point), pick(self.at_low_point), q, at_q)
        return prove(trial, self.rounding), at_q, q

    def _accepted(self, found: Enclosure) -> Tensor:
        middle = ((found.lower + found.upper) / 2).to(self.b.dtype)
        return found.proven & (relative_error_bound(middle, found.lower, found.upper) <= self.solver.tol)

    def _solution(self, found: Enclosure, steps: Tensor, rate: Tensor) -> Solution:
        proven = found.proven & all_finite(self.b)
        middle = ((found.lower + found.upper) / 2).to(self.b.dtype)
        mask = per_sample(proven, middle)
        value = torch.where(mask, middle, torch.nan)
        low = torch.where(mask, found.lower, 0.0)
        high = torch.where(mask, found.upper, math.inf)
        bound = torch.where(proven, relative_error_bound(value, low, high), math.inf)
        lower, upper = round_outward(low, high, self.b.dtype)
        certified = bool(proven.all())
        return Solution(
            value,
            lower,
            upper,
            steps,
            found.residual,
            bound,
            rate.double(),
            bound <= self.solver.tol,
            certified,
            torch.float64 if certified else None,
            "enclosure",
        )


def _below(value: Tensor, rounding: Rounding) -> Tensor:
    """A lower bound of what was computed as `value` (float64 tensor) with that rounding."""
    return (value * (1 - rounding.relative) * (1 - 1e-15) - 2 * rounding.absolute).clamp_min(0)


def _put(old: Enclosure, new: Enclosure, index: Tensor) -> Enclosure:
    """`old` with the samples of `index` replaced."""
    parts = {
        name: getattr(old, name).index_copy(0, index, getattr(new, name))
        for name in ("lower", "upper", "proven", "residual")
    }
    return replace(old, **parts)


def _merged(found: Solution, rest: Solution, index: Tensor) -> Solution:
    """`found` with the samples of `index` taken from `rest`, evaluations added."""
    steps = found.steps.index_add(0, index, rest.steps)
    names = ("value", "lower", "upper", "residual", "error_bound", "rate", "converged")
    parts = {k: getattr(found, k).index_copy(0, index, getattr(rest, k).to(getattr(found, k).dtype)) for k in names}
    certified = bool(parts["error_bound"].isfinite().all())
    return replace(found, steps=steps, certified=certified, precision=torch.float64 if certified else None, **parts)
