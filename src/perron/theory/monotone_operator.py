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

from perron._numerics.batch import all_finite, euclidean, per_sample
from perron._numerics.rounding import Number, gamma
from perron.activations import Activation
from perron.cells.chain import Chain
from perron.cells.injection import InjectStep
from perron.cells.step import AffineStep

__all__ = ["Monotonicity", "margin", "monotonicity"]

_U = 2.0**-53
# More than underflow in the few operations of a proof amounts to.
_TINY = 1e-300


def distance(image: Number, m: Number) -> Number:
    """At least |y - z*|, from m |y - z*|^2 <= <W (z - y), y - z*> <= image |y - z*|, for m > 0."""
    return image / m


def nonexpansive(activation: Activation) -> bool:
    """Whether it is known to be nondecreasing with slopes up to 1 on the whole line."""
    if activation.inner is not None:
        base, _, power = activation.inner
        return power == 1 and nonexpansive(base)
    return activation.below_zero is not None and activation.slope_at_zero <= 1


def _parts(chain: Chain) -> tuple[AffineStep, Activation] | None:
    """W, with its bias, and sigma of a chain sigma(W z + b), or None."""
    steps = chain.known
    if len(steps) != 3 or not isinstance(steps[0], AffineStep) or not isinstance(steps[1], InjectStep):
        return None
    activation = chain.last_activation
    return (steps[0], activation) if activation is not None and nonexpansive(activation) else None


@torch.no_grad()
def margin(chain: Chain) -> float:
    """A rigorous lower bound on m = min x^T (I - W) x / |x|^2, from the actual W; -inf for cells of another form."""
    parts = _parts(chain)
    return -math.inf if parts is None else parts[0].margin()


@dataclass(frozen=True, kw_only=True)
class Monotonicity:
    """The margin of a cell, and what the enclosure of its fixed points takes.

    Attributes:
        step: z -> W z, with its bias, float64 with rigorous sums.
        norm: a bound on that of W.
        injection: (batch, ..., features) b, float64.
        margin: m > 0.
        ulps: of sigma.
        offset: what the rounding of sigma is relative to, beyond its value.
        underflow: what it adds at most to the error of an entry of W z.
    """

    step: AffineStep
    norm: float
    injection: Tensor
    margin: float
    ulps: int
    offset: float
    underflow: float

    @property
    def factor(self) -> Tensor:
        """(batch,) such that factor/(1 - factor) times the residual bounds the error."""
        gain = self.norm / self.margin
        return torch.full_like(self.injection.flatten(1)[:, 0], gain / (1 + gain))

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
        magnitude = self.step.magnitude()
        sizes = magnitude(z.abs()) + self.injection.abs()
        terms = gamma(self.step.terms + 6, torch.float64)
        # Of fz: sigma passes on at most the error of its argument and adds its own.
        error = 2 * terms * sizes + 2 * self.ulps * _U * (fz.abs() + self.offset) + self.underflow
        moved = fz - z
        image = euclidean(self.step.linear(moved))
        slack = terms * euclidean(magnitude.linear(moved.abs()))
        # |W (y - z)| with y within `error` of fz, and with the rounding of fz - z and of the product.
        radius = distance(
            image + 2 * slack + self.norm * euclidean(error) + fz[:1].numel() * self.underflow, self.margin
        )
        radius = radius * (1 + gamma(fz[:1].numel() + 16, torch.float64)) + _TINY
        reach = (per_sample(radius, fz) + error) * (1 + 4 * _U) + 4 * _U * fz.abs()
        proven = all_finite(fz) & radius.isfinite() & all_finite(self.injection)
        return fz - reach, fz + reach, proven


@torch.no_grad()
def monotonicity(chain: Chain, injection: Tensor) -> Monotonicity | None:
    """The monotonicity of a float64 chain with rigorous sums, or None where no positive margin was verified."""
    parts = _parts(chain)
    if parts is None or not injection.numel():
        return None
    step, activation = parts
    found = step.margin()
    if not found > 0:
        return None
    base, shift, _ = activation.inner or (activation, 0.0, 1.0)
    offset = shift + 2 * base.at_zero
    underflow = float(step.underflow(torch.float64)) + _TINY
    return Monotonicity(
        step=step,
        norm=step.norm(),
        injection=injection,
        margin=found,
        ulps=activation.ulps,
        offset=offset,
        underflow=underflow,
    )
