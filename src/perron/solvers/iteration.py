"""The loop that all accelerated methods share: evaluate f, measure the residual, let the method choose the next point.

Samples that are done leave the batch. The host looks at the device only at steps foreseen from the observed rate. A
point whose residual has grown beyond the method's trust, or is not a number, is taken back: its sample goes half of the
way from the last accepted point, or where Picard's steps are known to lead on, one of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from perron._numerics.batch import amax, per_sample
from perron._numerics.rounding import unit_roundoff

__all__ = ["Found", "Method", "PicardSteps", "Rule", "iterate"]

# A sample's own rate is believed between these; and at most so many steps without a look at the device.
_RATES, _BLIND = (0.04, 1.0), 8
# Steps of methods that mix are not of one rate.
_BLIND_MIXED = 2
# Steps without a smaller residual after which rounding must be what keeps a sample from its goal.
_STANDSTILL = 16
# A candidate should be this much closer than the goal: a proof that fails costs more than a step.
_MARGIN = 2


class Iterated(Protocol):
    """A map of batches: a fixed point problem, or a linear equation."""

    def __call__(self, z: Tensor, /) -> Tensor: ...

    def select(self, index: Tensor) -> Iterated: ...


class Method(Protocol):
    """Chooses the next point from z and f(z); may remember earlier ones.

    Attributes:
        products: with the Jacobian, and further evaluations of f, that the last `advance` took.
        trust: how far the residual may grow over the least one before the point is taken back.
    """

    @property
    def trust(self) -> float: ...

    @property
    def products(self) -> int: ...

    def advance(self, z: Tensor, fz: Tensor, room: int) -> Tensor:
        """The next point, with at most `room` products."""
        ...

    def select(self, index: Tensor) -> Method:
        """The method for these samples of the batch only."""
        ...


@dataclass(kw_only=True)
class Found:
    """Where the iteration ended, per sample.

    Attributes:
        z, value: the last accepted point, and f there.
        candidate: the point that the method would have gone to.
        measure: of the residual f(z) - z.
        rate: the last ratio of two measures.
        steps: (batch,) evaluations, products among them.
        most: of them that any sample took, known to the host.
    """

    z: Tensor
    value: Tensor
    candidate: Tensor
    measure: Tensor
    rate: Tensor
    steps: Tensor
    most: int = 0


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How residuals are measured and when to stop.

    Attributes:
        tol: the measure to reach, a number or (batch,).
        slack: (batch, ...) what the residual is divided by, entrywise; None for the largest entry of f(z).
        ahead: judge the candidate, expected `rate` times closer than z, rather than z; and give up on samples which
            rounding or their rate keep from getting there.
        limit: at most this many evaluations, products among them.
        fixed: take all of them, and never look.
        weights: (batch, ...) or None: measure sum_i w_i |residual_i| / sum_i w_i |f(z)_i| instead.
        compact: let samples that are done leave the batch.
        climbs: Picard's steps lead to the fixed point from wherever the method goes: points that are taken back go to f of
            the last accepted one instead of half of the way, and are not judged.
        patient: do not give up on slow samples, only on those that have stood still for some steps.
    """

    tol: float | Tensor
    slack: Tensor | None
    ahead: bool
    limit: int
    fixed: bool = False
    weights: Tensor | None = None
    compact: bool = True
    patient: bool = False
    climbs: bool = False

    def measure(self, fz: Tensor, residual: Tensor) -> Tensor:
        if self.weights is not None:
            w = self.weights.flatten(1)
            size = torch.linalg.vecdot(w, fz.flatten(1).abs()).clamp_min(torch.finfo(fz.dtype).tiny)
            return torch.linalg.vecdot(w, residual.flatten(1).abs()) / size
        if self.slack is None:
            return amax(residual.abs()) / amax(fz.abs()).clamp_min(torch.finfo(fz.dtype).tiny)
        return amax(residual.abs() / self.slack)

    def floor(self, fz: Tensor) -> Tensor:
        """(batch,) what rounding adds to the measure."""
        if self.slack is None:
            return fz.new_full((len(fz),), 4 * unit_roundoff(fz.dtype))
        return 4 * unit_roundoff(fz.dtype) * amax(fz / self.slack)

    def select(self, index: Tensor) -> Rule:
        tol = self.tol[index] if isinstance(self.tol, Tensor) else self.tol
        slack, weights = (None if t is None else t[index] for t in (self.slack, self.weights))
        return replace(self, tol=tol, slack=slack, weights=weights)


def iterate(problem: Iterated, method: Method, z: Tensor, rule: Rule) -> Found:
    """Run the method from z on all samples, each until `rule` is met or hopeless."""
    loop = _Loop(problem, method, z, rule)
    while True:
        loop.step()
        if loop.taken >= rule.limit or (not rule.fixed and loop.rounds >= loop.next_look and loop.look()):
            return loop.finish()


class PicardSteps:
    """Picard's steps."""

    products, trust = 0, math.inf

    def advance(self, z: Tensor, fz: Tensor, room: int) -> Tensor:
        return fz

    def select(self, index: Tensor) -> PicardSteps:
        return self


class _Loop:
    """The samples still running, and the results of the others."""

    def __init__(self, problem: Iterated, method: Method, z: Tensor, rule: Rule) -> None:
        self.problem, self.method, self.z, self.rule = problem, method, z, rule
        batch = len(z)
        self.index: Tensor | None = None
        self.result: Found | None = None
        self.fz = z
        self.measure = torch.full((batch,), math.inf, dtype=z.dtype, device=z.device)
        self.first = self.least = self.measure
        self.rate = torch.ones_like(self.measure)
        self.steps = torch.zeros(batch, dtype=torch.long, device=z.device)
        self.still = torch.zeros(batch, dtype=z.dtype, device=z.device)
        self.picard = torch.zeros(batch, dtype=torch.bool, device=z.device)
        self.candidate = z
        self.taken, self.rounds, self.next_look = 0, 0, 1

    def step(self) -> None:
        self.rounds += 1
        first = self.rounds == 1
        z = self.candidate
        fz = self.problem(z)
        if first and fz.shape != z.shape:
            raise ValueError(
                f"the cell maps shape {tuple(z.shape)} to {tuple(fz.shape)}; a fixed point needs equal shapes"
            )
        measure = self.rule.measure(fz, fz - z)
        retreat: tuple[Tensor, Tensor] | None = None
        if not first:
            z, fz, measure, retreat = self._judge(z, fz, measure)
            # A residual can be exactly zero; 0/0 must not become NaN.
            self.rate = (measure / self.measure.clamp_min(torch.finfo(measure.dtype).tiny)).clamp(*_RATES)
        else:
            self.first = measure
        self.z, self.fz, self.measure = z, fz, measure
        candidate = self.method.advance(z, fz, max(self.rule.limit - self.taken - 2, 0))
        self.candidate = candidate if retreat is None else torch.where(*retreat, candidate)
        if self.rule.patient:
            self.still = torch.where(measure < self.least, 0.0, self.still + 1)
        self.least = torch.minimum(measure, self.least)
        self.taken += 1 + self.method.products
        self.steps = self.steps + (1 + self.method.products)

    def _judge(
        self, z: Tensor, fz: Tensor, measure: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """The point with its measure, or the last accepted one where it is taken back; there, where to go instead."""
        if math.isinf(self.method.trust):
            return z, fz, measure, None
        # NaN compares false.
        back = ~(measure <= self.method.trust * self.least)
        if self.rule.climbs:
            back = back & ~(self.picard & (measure < math.inf))
        # Where the host need not wait to know, it asks; elsewhere this is done for nothing most of the time.
        if not self.rule.fixed and z.device.type == "cpu" and not bool(back.any()):
            self.picard = back
            return z, fz, measure, None
        mask = per_sample(back, z)
        if self.rule.climbs:
            instead = self.fz
        else:
            half = torch.lerp(self.z, z, 0.5)
            instead = torch.where(half.isfinite(), half, torch.lerp(self.z, self.fz, 0.5))
        self.picard = back
        measure = torch.where(back, self.measure, measure)
        return torch.where(mask, self.z, z), torch.where(mask, self.fz, fz), measure, (mask, instead)

    def look(self) -> bool:
        """Whether all are done; decides when to look again, and lets go of samples that are done."""
        k = self.rounds
        tol = self.rule.tol if isinstance(self.rule.tol, Tensor) else torch.full_like(self.measure, self.rule.tol)
        floor = self.rule.floor(self.fz) if self.rule.ahead else torch.zeros_like(self.measure)
        # One transfer; what follows is the host's arithmetic. Comparisons with NaN are false: nobody waits for such a
        # sample, nor for one that rounding keeps from the goal.
        facts = torch.stack([self.measure, self.rate, floor, tol.to(floor), self.still, self.first, self.least])
        measure, rate, floor, tol, still, first, least = facts.double().cpu().numpy()
        with np.errstate(invalid="ignore", divide="ignore"):
            if self.rule.ahead:
                measure = 2 * measure * rate + floor
                running = (_MARGIN * measure > tol) & (_MARGIN * floor <= 0.8 * tol)
                if k > 2 and not self.rule.patient:
                    # One bad step is no reason to give up: the mean rate must promise too little, too.
                    hope = np.minimum(rate, (least / first) ** (1 / (k - 1)))
                    running &= measure * hope ** ((self.rule.limit - self.taken) * k / self.taken) <= tol
            else:
                running = measure > tol
            # Who has diverged will not come back, and who stands still (only counted if `patient`) will not move.
            running &= np.isfinite(measure) & (still < _STANDSTILL)
            count = running.sum()
            if count == 0:
                return True
            wanted = np.log(tol / measure)[running] / (1.1 * np.log(np.minimum(rate, 0.999))[running]) if k > 1 else 1
        blind = _BLIND if math.isinf(self.method.trust) else _BLIND_MIXED
        # Rates of what overflows or underflows on the way may be no numbers: those wait the longest.
        wait = float(np.max(wanted))
        self.next_look = k + (max(1, int(wait)) if wait < blind else blind)
        if self.rule.compact and count <= len(running) / 2:
            self._keep(torch.from_numpy(running).to(self.z.device))
        return False

    def _keep(self, running: Tensor) -> None:
        self._store()
        keep = running.nonzero().flatten()
        self.index = keep if self.index is None else self.index[keep]
        self.problem, self.method, self.rule = (
            self.problem.select(keep),
            self.method.select(keep),
            self.rule.select(keep),
        )
        for name in ("z", "fz", "measure", "first", "least", "rate", "steps", "still", "picard", "candidate"):
            setattr(self, name, getattr(self, name)[keep])

    def _store(self) -> None:
        now = Found(
            z=self.z, value=self.fz, candidate=self.candidate, measure=self.measure, rate=self.rate, steps=self.steps
        )
        if self.index is None or self.result is None:
            self.result = now
            return
        for name, value in vars(now).items():
            if isinstance(value, Tensor):
                # Measures have the precision of what residuals are divided by, but only from the first one on.
                old = getattr(self.result, name)
                setattr(self.result, name, old.index_copy(0, self.index, value.to(old.dtype)))

    def finish(self) -> Found:
        self._store()
        assert self.result is not None
        self.result.most = self.taken
        return self.result
