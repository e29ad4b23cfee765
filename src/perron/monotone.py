"""Cells sigma(W z + b) with I - W strongly monotone (monDEQ), for sigma nondecreasing and nonexpansive.

Source: Winston, Kolter, "Monotone operator equilibrium networks", NeurIPS 2020 (arXiv 2006.08591). Such a sigma is the
proximal operator of a convex function h, and z = sigma(W z + b) says 0 in (I - W) z - b + dh(z): with
x^T (I - W) x >= m |x|^2, m > 0, there is exactly one such z, whatever b is.

One evaluation y = sigma(W z + b) anywhere bounds the distance to it. W z + b - y lies in dh(y), W z* + b - z* in dh(z*),
and dh is monotone, so <(I - W)(y - z*), y - z*> <= <W (z - y), y - z*> and

    |y - z*| <= |W (y - z)|/m    in the Euclidean norm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from perron._batch import all_finite, per_sample
from perron.activations import Activation
from perron.affine import DenseStep
from perron.cells import ActivationStep, Chain, InjectStep
from perron.rounding import gamma

__all__ = ["Monotonicity", "margin", "monotonicity"]

_U = 2.0**-53


def nonexpansive(activation: Activation) -> bool:
    """Whether it is known to be nondecreasing with slopes up to 1 on the whole line."""
    if activation.inner is not None:
        base, _, power = activation.inner
        return power == 1 and nonexpansive(base)
    return activation.below_zero is not None and activation.slope_at_zero <= 1


def _parts(chain: Chain) -> tuple[DenseStep, Activation] | None:
    """W and sigma of a chain sigma(W z + b), or None."""
    kinds = [type(s) for s in chain.steps]
    if kinds != [DenseStep, InjectStep, ActivationStep]:
        return None
    step, activation = chain.steps[0], chain.last_activation
    assert isinstance(step, DenseStep)
    assert activation is not None
    square = step.weight.dim() == 2 and step.weight.shape[0] == step.weight.shape[1]
    return (step, activation) if square and nonexpansive(activation) else None


@torch.no_grad()
def margin(chain: Chain) -> float:
    """A rigorous lower bound on m = min x^T (I - W) x / |x|^2, from the actual W; -inf for cells of another form.

    The eigenvalues of the symmetric part in float64, less a bound on their error: the backward error of the
    decomposition is some u |S|, and n^2 covers what depends on the size (Higham 2002, ch. 20, with room).
    """
    parts = _parts(chain)
    if parts is None:
        return -math.inf
    weight = parts[0].weight.detach().double()
    n = len(weight)
    if not bool(torch.isfinite(weight).all()) or n == 0:
        return -math.inf
    symmetric = torch.eye(n, dtype=torch.float64, device=weight.device) - (weight + weight.t()) / 2
    least = float(torch.linalg.eigvalsh(symmetric)[0])
    return least - (n * n + 16) * _U * float(symmetric.norm())


@dataclass(frozen=True)
class Monotonicity:
    """The margin of a cell, and what the enclosure of its fixed points takes.

    Attributes:
        weight: W, float64.
        bias: of the affine step, or None.
        injection: (batch, ..., features) b, float64.
        margin: m > 0.
        ulps: of sigma.
        offset: what the rounding of sigma is relative to, beyond its value.
    """

    weight: Tensor
    bias: Tensor | None
    injection: Tensor
    margin: float
    ulps: int
    offset: float

    @property
    def factor(self) -> Tensor:
        """(batch,) such that factor/(1 - factor) times the residual bounds the error."""
        gain = float(self.weight.norm()) / self.margin
        return torch.full(
            (len(self.injection),), gain / (1 + gain), dtype=self.injection.dtype, device=self.weight.device
        )

    @property
    def lower(self) -> Tensor:
        return torch.full_like(self.injection, -math.inf)

    @property
    def upper(self) -> Tensor:
        return torch.full_like(self.injection, math.inf)

    def select(self, index: Tensor) -> Monotonicity:
        return replace(self, injection=self.injection[index])

    def enclose(self, z: Tensor, fz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bounds of z* and (batch,) whether they are proven, from z and the computed sigma(W z + b), float64."""
        sizes = z.abs() @ self.weight.abs().t() + self.injection.abs()
        if self.bias is not None:
            sizes = sizes + self.bias.abs()
        terms = gamma(self.weight.shape[1] + 6, torch.float64)
        error = 2 * terms * sizes + 2 * self.ulps * _U * (fz.abs() + self.offset) + 1e-300
        moved = fz - z
        # W acts on the last dimension; over all of them together it has the same margin.
        image = _norm(moved @ self.weight.t())
        slack = terms * _norm(moved.abs() @ self.weight.abs().t())
        radius = (image + 2 * slack + float(self.weight.norm()) * (1 + 1e-12) * _norm(error)) / self.margin
        radius = radius * (1 + gamma(fz[:1].numel() + 16, torch.float64))
        reach = (per_sample(radius, fz) + error) * (1 + 4 * _U) + 4 * _U * fz.abs()
        proven = all_finite(fz) & radius.isfinite() & all_finite(self.injection)
        return fz - reach, fz + reach, proven


def _norm(t: Tensor) -> Tensor:
    """(batch,) Euclidean norm of every sample."""
    return t.flatten(1).norm(dim=1)


@torch.no_grad()
def monotonicity(chain: Chain, injection: Tensor) -> Monotonicity | None:
    """The monotonicity of a float64 chain with plain sums, or None where no positive margin was verified."""
    found, parts = margin(chain), _parts(chain)
    if parts is None or not found > 0:
        return None
    step, activation = parts
    base, shift, _ = activation.inner or (activation, 0.0, 1.0)
    offset = shift + 2 * base.at_zero
    return Monotonicity(step.weight, step.bias, injection, found, activation.ulps, offset)
