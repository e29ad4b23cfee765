"""Penalties on the Jacobian J of f at the fixed points of a forward pass: equilibria that are easy to solve for.

    with penalties.observe(model) as states:
        loss = F.cross_entropy(model(x), y)
    loss = loss + 0.1 * sum(penalties.residual_ratio(s).mean() for s in states)

All of them are differentiable functions of the weights, of the injection and, by implicit differentiation, of the fixed
point itself, whose part shares the adjoint equation of the loss. They take a few products with J^T, and no solve.

Sources: Bai, Koltun, Kolter, "Stabilizing equilibrium models by Jacobian regularization", ICML 2021, for the Frobenius
norm; Pal, Ma, Shah, Rackauckas, "Opening the blackbox: accelerating neural differential equations by regularizing internal
solver heuristics", ICML 2021, for penalties on what the solver itself sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from perron._numerics.batch import per_sample
from perron.nn.equilibrium import Equilibrium, State

__all__ = ["PENALTIES", "State", "jacobian", "observe", "picard_steps", "residual_ratio"]

# Beyond this ratio the number of steps goes on along its tangent: at 1 it would be infinite, and without a slope after.
_STEEP = 0.98


@contextmanager
def observe(module: nn.Module) -> Iterator[list[State]]:
    """The `State` of every equilibrium layer in `module`, one for each of its calls inside the `with` block."""
    states: list[State] = []
    layers = [m for m in module.modules() if isinstance(m, Equilibrium)]
    for layer in layers:
        layer._observers.append(states.append)
    try:
        yield states
    finally:
        for layer in layers:
            layer._observers.pop()


class _Transposed:
    """Products with J^T at the fixed point, differentiable."""

    def __init__(self, state: State) -> None:
        with torch.enable_grad():
            value = state.value
            self.z = value if value.requires_grad else value.detach().requires_grad_()
            self.y = state.map(self.z, state.injection)

    def __call__(self, v: Tensor, *, create_graph: bool = True) -> Tensor:
        return torch.autograd.grad(self.y, self.z, v, create_graph=create_graph, retain_graph=True)[0]


def _size(v: Tensor) -> Tensor:
    """(batch,) Euclidean norm of every sample; its gradient is finite at 0."""
    return (v.flatten(1).square().sum(1) + torch.finfo(v.dtype).tiny).sqrt()


def _noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)


def jacobian(state: State, *, samples: int = 1, generator: torch.Generator | None = None) -> Tensor:
    """(batch,) estimates of the squared Frobenius norm of J, divided by the entries of a sample; unbiased (Hutchinson).

    Args:
        state: from `observe`.
        samples: products with J^T that are averaged.
        generator: of the random directions.

    Raises:
        ValueError: samples is below 1.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    transposed = _Transposed(state)
    entries = max(state.value[:1].numel(), 1)
    total = state.value.new_zeros(len(state.value))
    for _ in range(samples):
        total = total + transposed(_noise(state.value, generator)).flatten(1).square().sum(1)
    return total / (samples * entries)


def residual_ratio(
    state: State, *, steps: int = 2, burn_in: int = 4, generator: torch.Generator | None = None
) -> Tensor:
    """(batch,) estimates of the factor by which Picard's steps shrink the residual in the end: the spectral radius of J.

    The geometric mean growth of a vector in the last `steps` of `burn_in + steps` products with J^T; only the last are
    differentiated. Solvers see the same number as the ratio of their residuals, and as the stiffness of the equation.

    Args:
        state: from `observe`.
        steps, burn_in: products.
        generator: of the random beginning.

    Raises:
        ValueError: steps is below 1, or burn_in negative.
    """
    if steps < 1 or burn_in < 0:
        raise ValueError(f"steps must be at least 1 and burn_in not negative, got {steps} and {burn_in}")
    transposed = _Transposed(state)
    u = _noise(state.value, generator)
    for _ in range(burn_in):
        u = transposed(u, create_graph=False).detach()
        u = u / per_sample(_size(u), u)
    start = _size(u)
    for _ in range(steps):
        u = transposed(u)
    return (_size(u) / start) ** (1 / steps)


def picard_steps(
    state: State,
    *,
    tol: float = 1e-4,
    steps: int = 2,
    burn_in: int = 4,
    generator: torch.Generator | None = None,
) -> Tensor:
    """(batch,) estimates of the number of Picard steps to a relative residual of tol: log(tol)/log(residual ratio).

    From a ratio of 0.98 on the tangent, so that maps that do not converge have a finite penalty that falls with the ratio.

    Args:
        state: from `observe`.
        tol: in (0, 1).
        steps, burn_in, generator: of `residual_ratio`.

    Raises:
        ValueError: tol is out of range, or as in `residual_ratio`.
    """
    if not 0 < tol < 1:
        raise ValueError(f"tol must be in (0, 1), got {tol}")
    ratio = residual_ratio(state, steps=steps, burn_in=burn_in, generator=generator)
    inside = math.log(tol) / torch.log(ratio.clamp(1e-6, _STEEP))
    slope = -math.log(tol) / (_STEEP * math.log(_STEEP) ** 2)
    return inside + slope * (ratio - _STEEP).clamp_min(0)


PENALTIES: dict[str, Callable[..., Tensor]] = {
    "jacobian": jacobian,
    "residual_ratio": residual_ratio,
    "picard_steps": picard_steps,
}
"""Penalties by name."""
