"""A-posteriori bounds: what one evaluation of F, anywhere in a box, says of the distance to the fixed point.

The factor from residual to error is known before the first step, so the residual that the tolerance asks for is, too.
Samples of which nothing is known are solved all the same; they stop by residual, and nothing is claimed of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from perron._numerics.batch import all_finite, amax, amin, per_sample
from perron._numerics.rounding import Number, unit_roundoff
from perron.theory.base import Aim, Attempt, Batch, Conclusion, Correction, Enclosure, Facts, Found, Searched
from perron.theory.enclosure import relative_error_bound, round_outward

__all__ = ["ErrorBound", "Posterior", "rest"]

# Residuals below so many units of roundoff are not asked of steps in the layer's precision.
_ROUNDING = 64


def rest(q: Number, d: Number) -> Number:
    """At least d(F(z), z*), from d = d(z, F(z)) and d(F(z), z*) <= q d(z, z*) <= q (d + d(F(z), z*)), for 0 <= q < 1."""
    return q / (1 - q) * d


class ErrorBound(Protocol):
    """Bounds of z* from one evaluation of F, per sample, float64.

    Attributes:
        factor: (batch,) q such that the error is at most q/(1 - q) times the residual; 1 or more where none is known.
        lower, upper: (batch, ...) the box in which F has to be evaluated.
    """

    @property
    def factor(self) -> Tensor: ...

    @property
    def lower(self) -> Tensor: ...

    @property
    def upper(self) -> Tensor: ...

    def select(self, index: Tensor) -> ErrorBound: ...

    def enclose(self, z: Tensor, fz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bounds of z* and (batch,) whether they are proven, from z in the box and the computed F(z)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Posterior(Facts):
    """The facts that a bound of the error gives.

    Attributes:
        batch: the cell and its injections, float64.
        known: the bound.
    """

    batch: Batch
    known: ErrorBound

    searches: ClassVar[int] = 3
    evaluations: int = 0

    def reserve(self, *, fixed: bool) -> int:
        return 1

    def proofs(self, room: int) -> int:
        return 1

    def nothing(self) -> Enclosure:
        empty = torch.zeros_like(self.batch.injection)
        none = empty.new_zeros(len(empty))
        # Of no entries every bound is true.
        proven = torch.full_like(none, not empty.numel(), dtype=torch.bool)
        return Enclosure(lower=empty, upper=empty, proven=proven, proof_dtype=empty.dtype, residual=none)

    def _goal(self, tol: float) -> Tensor:
        """(batch,) the residual that the tolerance asks for; half of the tolerance is left to its rounding."""
        factor = self.known.factor
        return 0.4 * tol * torch.where(factor < 1, (1 - factor) / factor.clamp_min(0.1), 1.0)

    def aim(self, guess: Tensor | None, tol: float) -> Aim:
        # What rounding keeps the steps from is left to those in float64.
        working = self.batch.working
        goal = self._goal(tol).clamp_min(_ROUNDING * unit_roundoff(working)).to(working)
        return Aim(goal=goal, slack=None, start=guess)

    def aim_again(self, left: Tensor, best: Enclosure, last: Searched, tol: float) -> Aim:
        middle, lower = _middle(best)[left], best.lower[left]
        start = torch.where(per_sample(all_finite(middle), middle), middle, last.value[left])
        # A point that is no better than zero is not where to go on from.
        start = torch.where(per_sample(best.residual[left] < 0.5, start), start, 0.0)
        scale = torch.maximum(amax(start.abs()), amax(self.batch.injection[left].abs())).clamp_min(1e-30)
        size = torch.where((lower > 0) & (start > 0), lower, per_sample(scale, start))
        # The error is in proportion to the residual.
        bound, goal = self._bound(_middle(best), best)[left], self._goal(tol)[left]
        asked = torch.where(best.proven[left], 0.5 * tol / bound * best.residual[left], 0.5 * goal)
        return Aim(goal=torch.minimum(asked.clamp_min(1e-15), goal), slack=size, start=start)

    def push(self, index: Tensor | None, found: Found) -> Tensor:
        return found.measure.to(self.batch.injection.dtype)

    def promising(self, push: Tensor, tol: float) -> Tensor | None:
        return None

    def prepare(
        self, z: Tensor, push: Tensor, rate: Tensor, tol: float, correct: Correction | None
    ) -> tuple[Tensor, Tensor]:
        return z, push

    def attempt(self, index: Tensor | None, z: Tensor, push: Tensor) -> Attempt:
        """Evaluate F at z, moved into the box, and enclose."""
        known, chain, b = self.known, self.batch.map, self.batch.injection
        if index is not None:
            known, chain, b = known.select(index), chain.select(index), b[index]
        z = torch.minimum(torch.maximum(z, known.lower), known.upper)
        fz = chain(z, b)
        lower, upper, proven = known.enclose(z, fz)
        mask = per_sample(proven, fz)
        size = torch.maximum(amax(fz.abs()), amax(b.abs())).clamp_min(1e-300)
        # Where nothing is proven, the point itself stands in for its bounds, until the end.
        found = Enclosure(
            lower=torch.where(mask, lower, fz),
            upper=torch.where(mask, upper, fz),
            proven=proven,
            proof_dtype=fz.dtype,
            residual=amax((fz - z).abs()) / size,
        )
        return Attempt(found=found, point=z, image=fz)

    def closer(
        self, index: Tensor, attempt: Attempt, kept: Tensor, rate: Tensor, tol: float, correct: Correction | None
    ) -> tuple[Tensor, Tensor]:
        return attempt.image[kept], attempt.found.residual[kept]

    def accepted(self, found: Enclosure, tol: float, index: Tensor | None = None) -> Tensor:
        """Within the tolerance by the bounds, or by the residual where there are none."""
        bound = self._bound(_middle(found).to(self.batch.working), found, index)
        return torch.where(found.proven, bound, found.residual) <= tol

    def _bound(self, value: Tensor, best: Enclosure, index: Tensor | None = None) -> Tensor:
        """(batch,) bound on the error of `value`; relative to each entry where all are proven positive, else to the largest of
        the fixed point and the injection.
        """
        entrywise = relative_error_bound(value, best.lower, best.upper)
        gap = amax(torch.maximum(best.upper - value.double(), value.double() - best.lower))
        b = self.batch.injection if index is None else self.batch.injection[index]
        size = torch.maximum(amax(torch.maximum(best.lower, -best.upper)), amax(b.abs()))
        # Where nothing bounds the size from below, neither is the error bounded; NaN compares false.
        largest = torch.where(gap > 0, gap / size.clamp_min(0), gap) * (1 + 8 * unit_roundoff(gap.dtype))
        bound = torch.where(amin(best.lower) > 0, entrywise, largest)
        return torch.where(best.proven & (bound >= 0), bound, math.inf)

    def conclude(self, best: Enclosure, tol: float) -> Conclusion:
        working, finite = self.batch.working, all_finite(self.batch.injection)
        best = Enclosure(
            lower=best.lower,
            upper=best.upper,
            proven=best.proven & finite,
            proof_dtype=best.proof_dtype,
            residual=best.residual,
        )
        middle = _middle(best)
        value = torch.where(per_sample(finite, middle), middle, torch.nan).to(working)
        mask, whole = per_sample(best.proven, middle), torch.full_like(middle, math.inf)
        bounds = torch.where(mask, best.lower, -whole), torch.where(mask, best.upper, whole)
        lower, upper = round_outward(*bounds, working, signed=True)
        some = bool(best.proven.any()) or not len(value)
        return Conclusion(
            value=value,
            lower=lower if some else None,
            upper=upper if some else None,
            bound=self._bound(value, best),
            residual=best.residual,
            converged=self.accepted(best, tol) & finite,
            proven=best.proven,
            proof_dtype=best.proof_dtype if some else None,
        )


def _middle(best: Enclosure) -> Tensor:
    return (best.lower + best.upper) / 2
