"""What the speed benchmark compares with, on z = tanh(W z + b), W dense or a 3x3 kernel.

Every baseline is a function (cell, b, tol, backward_tol) -> z that attaches its own implicit gradient, and adds what it did
to `counts`. Tolerances are relative residuals, as each library takes them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["BASELINES", "Cell", "counts"]

MAX_STEPS = 400

# Evaluations of f, and products with its transposed Jacobian, since the last clear().
counts: Counter[str] = Counter()


class Cell:
    """f(z) = tanh(W z + b)."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def linear(self, z: Tensor) -> Tensor:
        return F.linear(z, self.weight) if self.weight.dim() == 2 else F.conv2d(z, self.weight, padding=1)

    def __call__(self, z: Tensor, b: Tensor) -> Tensor:
        counts["forward"] += 1
        return torch.tanh(self.linear(z) + b)


Baseline = Callable[[Cell, Tensor, float, float], Tensor]


def hook(cell: Cell, b: Tensor, tol: float, backward_tol: float) -> Tensor:
    """The usual recipe: iterate without graph, evaluate once more with it, solve the adjoint in a backward hook."""
    with torch.no_grad():
        z = _iterate(lambda z: cell(z, b), torch.zeros_like(b), tol)
    if not torch.is_grad_enabled():
        return z
    new = cell(z, b)
    point = z.clone().requires_grad_()
    image = cell(point, b.detach())

    def adjoint(grad: Tensor) -> Tensor:
        def step(g: Tensor) -> Tensor:
            counts["backward"] += 1
            return torch.autograd.grad(image, point, g, retain_graph=True)[0] + grad

        return _iterate(step, grad, backward_tol)

    new.register_hook(adjoint)
    return new


def _iterate(step: Callable[[Tensor], Tensor], z: Tensor, tol: float) -> Tensor:
    for _ in range(MAX_STEPS):
        new = step(z)
        small = (new - z).norm() <= tol * new.norm()
        z = new
        if small:
            break
    return z


def torchdeq(solver: str) -> Baseline:
    """torchdeq with implicit differentiation, the same solver forward and backward."""
    from torchdeq import get_deq

    def solve(cell: Cell, b: Tensor, tol: float, backward_tol: float) -> Tensor:
        deq = get_deq(
            f_solver=solver,
            b_solver=solver,
            f_tol=tol,
            b_tol=backward_tol,
            f_stop_mode="rel",
            b_stop_mode="rel",
            f_max_iter=MAX_STEPS,
            b_max_iter=MAX_STEPS,
            ift=True,
        )
        deq.train(torch.is_grad_enabled())

        def note(info: dict[str, Tensor]) -> None:
            counts["backward"] += round(float(info["nstep"].float().mean()))

        values, _ = deq(lambda z: cell(z, b), torch.zeros_like(b), backward_writer=note)
        return values[-1]

    return solve


BASELINES: dict[str, Callable[[], Baseline]] = {
    "hook": lambda: hook,
    "torchdeq fixed_point_iter": lambda: torchdeq("fixed_point_iter"),
    "torchdeq anderson": lambda: torchdeq("anderson"),
    "torchdeq broyden": lambda: torchdeq("broyden"),
}
