"""Differentiation through a fixed point z* = f(z*; b, theta), by the implicit function theorem.

Reverse mode: with J = df/dz at z*, the adjoint of an incoming gradient v solves `g = J^T g + v`; then the gradients of
b and theta are those of one evaluation of f with cotangent g. Memory does not depend on the number of solver steps.
The adjoint solve is itself an autograd function, so that gradients of gradients come out right.

The bound on g (theory: J >= 0 and J falls as z grows). For any w > 0 with `J(lower) w <= kappa w`, kappa < 1, the
exact Jacobian J* satisfies the same, so J*^T is a contraction in the norm `sum_i w_i |g_i|` with factor kappa and

    ||g - g*||_w <= ||g - J*^T g - v||_w / (1 - kappa),

where J*, known only to lie between J(upper) and J(lower), costs at most `(J(lower) - J(upper))^T |g|` more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from perron._batch import all_finite, amax, per_sample
from perron.cells import Chain, ChainLinearization, Linearization, Map
from perron.rounding import gamma, unit_roundoff
from perron.solvers.aggregation import Aggregation
from perron.solvers.base import AdjointSolution, FixedPointProblem, Solution, Solver, report_failure
from perron.solvers.mixing import Mixing

__all__ = ["fixed_point", "solve_adjoint"]

CHECK_EVERY = 3


def fixed_point(
    problem: FixedPointProblem,
    solver: Solver,
    *,
    on_adjoint: Callable[[AdjointSolution], None] | None = None,
) -> tuple[Tensor, Solution]:
    """Solve, and attach the implicit gradient to the value.

    Args:
        problem: its injection and the tensors of its map receive gradients where they require them.
        solver: solves the fixed point; its `tol`, `max_steps` and `on_failure` also rule the adjoint.
        on_adjoint: called in each backward pass with how the adjoint was solved.

    Returns:
        (value, solution): the value with its gradient, the Solution detached.
    """
    run = _Run(problem.map, solver, problem.proven, on_adjoint)
    value = _FixedPoint.apply(run, problem.injection, *problem.map.tensors)
    assert run.solution is not None
    solution = run.solution
    run.solution = None
    return value, solution


@dataclass
class _Run:
    """What the autograd functions of one call share."""

    map: Map
    solver: Solver
    proven: bool
    on_adjoint: Callable[[AdjointSolution], None] | None
    solution: Solution | None = None
    bounds: tuple[Tensor, Tensor] | None = None

    def evaluate(self, z: Tensor, injection: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
        return self.map.rebind(tensors)(z, injection)


class _FixedPoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _Run, injection: Tensor, *tensors: Tensor) -> Tensor:
        detached = run.map.rebind([t.detach() for t in tensors])
        run.solution = run.solver.solve(FixedPointProblem(detached, injection.detach(), run.proven))  # type: ignore[arg-type]
        # The graph must not hang on the map's own tensors: they come back through saved_tensors.
        run.map = detached
        if run.solution.certified and run.solution.lower is not None and run.solution.upper is not None:
            run.bounds = (run.solution.lower, run.solution.upper)
        value = run.solution.value.clone()
        ctx.run = run
        ctx.save_for_backward(value, injection, *tensors)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, injection, *tensors = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            g = _Adjoint.apply(ctx.run, z, grad, injection, *tensors)
            return None, *_pullback(ctx.run, z, g, (injection, *tensors), ctx.needs_input_grad[1:])


def _pullback(
    run: _Run, z: Tensor, g: Tensor, inputs: tuple[Tensor, ...], needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of <g, f(z; inputs)> for the inputs that need them, differentiable in everything if grad mode is on."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: the gradient must not leak from z back into the inputs it was computed from.
        state = z.view_as(z) if create_graph else z.detach()
        aliases = [
            t.view_as(t) if create_graph else t.detach().requires_grad_(n) for t, n in zip(inputs, needed, strict=True)
        ]
        y = run.evaluate(state, aliases[0], tuple(aliases[1:]))
        targets = [a for a, n in zip(aliases, needed, strict=True) if n]
        found = torch.autograd.grad(y, targets, g, create_graph=create_graph, allow_unused=True) if targets else ()
    rest = iter(found)
    return tuple(next(rest) if n else None for n in needed)


class _Adjoint(torch.autograd.Function):
    """g = (I - J^T)^{-1} v, differentiable in v, z and the inputs of f."""

    @staticmethod
    def forward(ctx: Any, run: _Run, z: Tensor, v: Tensor, injection: Tensor, *tensors: Tensor) -> Tensor:
        g, report = solve_adjoint(run.map, z, injection, v, run.solver, bounds=run.bounds)
        if run.on_adjoint is not None:
            run.on_adjoint(report)
        ctx.run = run
        ctx.save_for_backward(z, g, injection, *tensors)
        return g

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, g, injection, *tensors = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            w = _Tangent.apply(ctx.run, z, grad, injection, *tensors)
            needs = (ctx.needs_input_grad[1], *ctx.needs_input_grad[3:])
            of_z, *of_inputs = _bilinear_gradients(ctx.run, w, z, g, (injection, *tensors), needs)
            return None, of_z, w, *of_inputs


class _Tangent(torch.autograd.Function):
    """w = (I - J)^{-1} v, the transpose of `_Adjoint`."""

    @staticmethod
    def forward(ctx: Any, run: _Run, z: Tensor, v: Tensor, injection: Tensor, *tensors: Tensor) -> Tensor:
        linear = run.map.linearize(z, injection)
        w, _, _, converged, residual = _solve_linear(linear.matvec, v, run.solver, torch.ones_like(v), None)
        report_failure(
            "tangent of the adjoint", converged, residual, run.solver.tol, run.solver.max_steps, run.solver.on_failure
        )
        ctx.run = run
        ctx.save_for_backward(z, w, injection, *tensors)
        return w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, w, injection, *tensors = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            g = _Adjoint.apply(ctx.run, z, grad, injection, *tensors)
            needs = (ctx.needs_input_grad[1], *ctx.needs_input_grad[3:])
            of_z, *of_inputs = _bilinear_gradients(ctx.run, w, z, g, (injection, *tensors), needs)
            return None, of_z, g, *of_inputs


def _bilinear_gradients(
    run: _Run, w: Tensor, z: Tensor, g: Tensor, inputs: tuple[Tensor, ...], needed: tuple[bool, ...]
) -> list[Tensor | None]:
    """Gradients of <g, J(z, inputs) w> for z and the inputs, at fixed g and w: those of either linear solve."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        state, *aliases = (
            t.view_as(t) if create_graph else t.detach().requires_grad_(n)
            for t, n in zip((z, *inputs), (True, *needed[1:]), strict=True)
        )
        y = run.evaluate(state, aliases[0], tuple(aliases[1:]))
        (jtg,) = torch.autograd.grad(y, state, g, create_graph=True)
        form = (jtg * w).sum()
        targets = [t for t, n in zip((state, *aliases), needed, strict=True) if n]
        found: tuple[Tensor | None, ...] = (None,) * len(targets)
        # A linear cell has a constant Jacobian: then there is nothing to differentiate.
        if targets and form.requires_grad:
            found = torch.autograd.grad(form, targets, create_graph=create_graph, allow_unused=True)
    rest = iter(found)
    return [next(rest) if n else None for n in needed]


# -------------------------------------------------------------------------------------------------------- adjoint solve


def _norm(weights: Tensor, t: Tensor) -> Tensor:
    return (weights * t.abs()).flatten(1).sum(1)


Advance = Callable[[Tensor, Tensor], Tensor]


def _plain(g: Tensor, residual: Tensor) -> Tensor:
    return g + residual


def _accelerated(map: Map, linear: Linearization, v: Tensor) -> Advance:
    """The next g from g and its residual: aggregation with Anderson mixing where the cell has it, else Neumann's."""
    model = Aggregation.of(map, v) if isinstance(map, Chain) and v.numel() else None
    if model is None or not isinstance(linear, ChainLinearization):
        return _plain
    slope, mixing = linear.diagonals[-1], Mixing(3)
    assert slope is not None
    return lambda g, residual: mixing(g, model.correct_adjoint(slope, residual))


def _solve_linear(
    product: Callable[[Tensor], Tensor],
    v: Tensor,
    solver: Solver,
    weights: Tensor,
    kappa: Tensor | None,
    advance: Advance = _plain,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Solve g = A g + v until the error, or without kappa the residual, is at most tol relative to g, for every sample.

    Returns g, the steps, the relative residual, the converged mask, and the relative error estimate used to stop.
    """
    g = v
    batch = len(v)
    steps = torch.zeros(batch, dtype=torch.long, device=v.device)
    residual = v.new_full((batch,), math.inf)
    active = torch.ones(batch, dtype=torch.bool, device=v.device)
    scale = 1.0 if kappa is None else 1 / (1 - kappa)
    tiny = torch.finfo(v.dtype).tiny
    every = CHECK_EVERY if advance is _plain else 1
    for k in range(1, solver.max_steps + 1):
        new = product(g) + v
        if k % every == 0 or k == 1 or k == solver.max_steps:
            size = _norm(weights, new).clamp_min(tiny)
            now = _norm(weights, new - g) / size
            if advance is not _plain and bool((active & (now > residual)).any()):
                # Neumann's steps never leave a larger residual: from here on they are the safe ones.
                advance, every = _plain, CHECK_EVERY
            steps = torch.where(active, k, steps)
            residual = torch.where(active, now, residual)
            active = active & ~(now * scale <= 0.5 * solver.tol) & torch.isfinite(now)
            if not bool(active.any()):
                g = new
                break
        g = new if advance is _plain else advance(g, new - g)
    estimate = residual * scale
    return g, steps, residual, estimate <= solver.tol, estimate


def _weights(linear: Linearization, start: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    """w > 0 and (batch,) kappa with J w <= kappa w, by a few steps of power iteration (Collatz-Wielandt).

    The weights are scaled to a largest entry of 1 per sample.
    """
    w = _scaled(start)
    best, kappa = w, torch.full((len(w),), math.inf, dtype=w.dtype, device=w.device)
    for _ in range(4):
        jw = linear.matvec(w)
        ratio = amax(jw / w) * (1 + rounding)
        better = ratio < kappa
        best, kappa = torch.where(per_sample(better, w), w, best), torch.where(better, ratio, kappa)
        w = _scaled(jw + 0.05 * w)
    return best, kappa


def _scaled(w: Tensor) -> Tensor:
    w = w / per_sample(amax(w), w).clamp_min(torch.finfo(w.dtype).tiny)
    return w.clamp_min(math.sqrt(torch.finfo(w.dtype).tiny))


@torch.no_grad()
def solve_adjoint(
    map: Map,
    z: Tensor,
    injection: Tensor,
    v: Tensor,
    solver: Solver,
    *,
    bounds: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, AdjointSolution]:
    """Solve g = J(z)^T g + v by Neumann steps or faster ones, and bound the error of g where bounds of the fixed point are given.

    Args:
        map: the cell.
        z: (batch, ...) the point of linearisation.
        injection: (batch, ...) b.
        v: (batch, ...) the incoming gradient.
        solver: its tol (relative), max_steps and on_failure.
        bounds: proven lower and upper bounds of the fixed point.

    Returns:
        (g, AdjointSolution).
    """
    linear = map.linearize(z, injection)
    ones = torch.ones_like(v)
    if bounds is None or not isinstance(map, Chain):
        g, steps, residual, converged, _ = _solve_linear(linear.rmatvec, v, solver, ones, None)
        unknown = torch.full_like(residual, math.inf)
        report_failure("adjoint", converged, residual, solver.tol, solver.max_steps, solver.on_failure)
        return g, AdjointSolution(steps, residual, unknown, converged, False)
    proof = _AdjointProof(map, injection, bounds)
    usable = proof.kappa < 1
    weights = torch.where(per_sample(usable, v), proof.weights.to(v.dtype), ones)
    kappa = torch.where(usable, proof.kappa, 0.0).to(v.dtype)
    g, steps, residual, converged, _ = _solve_linear(
        linear.rmatvec, v, solver, weights, kappa, _accelerated(map, linear, v)
    )
    bound = proof.error_bound(g, v)
    report_failure("adjoint", converged, residual, solver.tol, solver.max_steps, solver.on_failure)
    certified = bool(torch.isfinite(bound).all())
    return g, AdjointSolution(steps, residual, bound, converged, certified)


class _AdjointProof:
    """The weighted norm in which J*^T contracts, and the error bound in it; float64, rounding included."""

    def __init__(self, chain: Chain, injection: Tensor, bounds: tuple[Tensor, Tensor]) -> None:
        dtype = torch.float64
        chain, b = chain.to(dtype), injection.to(dtype)
        lower, upper = bounds[0].to(dtype), bounds[1].to(dtype)
        count = sum(s.terms + 4 for s in chain.affine) + 4 * len(chain.steps)
        self.rounding = 4 * gamma(count, dtype)
        self.steep = chain.linearize(lower, b, "upper")
        self.flat = chain.linearize(upper, b, "lower")
        self.weights, self.kappa = _weights(self.steep, lower, self.rounding)

    def error_bound(self, g: Tensor, v: Tensor) -> Tensor:
        """(batch,) bound on ||g - g*||_w / ||g||_w; inf where nothing is proven."""
        g, v = g.double(), v.double()
        size = g.abs()
        steep, flat = self.steep.rmatvec(size), self.flat.rmatvec(size)
        # Any J between flat and steep gives a residual within `spread` of the one at their mean.
        centre = (self.steep.rmatvec(g) + self.flat.rmatvec(g)) / 2
        spread = (steep - flat).abs() / 2 + self.rounding * (steep + size + v.abs())
        total = _norm(self.weights, (v + centre - g).abs() + spread)
        norm = _norm(self.weights, g)
        entries = g[0].numel() if len(g) else 0
        # Underflow of single products, and the roundings of the norms.
        total = total + torch.where(norm > 0, 1e-290 * entries, 0.0)
        bound = total / (1 - self.kappa) / norm * (1 + self.rounding + 8 * entries * unit_roundoff(g.dtype))
        bound = torch.where((norm == 0) & (total == 0), 0.0, bound)
        proven = (self.kappa < 1) & all_finite(g) & torch.isfinite(bound)
        return torch.where(proven, bound, math.inf)
