"""Differentiation through a fixed point z* = f(z*; b, theta), by the implicit function theorem.

Reverse mode: with J = df/dz at z*, the adjoint of an incoming gradient v solves `g = J^T g + v`; then the gradients of
b and theta are those of one evaluation of f with cotangent g. Forward mode: the tangent solves `w = J w + df`. Both
linear solves are differentiable functions themselves, each the transpose of the other, so that derivatives of any order
and mode come out right, under `torch.autograd` and `torch.func` alike. Memory does not depend on the number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from perron._numerics.rounding import flushes_subnormals
from perron._numerics.transforms import VmapInfo, fold_vmap, refuse_nested_forward_mode
from perron.cells.chain import Chain
from perron.gradients.base import Call, Gradient, Pose
from perron.problem import Cell
from perron.solution import AdjointSolution, Solution
from perron.solvers.adjoint import solve_adjoint, solve_tangent
from perron.solvers.base import Solver
from perron.theory.base import Theory

__all__ = ["Implicit"]


@dataclass(frozen=True)
class Implicit(Gradient):
    """The derivatives of the exact fixed point, to the tolerance of the solver, with a bound where one is known.

    The solver's `tol`, `max_steps` and `on_failure` also rule the linear equations. Under torch.func.vmap the Solution is
    that of the whole batch, vmapped dimension first.

    Raises:
        NotImplementedError: forward mode nested in forward mode.
        ValueError: the cell depends on a tensor whose gradient would be lost.
    """

    def solve(self, call: Call) -> tuple[Tensor, Solution]:
        refuse_nested_forward_mode()
        map, injection, z0 = call.map, call.injection, call.z0
        if torch.is_grad_enabled():
            map = map.with_kept(torch.zeros_like(injection) if z0 is None else z0, injection)
        # The graph must not hang on the map's own tensors: they come back through saved_tensors.
        run = _Run(map.rebind([t.detach() for t in map.tensors]), call.solver, call.pose, call.on_adjoint)
        value, _, _ = _FixedPoint.apply(run, z0, injection, *map.tensors)
        # Weights under vmap are one problem each.
        solution = Solution.joined(run.solutions)
        run.solutions = []
        return value, solution


@dataclass
class _Run:
    """What the autograd functions of one call share."""

    map: Cell
    solver: Solver
    pose: Pose
    on_adjoint: Callable[[AdjointSolution], None] | None
    solutions: list[Solution] = field(default_factory=list)
    theories: list[Theory | None] = field(default_factory=list)

    @property
    def theory(self) -> Theory | None:
        """What is proven of the map, if it is the same for all weights that a vmap has."""
        return self.theories[0] if len(set(self.theories)) == 1 else None

    def evaluate(self, z: Tensor, injection: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        return self.map.rebind(tensors)(z, injection)


class _FixedPoint(torch.autograd.Function):
    """(z0, b, theta) -> z* and its bounds; bounds without entries where nothing is proven."""

    @staticmethod
    def forward(run: _Run, z0: Tensor | None, injection: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        map = run.map.rebind(tensors)
        problem = run.pose(map, injection)
        solution = run.solver.solve(problem) if z0 is None else run.solver.solve(problem, z0)
        run.solutions.append(solution.detach())
        value = solution.value.clone()
        run.theories.append(problem.theory)
        bounded = run.theory is not None and solution.certified
        if not bounded or solution.lower is None or solution.upper is None:
            none = value.new_empty(len(value), 0)
            return value, none, none.clone()
        return value, solution.lower, solution.upper

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.run, _, *rest = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output, *rest)
        ctx.save_for_forward(*output, *rest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        z, lower, upper, injection, *tensors = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            g = _Adjoint.apply(ctx.run, z, lower, upper, grad, injection, *tensors)
            needed = ctx.needs_input_grad[2:]
            return None, None, *_pullback(ctx.run, z, g, injection, tensors, needed)

    @staticmethod
    def jvp(ctx: Any, _run: None, _z0: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        z, lower, upper, *inputs = ctx.saved_tensors
        with torch.autocast(z.device.type, enabled=False):
            moved = _pushforward(lambda b, *t: ctx.run.evaluate(z, b, t), inputs, tangents)
            return _Tangent.apply(ctx.run, z, lower, upper, moved, *inputs), None, None

    @staticmethod
    def vmap(info: VmapInfo, in_dims: Any, run: _Run, *arguments: Tensor | None) -> tuple[Any, Any]:
        return _folded(_FixedPoint, info, in_dims, run, arguments, 2)


class _Adjoint(torch.autograd.Function):
    """g = (I - J^T)^{-1} v, J taken at z; differentiable in z, v, b and theta."""

    @staticmethod
    def forward(
        run: _Run, z: Tensor, lower: Tensor, upper: Tensor, v: Tensor, injection: Tensor, *tensors: Tensor
    ) -> Tensor:
        proven = lower.shape == z.shape and z.numel() > 0 and not flushes_subnormals()
        bounds = (lower, upper) if proven else None
        own = getattr(run.solver, "solve_adjoint", None)
        solve = partial(solve_adjoint, solver=run.solver) if own is None else own
        g, report = solve(run.map.rebind(tensors), z, injection, v, bounds=bounds, theory=run.theory)
        if run.on_adjoint is not None:
            run.on_adjoint(report)
        return g.clone() if g is v else g

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save_linear(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, lower, upper, g, injection, *tensors = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            w = _Tangent.apply(ctx.run, z, lower, upper, grad, injection, *tensors)
            of_z, *of_inputs = _bilinear_gradients(ctx.run, g, w, z, injection, tensors)
            return None, of_z, None, None, w, *of_inputs

    @staticmethod
    def jvp(ctx: Any, _run: None, z_t: Tensor | None, _l: None, _u: None, v_t: Tensor | None, *rest: Tensor) -> Tensor:
        z, lower, upper, g, *inputs = ctx.saved_tensors
        run = ctx.run
        with torch.autocast(z.device.type, enabled=False):

            def transposed(state: Tensor, b: Tensor, *t: Tensor) -> Tensor:
                return _vjp(lambda s: run.evaluate(s, b, t), state)[1](g)[0]

            moved = _pushforward(transposed, (z, *inputs), (z_t, *rest))
            moved = moved if v_t is None else moved + v_t
            return _Adjoint.apply(run, z, lower, upper, moved, *inputs)

    @staticmethod
    def vmap(info: VmapInfo, in_dims: Any, run: _Run, *arguments: Tensor) -> tuple[Any, Any]:
        return _folded(_Adjoint, info, in_dims, run, arguments, 5)


class _Tangent(torch.autograd.Function):
    """w = (I - J)^{-1} v, the transpose of `_Adjoint`."""

    @staticmethod
    def forward(
        run: _Run, z: Tensor, lower: Tensor, upper: Tensor, v: Tensor, injection: Tensor, *tensors: Tensor
    ) -> Tensor:
        w = solve_tangent(run.map.rebind(tensors), z, injection, v, run.solver, run.theory)
        return w.clone() if w is v else w

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _save_linear(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, lower, upper, w, injection, *tensors = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            g = _Adjoint.apply(ctx.run, z, lower, upper, grad, injection, *tensors)
            of_z, *of_inputs = _bilinear_gradients(ctx.run, g, w, z, injection, tensors)
            return None, of_z, None, None, g, *of_inputs

    @staticmethod
    def jvp(ctx: Any, _run: None, z_t: Tensor | None, _l: None, _u: None, v_t: Tensor | None, *rest: Tensor) -> Tensor:
        z, lower, upper, w, *inputs = ctx.saved_tensors
        run = ctx.run
        with torch.autocast(z.device.type, enabled=False):

            def along(state: Tensor, b: Tensor, *t: Tensor) -> Tensor:
                return _pushforward(lambda s: run.evaluate(s, b, t), (state,), (w,))

            moved = _pushforward(along, (z, *inputs), (z_t, *rest))
            moved = moved if v_t is None else moved + v_t
            return _Tangent.apply(run, z, lower, upper, moved, *inputs)

    @staticmethod
    def vmap(info: VmapInfo, in_dims: Any, run: _Run, *arguments: Tensor) -> tuple[Any, Any]:
        return _folded(_Tangent, info, in_dims, run, arguments, 5)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    run, z, lower, upper, _, *rest = inputs
    ctx.run = run
    ctx.save_for_backward(z, lower, upper, output, *rest)
    ctx.save_for_forward(z, lower, upper, output, *rest)


def _folded(
    function: type[torch.autograd.Function], info: VmapInfo, in_dims: Any, run: _Run, arguments: Any, batched: int
) -> tuple[Any, Any]:
    """The vmap rule of all three: the first `batched` arguments have a batch, the tensors of the map serve all of it."""
    shared = range(batched, len(arguments))
    return fold_vmap(lambda *a: function.apply(run, *a), info, in_dims[1:], arguments, shared=shared)


def _pullback(
    run: _Run, z: Tensor, g: Tensor, injection: Tensor, tensors: Sequence[Tensor], needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of <g, f(z; b, theta)> for b and theta, where needed; differentiable in everything."""
    map = run.map.rebind(tensors)
    if isinstance(map, Chain):
        return map.pullback(z, injection, g, needed)
    found = _vjp(lambda b, *t: run.evaluate(z, b, t), injection, *tensors)[1](g)
    return tuple(t if n else None for t, n in zip(found, needed, strict=True))


def _vjp(function: Callable[..., Tensor], *primals: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, ...]]]:
    """`torch.func.vjp`; outside of transforms by plain autograd, which a cell may use inside itself, too."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return torch.func.vjp(function, *primals)[:2]
    with torch.enable_grad():
        # Views: a primal may be made of another one, whose gradient is of its own place in the function only.
        views = [p.view_as(p) for p in primals]
        inputs = [v if v.requires_grad else v.detach().requires_grad_() for v in views]
        value = function(*inputs)

    def pull(g: Tensor) -> tuple[Tensor, ...]:
        if not value.requires_grad:
            return tuple(torch.zeros_like(p) for p in inputs)
        again = torch.is_grad_enabled()
        found = torch.autograd.grad(value, inputs, g, retain_graph=True, create_graph=again, allow_unused=True)
        return tuple(torch.zeros_like(p) if t is None else t for t, p in zip(found, inputs, strict=True))

    return value, pull


def _pushforward(
    function: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor | None]
) -> Tensor:
    """The derivative of a function along tangents (None: zero), as the transpose of its transpose.

    Forward-mode levels do not nest inside a jvp rule; reverse-mode ones do.
    """
    moving = [k for k, t in enumerate(tangents) if t is not None]
    some = [t for t in tangents if t is not None]

    def restricted(*moved: Tensor) -> Tensor:
        every = list(primals)
        for k, t in zip(moving, moved, strict=True):
            every[k] = t
        return function(*every)

    value, pull = _vjp(restricted, *[primals[k] for k in moving])

    def along(u: Tensor) -> Tensor:
        # Linear in u: its gradient is the derivative along the tangents.
        return torch.stack([(p * t).sum() for p, t in zip(pull(u), some, strict=True)]).sum()

    return _vjp(along, torch.zeros_like(value))[1](torch.ones_like(value.sum()))[0]


def _bilinear_gradients(
    run: _Run, g: Tensor, w: Tensor, z: Tensor, injection: Tensor, tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Gradients of <g, J(z, b, theta) w> for z, b and theta, at fixed g and w: those of either linear solve."""

    def form(state: Tensor, b: Tensor, *t: Tensor) -> Tensor:
        (image,) = _vjp(lambda s: run.evaluate(s, b, t), state)[1](g)
        return (image * w).sum()

    value, pull = _vjp(form, z, injection, *tensors)
    return pull(torch.ones_like(value))
