"""The linear equations at a fixed point, g = J^T g + v and w = J w + v, and a bound on the error of g.

They are fixed point problems themselves, so the loop of the accelerated methods solves them: generalised conjugate
residuals (mixing of a linear iteration is just that), on the aggregated residual where the cell has a rank-one model. The
bound on the error is the theory's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from perron._numerics.batch import all_finite, per_sample
from perron.cells.chain import Chain
from perron.cells.jacobian import Jacobian
from perron.cells.map import Linearization, Map
from perron.cells.opaque import OneSystem
from perron.solution import AdjointSolution
from perron.solvers.aggregation import Aggregation
from perron.solvers.base import Solver, report_failure
from perron.solvers.iteration import Found, Method, Rule, iterate
from perron.solvers.mixing import TRUST, Mixing
from perron.solvers.splitting import LinearSplitting
from perron.theory.base import GradientBound, Theory

__all__ = ["adjoint_in_steps", "solve_adjoint", "solve_tangent"]

_WINDOW = 5
# Widths up to which the linear equation of a cell whose Jacobian may have negative entries is solved by factorisation.
_DIRECT = 512


@dataclass(frozen=True)
class _Linear:
    """g -> J^T g + v, or w -> J w + v, as a map to iterate."""

    jacobian: Linearization
    v: Tensor
    transposed: bool

    def __call__(self, g: Tensor) -> Tensor:
        return (self.jacobian.rmatvec(g) if self.transposed else self.jacobian.matvec(g)) + self.v

    def select(self, index: Tensor) -> _Linear:
        assert isinstance(self.jacobian, Jacobian)
        return replace(self, jacobian=self.jacobian.select(index), v=self.v[index])


class _Mixed:
    """Mixing of the adjoint's residuals, corrected by the rank-one model where there is one."""

    products, trust = 0, TRUST

    def __init__(self, model: Aggregation | None, slope: Tensor | None, mixing: Mixing) -> None:
        self.model, self.slope, self.mixing = model, slope, mixing

    def advance(self, z: Tensor, fz: Tensor, room: int) -> Tensor:
        residual = fz - z
        if self.model is None or self.slope is None:
            return self.mixing(z, residual)
        return self.mixing(z, self.model.correct_adjoint(self.slope, residual))

    def select(self, index: Tensor) -> _Mixed:
        slope = None if self.slope is None else self.slope[index]
        return _Mixed(self.model, slope, self.mixing.select(index))


@torch.no_grad()
def solve_tangent(map: Map, z: Tensor, injection: Tensor, v: Tensor, solver: Solver, theory: Theory | None) -> Tensor:
    """w = (I - J)^{-1} v at z, (batch, ...), to the solver's tolerance on the relative residual."""
    problem = _Linear(_linearized(map, z, injection, theory), v, False)
    rule = Rule(tol=solver.tol, slack=None, ahead=False, limit=solver.max_steps)
    found = _iterate(map, problem, None, None, rule, theory)
    converged = found.measure <= solver.tol
    _report("tangent", map, converged, found.measure, solver)
    return found.value


@torch.no_grad()
def solve_adjoint(
    map: Map,
    z: Tensor,
    injection: Tensor,
    v: Tensor,
    solver: Solver,
    *,
    bounds: tuple[Tensor, Tensor] | None = None,
    theory: Theory | None,
) -> tuple[Tensor, AdjointSolution]:
    """Solve g = J(z)^T g + v, and bound the error of g where bounds of the fixed point are given.

    Args:
        map: the cell.
        z: (batch, ...) the fixed point.
        injection: (batch, ...) b.
        v: (batch, ...) the incoming gradient.
        solver: its tol (relative), max_steps and on_failure.
        bounds: proven lower and upper bounds of the fixed point.
        theory: what is proven of the cell, or None.

    Returns:
        (g, AdjointSolution).
    """
    if not v.numel():
        none = v.new_zeros(len(v))
        return v, AdjointSolution(
            steps=none.long(), residual=none, error_bound=none, converged=none == 0, bounded=False
        )
    g, solution, measure = adjoint_in_steps(
        map, z, injection, v, solver.tol, solver.max_steps, bounds=bounds, theory=theory
    )
    _report("adjoint", map, solution.converged, measure, solver)
    return g, solution


def _report(what: str, map: Map, converged: Tensor, measure: Tensor, solver: Solver) -> None:
    unit = "batches" if isinstance(map, OneSystem) else "samples"
    report_failure(what, converged, measure, solver.tol, solver.max_steps, solver.on_failure, unit=unit)


@torch.no_grad()
def adjoint_in_steps(
    map: Map,
    z: Tensor,
    injection: Tensor,
    v: Tensor,
    tol: float,
    steps: int,
    *,
    bounds: tuple[Tensor, Tensor] | None = None,
    theory: Theory | None,
    fixed: bool = False,
) -> tuple[Tensor, AdjointSolution, Tensor]:
    """`solve_adjoint` in at most, or if `fixed` exactly, so many products; also returns the measure of convergence.

    With `fixed` nothing waits for the device.
    """
    jacobian = _linearized(map, z, injection, theory)
    problem = _Linear(jacobian, v, True)
    model, slope = None, None
    if theory is not None and theory.rises and isinstance(map, Chain) and isinstance(jacobian, Jacobian):
        model = Aggregation.of(map, z)
        slope = None if model is None else jacobian.slope
    bound: GradientBound | None = None
    if bounds is not None and theory is not None and isinstance(map, Chain):
        bound = theory.bound_gradient(map, injection, bounds, model=model, fixed=fixed)
    if bound is None:
        rule = Rule(tol=tol, slack=None, ahead=False, limit=steps, fixed=fixed)
        found = _iterate(map, problem, model, slope, rule, theory)
        unknown = torch.full_like(found.measure, math.inf)
        solution = AdjointSolution(
            steps=found.steps,
            residual=found.measure,
            error_bound=unknown,
            converged=found.measure <= tol,
            bounded=False,
        )
        return found.value, solution, found.measure
    c = None if bound.improves else _direct(problem)
    taken = torch.zeros(len(z), dtype=torch.long, device=z.device)
    aim = bound.aim(tol, v)
    if c is None:
        rule = Rule(
            tol=aim.goal,
            slack=None,
            ahead=bound.improves,
            limit=max(steps - 1, 1),
            fixed=fixed,
            weights=aim.weights,
            patient=not bound.improves,
        )
        found = _iterate(map, problem, model, slope, rule, theory)
        c, taken = (found.candidate if bound.improves else found.value), found.steps
    g, residual, error = bound.finish(z, c, v)
    measure = residual / aim.room
    solution = AdjointSolution(
        steps=taken + 1, residual=residual, error_bound=error, converged=measure <= tol, bounded=True
    )
    return g, solution, measure


def _linearized(map: Map, z: Tensor, injection: Tensor, theory: Theory | None) -> Linearization:
    return map.linearize(z, injection) if theory is None else theory.linearize(map, z, injection)


def _iterate(
    map: Map, problem: _Linear, model: Aggregation | None, slope: Tensor | None, rule: Rule, theory: Theory | None
) -> Found:
    jacobian = problem.jacobian
    # An operator known only through automatic differentiation acts on the whole batch.
    rule = replace(rule, compact=isinstance(jacobian, Jacobian))
    method: Method = _Mixed(model, slope, Mixing(_WINDOW, linear=True))
    start = problem.v
    if theory is not None and not theory.rises and isinstance(jacobian, Jacobian):
        direct = _direct(problem)
        if direct is not None:
            start = direct
        elif problem.v.numel() and isinstance(map, Chain) and theory.splits_linear(map):
            # Where J may be larger than 1 its powers do not converge.
            method = LinearSplitting(map, jacobian, problem.v, problem.transposed)
    return iterate(problem, method, start, rule)


def _direct(problem: _Linear) -> Tensor | None:
    """The solution itself where J = D W is small enough to factorise for every sample, else None."""
    v, jacobian = problem.v, problem.jacobian
    assert isinstance(jacobian, Jacobian)
    # Some sigma may come before W; only the order D W is dealt with here.
    weight = jacobian.factors[0].matrix() if len(jacobian.factors) == 2 else None
    if v.dim() != 2 or v.shape[1] > _DIRECT or weight is None:
        return None
    system = torch.eye(v.shape[1], dtype=v.dtype, device=v.device) - jacobian.slope.unsqueeze(2) * weight
    found, _ = torch.linalg.solve_ex(system.mT if problem.transposed else system, v.unsqueeze(2))
    return torch.where(per_sample(all_finite(found.squeeze(2)), v), found.squeeze(2), v)
