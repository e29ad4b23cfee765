"""What Anderson, Newton, Broyden and aggregation share: fast steps in the layer's precision, then a proof.

The proof needs one evaluation beyond the steps, and crude ones, in any precision, at p_1 = f(0), ..., p_{m-1} = f(p_{m-2}).
With p_0 = 0 and their mean p, concavity gives

    f(z + m rho (z - p)) - (z + m rho (z - p)) <= (1 + m rho)(f(z) - z) + rho sum_j (p_j - f(p_j)),

where the sum telescopes to -f(p_{m-1}). So q = z + m rho (z - p) is an upper bound as soon as f(z) - z <= rho f(p_{m-1})
entrywise, up to rounding and second order; whether it is one, f(q) decides. The lower bound is the chord from p to q,
since f(p) >= sum_j f(p_j)/m = p + f(p_{m-1})/m.

Samples that rounding keeps from a proof take their steps in the precision of the proof; Picard, whose every step is a
proof, gets what is left then.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from perron._numerics.batch import all_finite, amax, per_sample
from perron._numerics.rounding import Rounding, unit_roundoff
from perron.cells.chain import Chain
from perron.problem import FixedPointProblem
from perron.solution import Solution
from perron.solvers.aggregation import Aggregation
from perron.solvers.base import IterativeSolver
from perron.solvers.contracting import solve_by_contraction
from perron.solvers.iteration import Found, Method, Rule, iterate, solve_by_residual
from perron.solvers.picard import Picard
from perron.theory.enclosure import Enclosure, Evaluated, observe, prove, relative_error_bound, round_outward

__all__ = ["Accelerated", "Origin"]

# Proofs tried on what the steps found, each from the exact residual that the one before has left; and searches in the
# precision of the proof for samples that are not proven yet.
_PROOFS, _SEARCHES = 3, 2
# Evaluations of the proof in fixed steps.
_FIXED_PROOF = 2
# Part of the tolerance that an uncorrected step from an exact residual may cost.
_UNCORRECTED = 1 / 8
# Evaluations with which this is worth beginning; and that the smallest enclosure takes.
_LEAST, _SMALLEST_PROOF = 6, 3


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a solve begins: p = f(0) and f(p), (batch, ...) each, and the rank-one model of the cell, if it has one.

    Attributes:
        base: where f is one activation of z, its argument at z = 0; else p.
    """

    p: Tensor
    at_p: Tensor
    model: Aggregation | None
    base: Tensor


@dataclass(frozen=True, kw_only=True)
class Accelerated(IterativeSolver):
    """A solver that takes the steps of `method` and proves what they found.

    Args:
        step_dtype: dtype of the steps before the proof, for instance torch.bfloat16; None for that of the layer.
    """

    step_dtype: torch.dtype | None = None

    @abstractmethod
    def method(self, problem: FixedPointProblem, origin: Origin | None) -> tuple[Method, Tensor]:
        """A method for this problem, and where it starts. Without `origin` nothing is known of f."""

    def patience(self, evaluations: int, origin: Origin) -> int:
        """Evaluations that a method may take before the proof, of so many that are left."""
        return evaluations

    def successor(self, evaluations: int, problem: FixedPointProblem) -> IterativeSolver:
        """Who solves the samples that are left, in so many evaluations."""
        return Picard(
            tol=self.tol, max_steps=evaluations, stop=self.stop, proof_dtype=self.proof_dtype, on_failure="ignore"
        )

    def _solve(self, problem: FixedPointProblem, z0: Tensor | None) -> Solution:
        if self.contracts(problem):
            return solve_by_contraction(self, problem, self.method(problem, None)[0], z0)
        if not self.encloses(problem):
            return self._observe(problem, z0)
        if (self.steps is None and self.limit < _LEAST) or not problem.injection.numel():
            return Picard(
                tol=self.tol,
                max_steps=self.max_steps,
                stop=self.stop,
                proof_dtype=self.proof_dtype,
                on_failure="ignore",
            ).solve(problem, z0)
        proving = _Proving(self, problem, z0)
        found = proving.run()
        if self.steps is not None:
            return found
        left = (~found.converged).nonzero().flatten()
        budget = self.limit - int(found.steps[left].max()) if left.numel() else 0
        if budget < _SMALLEST_PROOF:
            return found
        # What the steps have found may be good enough already for another proof.
        guess = proving.candidate[left].to(problem.injection)
        return found.merged(self.successor(budget, problem).solve(problem.select(left), guess), left)

    def _observe(self, problem: FixedPointProblem, z0: Tensor | None) -> Solution:
        """Without enclosure: stop by residual."""
        if not problem.injection.numel():
            return solve_by_residual(self, problem, None, z0)
        method, start = self.method(problem, None)
        return solve_by_residual(self, problem, method, start if z0 is None else z0)


class _Proving:
    """One solve: results of full size, filled in as samples are proven."""

    def __init__(self, solver: Accelerated, problem: FixedPointProblem, z0: Tensor | None) -> None:
        self.solver, self.problem, self.z0 = solver, problem, z0
        self.b = problem.injection
        self.dtype = solver.dtype_of_proof(problem)
        self.exact = problem.to(self.dtype)
        self.proving = solver.proof_dtype is not None
        if self.proving:
            assert isinstance(self.exact.map, Chain)
            rigorous = self.exact.map.rigorous()
            assert rigorous is not None, "the precision was chosen for its rigorous sums"
            self.exact = replace(self.exact, map=rigorous)
        self.chain: Chain = self.exact.map  # type: ignore[assignment]
        self.rounding = self.chain.rounding(self.dtype)
        self.low = problem.to(solver.step_dtype or self.b.dtype)
        # Farther points bound better what only long paths through W reach. In fixed steps there is one attempt only.
        self.orbit = 2 if solver.steps is None else min(3, max(2, solver.steps - 6))
        self.origin, self.slack = self._evaluate_origin()
        self.begun = self.orbit - 1 + self.chain.zero_costs
        self.steps = torch.full((len(self.b),), self.begun, dtype=torch.long, device=self.b.device)

    def _evaluate_origin(self) -> tuple[Origin, Tensor]:
        """f along 0, f(0), ..., and from it their mean with a proven lower bound of f there, in the proof's precision."""
        chain, b = self.low.map, self.low.injection
        assert isinstance(chain, Chain)
        activation = self.chain.last_activation if self.chain.single else None
        if activation is None:
            self.base = self.at_zero = self.chain.at_zero(self.exact.injection)
        else:
            self.base = Chain(self.chain.steps[:-1]).at_zero(self.exact.injection)
            self.at_zero = activation(self.base)
        p = self.at_zero.to(b.dtype)
        # Coarser steps than the layer's have rounded its weights and injections: they bound nothing of its map.
        exact = b.dtype == self.b.dtype
        rigorous = (chain.rigorous() if exact else None) if self.proving else chain
        if rigorous is None:
            rigorous, b, rounding = self.chain, self.exact.injection, self.rounding
        else:
            rounding = rigorous.rounding(b.dtype)
        at_p = last = rigorous(p.to(b.dtype), b)
        points = p.to(self.dtype)
        values = _below(self.at_zero, self.rounding) + _below(at_p.to(self.dtype), rounding)
        for _ in range(2, self.orbit):
            last, before = rigorous(last, b), last
            points = points + before.to(self.dtype)
            values = values + _below(last.to(self.dtype), rounding)
        # f(mean) >= the mean of f; `prove` takes its own margin from f(0) and from the sum.
        self.low_point, self.at_low_point = points / self.orbit, values / self.orbit
        slack = last.to(self.b.dtype).clamp_min(torch.finfo(self.b.dtype).tiny)
        return Origin(p=p, at_p=at_p.to(p.dtype), model=Aggregation.of(chain, p), base=self.base.to(p.dtype)), slack

    def run(self) -> Solution:
        tol = self.solver.tol
        room = self.solver.limit - self.begun
        found = self._search(self.low, self.origin, self.slack, self.z0, tol, room)
        best, rho = self._prove_all(self._nothing(), found, None, room - found.most)
        rate, candidate = found.rate.to(self.dtype), found.candidate.to(self.dtype)
        for _ in range(_SEARCHES if self.solver.steps is None else 0):
            left = (~self._accepted(best) & all_finite(self.b)).nonzero().flatten()
            room = self.solver.limit - int(self.steps[left].max()) if left.numel() else 0
            if room <= 1 + _SMALLEST_PROOF:
                break
            # An enclosure that came out too wide is in proportion to rho.
            bound = relative_error_bound(best.upper, best.lower, best.upper)[left]
            goal = torch.where(best.proven[left], rho[left] * tol / bound, tol).clamp(1e-3 * tol, tol)
            found = self._search_again(left, candidate, 0.5 * goal, room)
            best, again = self._prove_all(best, found, left, room - found.most)
            rho, rate = rho.index_copy(0, left, again), rate.index_copy(0, left, found.rate.to(self.dtype))
            candidate = candidate.index_copy(0, left, found.candidate)
        self.candidate = candidate
        return self._solution(best, rate)

    def _search(
        self,
        problem: FixedPointProblem,
        origin: Origin,
        slack: Tensor,
        z0: Tensor | None,
        goal: float | Tensor,
        room: int,
    ) -> Found:
        """Steps from z0, or from where the method starts, with `room` evaluations for them and their proof."""
        method, start = self.solver.method(problem, origin)
        if z0 is not None:
            start = torch.maximum(z0.to(origin.p), origin.p)
        fixed = self.solver.steps is not None
        left = room - _FIXED_PROOF if fixed else self.solver.patience(room - 1 - _SMALLEST_PROOF, origin)
        rule = Rule(tol=goal, slack=slack, ahead=True, limit=max(left, 1), fixed=fixed, climbs=True)
        found = iterate(problem, _Above(method, origin.p), start, rule)
        self._count(found.steps)
        return found

    def _search_again(self, left: Tensor, candidate: Tensor, goal: Tensor, room: int) -> Found:
        """The samples of `left`, from where they are, in the precision of the proof."""
        model = self.origin.model
        origin = Origin(
            p=self.at_zero[left],
            at_p=self.origin.at_p[left].to(self.dtype),
            model=None if model is None else model.to(self.dtype),
            base=self.base[left],
        )
        start = candidate[left]
        start = torch.where(per_sample(all_finite(start), start), start, origin.at_p)
        before, self.steps = self.steps, torch.zeros_like(self.steps[left])
        found = self._search(self.exact.select(left), origin, self.slack[left].to(self.dtype), start, goal, room)
        self.steps = before.index_add(0, left, self.steps)
        return found

    def _count(self, evaluations: Tensor | int) -> None:
        self.steps = self.steps + evaluations

    def _nothing(self) -> Enclosure:
        lower = torch.zeros_like(self.exact.injection)
        unproven = torch.zeros(len(lower), dtype=torch.bool, device=lower.device)
        return Enclosure(
            lower=lower,
            upper=lower + math.inf,
            proven=unproven,
            proof_dtype=self.dtype,
            residual=lower.new_full((len(lower),), math.inf),
        )

    def _prove_all(self, best: Enclosure, found: Found, index: Tensor | None, room: int) -> tuple[Enclosure, Tensor]:
        """Prove what was found for the samples of `index` (None: all); returns all enclosures, and the samples' rho.

        Of the `room` evaluations that are left some stay with Picard, so that every sample gets an enclosure in the end.
        """
        where = torch.arange(len(self.b), device=self.b.device) if index is None else index
        floor = 4 * unit_roundoff(found.value.dtype) * amax(found.value / self.slack[where].to(found.value.dtype))
        first = rho = (2 * found.measure * found.rate + floor).to(self.dtype)
        z, rate = found.candidate.to(self.dtype), found.rate.to(self.dtype)
        if self.solver.steps is not None:
            # With one attempt only, it starts from an exact residual.
            self._count(_FIXED_PROOF)
            z, rho = self._closer(where, z, self.chain(z, self.exact.injection), rate.clamp_min(0.3))
            return self._prove(None, z, rho)[0], rho
        promising = (rho <= self.solver.tol).nonzero().flatten()
        whole = index is None and len(promising) == len(self.b)
        if not whole:
            where, z, rho, rate = where[promising], z[promising], rho[promising], rate[promising]
        for _ in range(min(_PROOFS, room - _SMALLEST_PROOF) if len(where) else 0):
            proof, at_q, q = self._prove(None if whole else where, z, rho)
            self.steps = self.steps.index_add(0, where, torch.ones_like(where))
            best = proof if whole else _put(best, proof, where)
            keep = (~self._accepted(proof)).nonzero().flatten()
            if not keep.numel():
                break
            whole = False
            where, rate, old = where[keep], rate[keep], rho[keep]
            z, rho = self._closer(where, q[keep], at_q[keep], rate)
            # Once more only where the correction promises much; the others need more steps first.
            keep = (rho < 0.5 * old).nonzero().flatten()
            where, z, rho, rate = where[keep], z[keep], rho[keep], rate[keep]
            if not keep.numel():
                break
        return best, first

    def _closer(self, where: Tensor, q: Tensor, at_q: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates and how far to push them up, from the exact residual that a failed proof has left."""
        residual = at_q - q
        slack = self.slack[where].to(self.dtype)
        size, floor = amax(residual.abs() / slack), 64 * unit_roundoff(self.dtype) * amax(at_q / slack)
        rho, step = 1.25 * size, residual
        if self.origin.model is not None:
            # Where an uncorrected step is enough, a model that fits this sample badly cannot spoil it.
            uncorrected = rho <= _UNCORRECTED * self.solver.tol
            corrected = self.origin.model.to(self.dtype).correct(at_q, residual)
            step = torch.where(per_sample(uncorrected, q), residual, corrected)
            rho = torch.where(uncorrected, rho, rate * size)
        # Comparisons with NaN are false: such a sample is not tried again.
        rho = rho + floor
        return torch.maximum(q + step, self.at_zero[where]), rho

    def _prove(self, index: Tensor | None, z: Tensor, rho: Tensor) -> tuple[Enclosure, Tensor, Tensor]:
        """Evaluate f a little above the candidates, and enclose; also returns f(q) and q."""

        def pick(t: Tensor) -> Tensor:
            return t if index is None else t[index]

        q = z + per_sample(self.orbit * rho, z) * (z - pick(self.low_point))
        chain = self.chain if index is None else self.chain.select(index)
        at_q = chain(q, pick(self.exact.injection))
        trial = Evaluated(
            at_zero=pick(self.at_zero), p=pick(self.low_point), at_p=pick(self.at_low_point), q=q, at_q=at_q
        )
        return prove(trial, self.rounding) if self.proving else observe(trial), at_q, q

    def _accepted(self, found: Enclosure) -> Tensor:
        """Whether the middle is near enough to both ends, its rounding included."""
        width = amax(found.upper / found.lower) - 1
        return found.proven & (width <= 2 * self.solver.tol - 8 * unit_roundoff(self.b.dtype))

    def _solution(self, found: Enclosure, rate: Tensor) -> Solution:
        held = found.proven & all_finite(self.b)
        middle = ((found.lower + found.upper) / 2).to(self.b.dtype)
        mask = per_sample(held, middle)
        value = torch.where(mask, middle, torch.nan)
        low = torch.where(mask, found.lower, 0.0)
        high = torch.where(mask, found.upper, math.inf)
        bound = torch.where(held, relative_error_bound(value, low, high), math.inf)
        lower, upper = round_outward(low, high, self.b.dtype)
        return Solution(
            value=value,
            lower=lower,
            upper=upper,
            steps=self.steps,
            residual=found.residual,
            error_bound=bound,
            rate=rate,
            converged=bound <= self.solver.tol,
            proven=held & self.proving,
            proof_dtype=self.dtype if self.proving else None,
            stopping="enclosure",
        )


class _Above:
    """A method whose points stay above p = f(0), as the fixed point does."""

    def __init__(self, method: Method, p: Tensor) -> None:
        self.method, self.p = method, p

    @property
    def products(self) -> int:
        return self.method.products

    @property
    def trust(self) -> float:
        return self.method.trust

    def advance(self, z: Tensor, fz: Tensor, room: int) -> Tensor:
        return torch.maximum(self.method.advance(z, fz, room), self.p)

    def select(self, index: Tensor) -> _Above:
        return _Above(self.method.select(index), self.p[index])


def _below(value: Tensor, rounding: Rounding) -> Tensor:
    """A lower bound of what was computed as `value` with that rounding; `value` in the precision of the proof."""
    return (value * (1 - rounding.relative) * (1 - 8 * unit_roundoff(value.dtype)) - 2 * rounding.absolute).clamp_min(0)


def _put(old: Enclosure, new: Enclosure, index: Tensor) -> Enclosure:
    """`old` with the samples of `index` replaced."""
    parts = {
        name: getattr(old, name).index_copy(0, index, getattr(new, name))
        for name in ("lower", "upper", "proven", "residual")
    }
    return replace(old, **parts)
