"""Search in the layer's precision, prove what was found, and search again, in the precision of the proof, for what is left.

What to aim at, how a proof goes and what it says is the theory's: its facts of the batch answer all of that.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from perron._numerics.batch import all_finite
from perron.problem import FixedPointProblem
from perron.solution import Solution
from perron.solvers.aggregation import Aggregation
from perron.solvers.base import IterativeSolver
from perron.solvers.iteration import Found, Method, PicardSteps, Rule, iterate
from perron.solvers.splitting import Splitting
from perron.theory.base import Aim, Batch, Correction, Enclosure, Searched, Theory

__all__ = ["Proving"]


class Proving:
    """One solve: results of full size, filled in as samples are proven.

    Attributes:
        candidate: after `run`, where the searches would have gone next, in the precision of the proof.
    """

    candidate: Tensor

    def __init__(self, solver: IterativeSolver, problem: FixedPointProblem, guess: Tensor | None) -> None:
        assert problem.theory is not None
        self.solver, self.problem, self.guess, self.theory = solver, problem, guess, problem.theory
        self.fixed = solver.steps is not None
        self.exact = solver.exact_problem(problem)
        self.dtype = self.exact.injection.dtype
        self.searched = problem.to(solver.dtype_of_steps(problem))
        self.facts = self.theory.at(
            Batch(
                map=self.exact.map,  # type: ignore[arg-type]
                injection=self.exact.injection,
                steps_map=self.searched.map,  # type: ignore[arg-type]
                steps_injection=self.searched.injection,
                working=problem.injection.dtype,
                proving=solver.proof_dtype is not None,
                fixed=solver.steps,
            )
        )
        b = problem.injection
        self.steps = torch.full((len(b),), self.facts.evaluations, dtype=torch.long, device=b.device)
        self.model: Aggregation | None = None

    def run(self) -> Solution:
        facts, tol = self.facts, self.solver.tol
        best = facts.nothing()
        if not self.problem.injection.numel():
            return self._solution(best, best.residual)
        aim = facts.aim(self.guess, tol)
        if aim.origin is not None:
            self.model = Aggregation.of(self.searched.map, aim.origin.p)  # type: ignore[arg-type]
        room = self.solver.limit - self.facts.evaluations
        found = self._search(self.searched, aim, self.model, room, again=False)
        best, push = self._prove(best, found, None, room - found.most)
        last = Searched(value=found.value.to(self.dtype), candidate=found.candidate.to(self.dtype), push=push)
        rate = found.rate.to(self.dtype)
        for _ in range(0 if self.fixed else facts.searches):
            left = (~facts.accepted(best, tol) & all_finite(self.problem.injection)).nonzero().flatten()
            room = self.solver.limit - int(self.steps[left].max()) if left.numel() else 0
            if room <= facts.reserve(fixed=False):
                break
            found, best, push = self._again(left, best, last, room)
            rate = rate.index_copy(0, left, found.rate.to(self.dtype))
            last = replace(
                last,
                candidate=last.candidate.index_copy(0, left, found.candidate),
                push=last.push.index_copy(0, left, push),
            )
        self.candidate = last.candidate
        return self._solution(best, rate)

    def _again(self, left: Tensor, best: Enclosure, last: Searched, room: int) -> tuple[Found, Enclosure, Tensor]:
        """The samples of `left`, from where they are, in the precision of the proof."""
        aim = self.facts.aim_again(left, best, last, self.solver.tol)
        model = None if self.model is None else self.model.to(self.dtype)
        before, self.steps = self.steps, torch.zeros_like(self.steps[left])
        found = self._search(self.exact.select(left), aim, model, room, again=True)
        self.steps = before.index_add(0, left, self.steps)
        return found, *self._prove(best, found, left, room - found.most)

    def _search(
        self, problem: FixedPointProblem, aim: Aim, model: Aggregation | None, room: int, *, again: bool
    ) -> Found:
        """Steps from where the aim says, or the method, with `room` evaluations for them and their proofs."""
        method, start = self._method(problem, aim, model, again=again)
        left = room - self.facts.reserve(fixed=self.fixed)
        if not self.fixed:
            left = self.solver.patience(left, model)
        # Where only splitting is sure to converge, another method gets half of the steps.
        share = 2 if self.theory.splits and method is not None and not self.fixed and not again else 1
        rule = Rule(
            tol=aim.goal,
            slack=aim.slack,
            ahead=True,
            limit=max(left // share, 1),
            fixed=self.fixed,
            climbs=self.theory.rises,
            patient=not self.theory.rises,
        )
        method = sure_method(self.theory, problem) if method is None else method
        if aim.origin is not None:
            method = _Above(method, aim.origin.p)
        found = iterate(problem, method, start if aim.start is None else aim.start, rule)
        self.steps = self.steps + found.steps
        return found

    def _method(
        self, problem: FixedPointProblem, aim: Aim, model: Aggregation | None, *, again: bool
    ) -> tuple[Method | None, Tensor]:
        """The solver's own method; on another search from nowhere the one that is sure to converge."""
        if again and aim.origin is None:
            return None, problem.injection
        return self.solver.method(problem, aim.origin, model)

    def _prove(self, best: Enclosure, found: Found, index: Tensor | None, room: int) -> tuple[Enclosure, Tensor]:
        """Prove what was found for the samples of `index` (None: all); returns all enclosures, and how far each was pushed."""
        facts, tol = self.facts, self.solver.tol
        correct: Correction | None = None if self.model is None else self.model.to(self.dtype).correct
        z, rate = found.candidate.to(self.dtype), found.rate.to(self.dtype)
        first = push = facts.push(index, found)
        if self.fixed:
            self.steps = self.steps + facts.reserve(fixed=True)
            z, push = facts.prepare(z, push, rate, tol, correct)
            return facts.attempt(None, z, push).found, push
        where = index
        promising = facts.promising(push, tol)
        if promising is not None and (kept := promising.nonzero().flatten()).numel() != len(promising):
            where = kept if index is None else index[kept]
            z, push, rate = z[kept], push[kept], rate[kept]
        count = facts.proofs(room) if len(push) else 0
        for k in range(count):
            attempt = facts.attempt(where, z, push)
            if where is None:
                self.steps, best = self.steps + 1, attempt.found
            else:
                self.steps = self.steps.index_add(0, where, torch.ones_like(where))
                best = _put(best, attempt.found, where)
            if k + 1 == count:
                break
            kept = (~facts.accepted(attempt.found, tol, where)).nonzero().flatten()
            if not kept.numel():
                break
            where, rate, old = kept if where is None else where[kept], rate[kept], push[kept]
            z, push = facts.closer(where, attempt, kept, rate, tol, correct)
            # Once more only where the correction promises much; the others need more steps first.
            kept = (push < 0.5 * old).nonzero().flatten()
            where, z, push, rate = where[kept], z[kept], push[kept], rate[kept]
            if not kept.numel():
                break
        return best, first

    def _solution(self, best: Enclosure, rate: Tensor) -> Solution:
        found = self.facts.conclude(best, self.solver.tol)
        return Solution(
            value=found.value,
            lower=found.lower,
            upper=found.upper,
            steps=self.steps,
            residual=found.residual,
            error_bound=found.bound,
            rate=rate,
            converged=found.converged,
            proven=found.proven,
            proof_dtype=found.proof_dtype,
            stopping="residual" if found.lower is None else "enclosure",
        )


def sure_method(theory: Theory, problem: FixedPointProblem) -> Method:
    """A method that converges if anything is known of the map."""
    return Splitting(problem) if theory.splits else PicardSteps()


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


def _put(old: Enclosure, new: Enclosure, index: Tensor) -> Enclosure:
    """`old` with the samples of `index` replaced."""
    parts = {
        name: getattr(old, name).index_copy(0, index, getattr(new, name))
        for name in ("lower", "upper", "proven", "residual")
    }
    return replace(old, **parts)
