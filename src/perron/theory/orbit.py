"""Proofs of positive concave cells around the points of f's orbit from zero.

A proof needs one evaluation beyond the steps, and crude ones, in any precision, at p_1 = f(0), ..., p_{m-1} = f(p_{m-2}).
With p_0 = 0 and their mean p, concavity gives

    f(z + m rho (z - p)) - (z + m rho (z - p)) <= (1 + m rho)(f(z) - z) + rho sum_j (p_j - f(p_j)),

where the sum telescopes to -f(p_{m-1}). So q = z + m rho (z - p) is an upper bound as soon as f(z) - z <= rho f(p_{m-1})
entrywise, up to rounding and second order; whether it is one, f(q) decides. The lower bound is the chord from p to q,
since f(p) >= sum_j f(p_j)/m = p + f(p_{m-1})/m.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from perron._numerics.batch import all_finite, amax, per_sample
from perron._numerics.rounding import Rounding, unit_roundoff
from perron.cells.chain import Chain
from perron.theory.base import Aim, Attempt, Batch, Conclusion, Correction, Enclosure, Facts, Found, Origin, Searched
from perron.theory.enclosure import Evaluated, observe, prove, relative_error_bound, round_outward

__all__ = ["Orbit"]

# Evaluations of the smallest enclosure that Picard's steps give, which every sample can still have in the end; and of a
# proof in fixed steps, which starts from an exact residual.
_SMALLEST, _FIXED = 3, 2
# Part of the tolerance that an uncorrected step from an exact residual may cost.
_UNCORRECTED = 1 / 8


@dataclass(frozen=True, kw_only=True)
class Orbit(Facts):
    """f along its orbit from zero.

    Attributes:
        batch: the cell and its injections.
        rounding: of f in the precision of the proof.
        points: m.
        base, at_zero: (batch, ...) f(0), and where f is one activation its argument there; in the precision of the proof.
        low_point, at_low_point: (batch, ...) p, and a proven lower bound of f there.
        slack: (batch, ...) f(p_{m-1}), what residuals are divided by.
        origin: of the first search, in the precision of the steps.
    """

    batch: Batch
    rounding: Rounding
    points: int
    base: Tensor
    at_zero: Tensor
    low_point: Tensor
    at_low_point: Tensor
    slack: Tensor
    origin: Origin
    evaluations: int

    searches: ClassVar[int] = 2

    @classmethod
    def of(cls, batch: Batch) -> Orbit:
        """f along 0, f(0), ..., and from it their mean with a proven lower bound of f there, in the proof's precision."""
        exact, injection, dtype = batch.map, batch.injection, batch.injection.dtype
        # Farther points bound better what only long paths through W reach. In fixed steps there is one attempt only.
        count = 2 if batch.fixed is None else min(3, max(2, batch.fixed - 6))
        rounding = exact.rounding(dtype)
        base = (Chain(exact.steps[:-1]) if exact.single else exact).at_zero(injection)
        at_zero = exact.steps[-1](base, injection) if exact.single else base
        chain, b = batch.steps_map, batch.steps_injection
        p = at_zero.to(b.dtype)
        # Coarser steps than the layer's have rounded its weights and injections: they bound nothing of its map.
        faithful = chain.rigorous() if batch.proving and b.dtype == batch.working else None
        if not batch.proving:
            faithful, steps_rounding = chain, chain.rounding(b.dtype)
        elif faithful is None:
            faithful, b, steps_rounding = exact, injection, rounding
        else:
            steps_rounding = faithful.rounding(b.dtype)
        at_p = last = faithful(p.to(b.dtype), b)
        points = p.to(dtype)
        values = _below(at_zero, rounding) + _below(at_p.to(dtype), steps_rounding)
        for _ in range(2, count):
            last, before = faithful(last, b), last
            points = points + before.to(dtype)
            values = values + _below(last.to(dtype), steps_rounding)
        return cls(
            batch=batch,
            rounding=rounding,
            points=count,
            base=base,
            at_zero=at_zero,
            # f(mean) >= the mean of f; `prove` takes its own margin from f(0) and from the sum.
            low_point=points / count,
            at_low_point=values / count,
            slack=last.to(batch.working).clamp_min(torch.finfo(batch.working).tiny),
            origin=Origin(p=p, at_p=at_p.to(p.dtype), base=base.to(p.dtype)),
            evaluations=count - 1 + exact.zero_costs,
        )

    def reserve(self, *, fixed: bool) -> int:
        return _FIXED if fixed else 1 + _SMALLEST

    def proofs(self, room: int) -> int:
        return min(3, room - _SMALLEST)

    def nothing(self) -> Enclosure:
        lower = torch.zeros_like(self.batch.injection)
        return Enclosure(
            lower=lower,
            upper=lower + math.inf,
            proven=torch.zeros(len(lower), dtype=torch.bool, device=lower.device),
            proof_dtype=lower.dtype,
            residual=lower.new_full((len(lower),), math.inf),
        )

    def aim(self, guess: Tensor | None, tol: float) -> Aim:
        p = self.origin.p
        start = None if guess is None else torch.maximum(guess.to(p), p)
        return Aim(goal=tol, slack=self.slack, start=start, origin=self.origin)

    def aim_again(self, left: Tensor, best: Enclosure, last: Searched, tol: float) -> Aim:
        # An enclosure that came out too wide is in proportion to how far its upper point was pushed.
        bound = relative_error_bound(best.upper, best.lower, best.upper)[left]
        goal = torch.where(best.proven[left], last.push[left] * tol / bound, tol).clamp(1e-3 * tol, tol)
        dtype = self.batch.injection.dtype
        origin = Origin(p=self.at_zero[left], at_p=self.origin.at_p[left].to(dtype), base=self.base[left])
        start = last.candidate[left]
        start = torch.where(per_sample(all_finite(start), start), start, origin.at_p)
        start = torch.maximum(start.to(origin.p), origin.p)
        return Aim(goal=0.5 * goal, slack=self.slack[left].to(dtype), start=start, origin=origin)

    def push(self, index: Tensor | None, found: Found) -> Tensor:
        value = found.value
        slack = (self.slack if index is None else self.slack[index]).to(value.dtype)
        floor = 4 * unit_roundoff(value.dtype) * amax(value / slack)
        return (2 * found.measure * found.rate + floor).to(self.batch.injection.dtype)

    def promising(self, push: Tensor, tol: float) -> Tensor | None:
        return push <= tol

    def prepare(
        self, z: Tensor, push: Tensor, rate: Tensor, tol: float, correct: Correction | None
    ) -> tuple[Tensor, Tensor]:
        # With one attempt only, it starts from an exact residual.
        return self._closer(None, z, self.batch.map(z, self.batch.injection), rate.clamp_min(0.3), tol, correct)

    def attempt(self, index: Tensor | None, z: Tensor, push: Tensor) -> Attempt:
        """Evaluate f a little above the candidates, and enclose."""

        def pick(t: Tensor) -> Tensor:
            return t if index is None else t[index]

        q = z + per_sample(self.points * push, z) * (z - pick(self.low_point))
        chain = self.batch.map if index is None else self.batch.map.select(index)
        at_q = chain(q, pick(self.batch.injection))
        trial = Evaluated(
            at_zero=pick(self.at_zero), p=pick(self.low_point), at_p=pick(self.at_low_point), q=q, at_q=at_q
        )
        found = prove(trial, self.rounding) if self.batch.proving else observe(trial)
        return Attempt(found=found, point=q, image=at_q)

    def closer(
        self, index: Tensor, attempt: Attempt, kept: Tensor, rate: Tensor, tol: float, correct: Correction | None
    ) -> tuple[Tensor, Tensor]:
        return self._closer(index, attempt.point[kept], attempt.image[kept], rate, tol, correct)

    def _closer(
        self, index: Tensor | None, q: Tensor, at_q: Tensor, rate: Tensor, tol: float, correct: Correction | None
    ) -> tuple[Tensor, Tensor]:
        residual = at_q - q
        slack = (self.slack if index is None else self.slack[index]).to(q.dtype)
        size, floor = amax(residual.abs() / slack), 64 * unit_roundoff(q.dtype) * amax(at_q / slack)
        rho, step = 1.25 * size, residual
        if correct is not None:
            # Where an uncorrected step is enough, a model that fits this sample badly cannot spoil it.
            uncorrected = rho <= _UNCORRECTED * tol
            step = torch.where(per_sample(uncorrected, q), residual, correct(at_q, residual))
            rho = torch.where(uncorrected, rho, rate * size)
        # Comparisons with NaN are false: such a sample is not tried again.
        rho = rho + floor
        return torch.maximum(q + step, self.at_zero if index is None else self.at_zero[index]), rho

    def accepted(self, found: Enclosure, tol: float, index: Tensor | None = None) -> Tensor:
        """Whether the middle is near enough to both ends, its rounding included."""
        width = amax(found.upper / found.lower) - 1
        return found.proven & (width <= 2 * tol - 8 * unit_roundoff(self.batch.working))

    def conclude(self, best: Enclosure, tol: float) -> Conclusion:
        working = self.batch.working
        held = best.proven & all_finite(self.batch.injection)
        middle = ((best.lower + best.upper) / 2).to(working)
        mask = per_sample(held, middle)
        value = torch.where(mask, middle, torch.nan)
        low = torch.where(mask, best.lower, 0.0)
        high = torch.where(mask, best.upper, math.inf)
        bound = torch.where(held, relative_error_bound(value, low, high), math.inf)
        lower, upper = round_outward(low, high, working)
        return Conclusion(
            value=value,
            lower=lower,
            upper=upper,
            bound=bound,
            residual=best.residual,
            converged=bound <= tol,
            proven=held & self.batch.proving,
            proof_dtype=best.proof_dtype if self.batch.proving else None,
        )


def _below(value: Tensor, rounding: Rounding) -> Tensor:
    """A lower bound of what was computed as `value` with that rounding; `value` in the precision of the proof."""
    return (value * (1 - rounding.relative) * (1 - 8 * unit_roundoff(value.dtype)) - 2 * rounding.absolute).clamp_min(0)
