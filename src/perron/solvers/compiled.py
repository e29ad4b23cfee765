"""`Auto` with its steps compiled by torch.compile: small layers then cost what their products cost.

On small layers a solve is a few hundred tensor operations of microseconds each, nearly all of it overhead. In a fixed
number of steps nothing depends on data, so the compiler can fuse all of it, the proof included. The number of steps is
what the same problem took uncompiled before; samples that are not proven by then take the usual way.

Compilers replace functions by others that lose digits (exp(x) - 1 for expm1), which no bound of a proof allows for: so the
compiled code evaluates the activation on a probe, too, and serves only where that is what the uncompiled one gives.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from perron.cells.chain import Chain
from perron.cells.map import Map
from perron.cells.refusal import Refusal
from perron.cells.step import full_float32
from perron.problem import FixedPointProblem
from perron.solution import AdjointSolution, Solution
from perron.solvers.adjoint import adjoint_in_steps, solve_adjoint
from perron.solvers.aggregation import Aggregation
from perron.solvers.auto import Auto
from perron.theory.base import Theory

__all__ = ["Compiled"]

logger = logging.getLogger(__name__)

# Uncompiled solves of a problem's shape before it is compiled; most steps of a compiled solve; solves in a row with
# samples left over after which it is compiled again, with so many more steps; and how often at most.
_SIGHTINGS, _MOST, _PATIENCE, _MORE, _COMPILATIONS = 2, 22, 4, 6, 3

_SOLUTION = ("value", "lower", "upper", "steps", "residual", "error_bound", "rate", "converged", "proven")
_ADJOINT = ("steps", "residual", "error_bound", "converged")

# Decades on which a compiled activation is compared, and how many arguments.
_DECADES, _PROBES = (-30, 3), 512


@dataclass
class _Plan:
    """What is known of problems of one shape."""

    steps: int = 0
    sightings: int = 0
    leftovers: int = 0
    compilations: int = 0
    run: Callable[..., tuple[Tensor, ...]] | None = None
    refused: bool = False
    compared: bool = False

    def observe(self, steps: Tensor) -> bool:
        """Whether to compile now, after a solve that took these steps."""
        self.steps = max(self.steps, min(int(steps.max()), _MOST))
        self.sightings += 1
        ready = self.sightings >= _SIGHTINGS and not self.refused
        self.compilations += ready
        return ready

    def refuse(self, reason: str) -> None:
        """Never compile it again."""
        logger.warning("the solve could not be compiled and goes on uncompiled: %s", reason)
        self.run, self.refused = None, True


@dataclass(frozen=True, kw_only=True)
class Compiled(Auto):
    """`Auto`, compiled for each shape of problem that comes up more than twice.

    Compiling takes a C++ compiler and half a minute for the solve and as much for the adjoint; where it fails, a warning
    says so and the solves go on uncompiled. Only certified dense and diagonal-plus-low-rank cells with one activation, at
    their end, are compiled; in the others overhead is not what costs.

    Args:
        tol, max_steps, stop, proof_dtype, on_failure, steps, step_dtype, window: as in `Auto`.
        backend: of torch.compile.
    """

    backend: str = "inductor"
    plans: dict[Any, _Plan] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        # Compiled code stays where it was made.
        return {**self.__dict__, "plans": {}}

    def _solve(self, problem: FixedPointProblem, z0: Tensor | None) -> Solution:
        plan = self._plan("solve", problem.map, problem.injection, problem.theory)
        usable = (
            plan is not None and z0 is None and self.steps is None and self.encloses(problem) and _rises(problem.theory)
        )
        if plan is None or not usable:
            return super()._solve(problem, z0)
        if plan.run is None:
            found = super()._solve(problem, z0)
            if plan.observe(found.steps):
                plan.run = self._compile_solve(problem, plan.steps + 1)
            return found
        probes = _probes(problem.injection)
        tensors = self._try(plan, list(problem.map.tensors), problem.injection, probes)
        if tensors is None or not _faithful(plan, problem.map, probes, tensors[len(_SOLUTION) :]):
            return super()._solve(problem, z0)
        parts: dict[str, Any] = dict(zip(_SOLUTION, tensors[: len(_SOLUTION)], strict=True))
        found = Solution(**parts, proof_dtype=self._proof_dtype(), stopping="enclosure")
        left = (~found.converged).nonzero().flatten()
        self._judge(plan, bool(left.numel()))
        return found.merged(super()._solve(problem.select(left), None), left) if left.numel() else found

    def solve_adjoint(
        self,
        map: Map,
        z: Tensor,
        injection: Tensor,
        v: Tensor,
        bounds: tuple[Tensor, Tensor] | None,
        theory: Theory | None,
    ) -> tuple[Tensor, AdjointSolution]:
        """The adjoint likewise; a batch in which some sample does not converge is solved again uncompiled."""
        plan = self._plan("adjoint", map, v, theory) if bounds is not None and _rises(theory) else None
        if plan is not None and plan.run is not None and bounds is not None:
            tensors = self._try(plan, list(map.tensors), z, injection, v, *bounds)
            if tensors is not None:
                g, *rest = tensors
                found = AdjointSolution(**dict(zip(_ADJOINT, rest, strict=True)), bounded=True)
                converged = bool(found.converged.all())
                self._judge(plan, not converged)
                if converged:
                    return g, found
        g, found = solve_adjoint(map, z, injection, v, self, bounds=bounds, theory=theory)
        if plan is not None and plan.run is None and plan.observe(found.steps):
            plan.run = self._compile_adjoint(map, plan.steps, theory)
        return g, found

    def _proof_dtype(self) -> torch.dtype | None:
        return None if self.proof_dtype is None else torch.float64

    def _plan(self, what: str, map: Map, like: Tensor, theory: Theory | None) -> _Plan | None:
        """The plan for problems of this shape; None where they cannot be compiled."""
        if not isinstance(map, Chain) or not Aggregation.possible(map) or not like.numel():
            return None
        if self.proof_dtype == torch.float32:
            return None
        try:
            signature = tuple(step.signature() for step in map.known)
        except Refusal:
            return None
        key = (what, theory, signature, like.shape, like.dtype, like.device, full_float32())
        return self.plans.setdefault(key, _Plan())

    def _try(self, plan: _Plan, *arguments: Any) -> tuple[Tensor, ...] | None:
        assert plan.run is not None
        try:
            return plan.run(*arguments)
        except Exception as error:  # torch.compile fails in many ways, none of which may stop a solve
            plan.refuse(str(error).split("\n")[0])
            return None

    @staticmethod
    def _judge(plan: _Plan, leftover: bool) -> None:
        """Samples left over too often: compile again with more steps."""
        plan.leftovers = plan.leftovers + 1 if leftover else 0
        if plan.leftovers >= _PATIENCE and plan.compilations < _COMPILATIONS:
            plan.run, plan.leftovers, plan.compared = None, 0, False
            plan.steps = min(plan.steps + _MORE, _MOST)

    def _compile_solve(self, problem: FixedPointProblem, steps: int) -> Callable[..., tuple[Tensor, ...]]:
        options = {f.name: getattr(self, f.name) for f in fields(Auto) if f.name not in ("steps", "on_failure")}
        inner = Auto(**options, steps=max(steps, 5), on_failure="ignore")
        template, theory = _template(problem.map), problem.theory
        activation = template.last_activation
        assert activation is not None

        def run(tensors: list[Tensor], injection: Tensor, probes: list[Tensor]) -> tuple[Tensor, ...]:
            # Auto's own _solve only: the layers around it report failures and count.
            found = Auto._solve(
                inner, FixedPointProblem(map=template.rebind(tensors), injection=injection, theory=theory), None
            )
            return *(getattr(found, name) for name in _SOLUTION), *(activation(v) for v in probes)

        return torch.compile(run, backend=self.backend, fullgraph=True, dynamic=False)

    def _compile_adjoint(self, map: Map, steps: int, theory: Theory | None) -> Callable[..., tuple[Tensor, ...]]:
        template, tol = _template(map), self.tol

        def run(
            tensors: list[Tensor], z: Tensor, injection: Tensor, v: Tensor, lower: Tensor, upper: Tensor
        ) -> tuple[Tensor, ...]:
            g, found, _ = adjoint_in_steps(
                template.rebind(tensors),
                z,
                injection,
                v,
                tol,
                steps,
                bounds=(lower, upper),
                theory=theory,
                fixed=True,
            )
            return g, *(getattr(found, name) for name in _ADJOINT)

        return torch.compile(run, backend=self.backend, fullgraph=True, dynamic=False)


def _rises(theory: Theory | None) -> bool:
    return theory is not None and theory.rises


def _probes(like: Tensor) -> list[Tensor]:
    """Arguments in the precisions of a proof: that of the layer, and float64."""
    return [
        torch.logspace(*_DECADES, _PROBES, dtype=dtype, device=like.device)
        for dtype in dict.fromkeys((like.dtype, torch.float64))
    ]


def _faithful(plan: _Plan, map: Map, probes: list[Tensor], found: Sequence[Tensor]) -> bool:
    """Whether the compiled activation is as exact as the rounding of a proof takes it to be; asked once of compiled code."""
    if plan.compared:
        return True
    assert isinstance(map, Chain)
    activation = map.last_activation
    assert activation is not None
    for v, value in zip(probes, found, strict=True):
        known = activation(v)
        # Each of them within so many units of roundoff.
        if not bool(((value - known).abs() <= activation.ulps * torch.finfo(v.dtype).eps * known.abs()).all()):
            plan.refuse(f"the compiler's {activation.name} loses digits in {v.dtype}, which voids the proof")
            return False
    plan.compared = True
    return True


def _template(map: Map) -> Chain:
    """The structure of a chain, without its weights."""
    assert isinstance(map, Chain)
    return map.rebind([torch.empty(t.shape, dtype=t.dtype, device="meta") for t in map.tensors])
