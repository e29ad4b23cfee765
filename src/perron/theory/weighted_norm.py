"""Adjoints in a weighted norm: g = J^T g + v, and a bound on the error of g.

For any w > 0 with `|J*| w <= kappa w`, kappa < 1, J* the exact Jacobian, J*^T is a contraction in the norm
`||g||_w = sum_i w_i |g_i|` with factor kappa. With J any matrix near J*, c any candidate and g = J^T c + v,

    ||g - g*||_w <= (kappa ||g - c||_w + sum_i s_i |c_i|)/(1 - kappa),   s at least |J - J*| w.

So the last product, in float64, both proves the candidate and improves on it. How kappa and s come about is a theory's own.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from perron._numerics.batch import all_finite, amax, amin, per_sample
from perron._numerics.rounding import Number, unit_roundoff
from perron.cells.chain import Chain
from perron.cells.jacobian import Jacobian
from perron.cells.map import Linearization
from perron.theory.base import GradientAim, GradientBound

__all__ = [
    "WeightedNormBound",
    "norm",
    "underflow_of_norm",
    "weights_for",
    "weighted_error",
]

# Power steps for the weights: at most so many; the first vector whose kappa is this close to what it can become serves.
_POWER_STEPS, _GOOD = 6, 0.7


def weighted_error(kappa: Number, residual: Number, spread: Number) -> Number:
    """At least ||g - g*||, from ||g - g*|| <= kappa ||c - g*|| + spread and ||c - g*|| <= residual + ||g - g*||, kappa < 1."""
    return (kappa * residual + spread) / (1 - kappa)


def norm(weights: Tensor, t: Tensor) -> Tensor:
    """(batch,) sum_i w_i |t_i|."""
    return torch.linalg.vecdot(weights.flatten(1), t.flatten(1).abs())


class WeightedNormBound(GradientBound):
    """The weighted norm in which J*^T contracts, and the error bound in it, rounding included.

    Attributes:
        exact: the chain in float64.
        weights: w; kappa: (batch,) with |J*| w <= kappa w; spread: at least |J - J*| w.
        underflow: (batch,) what it adds at most to the weighted norm of J^T c, and to the other norms.
        exact_rounding: of the last product and the norms, relative to what is summed.
    """

    improves = True
    exact: Chain
    injection: Tensor
    weights: Tensor
    kappa: Tensor
    spread: Tensor
    underflow: Tensor
    exact_rounding: float

    @abstractmethod
    def linearize(self, z: Tensor) -> Linearization:
        """J near the fixed point, float64."""

    @property
    def contracts(self) -> Tensor:
        """(batch,) whether a weighted norm was found."""
        return self.kappa < 1

    def aim(self, tol: float, v: Tensor) -> GradientAim:
        contracts = self.contracts
        # The residual has to be smaller than the error by so much.
        room = torch.where(contracts, 1 - self.kappa.clamp_max(0.999), 1.0).to(v.dtype)
        # Where no kappa was found the sum of entries serves to stop.
        weights = torch.where(per_sample(contracts, v), self.weights.to(v.dtype), 1.0)
        return GradientAim(goal=0.5 * tol * room, weights=weights, room=room)

    def finish(self, z: Tensor, candidate: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """g, the candidate improved by one product; (batch,) its residual, and the bound on ||g - g*||_w / ||g||_w."""
        c, exact_v, w = candidate.double(), v.double(), self.weights
        exact = self.linearize(z.double()).rmatvec(c) + exact_v
        g = exact.to(v.dtype)
        size, residual = norm(w, g.double()), norm(w, exact - c)
        entries = g[0].numel()
        spread = torch.linalg.vecdot(self.spread.flatten(1), c.flatten(1).abs())
        # Underflow is absolute; the rest is relative to what was summed.
        noise = self.exact_rounding * (norm(w, c) + norm(w, exact) + norm(w, exact_v)) + self.underflow
        rounded = norm(w, exact - g.double()) + self.underflow
        bound = (weighted_error(self.kappa, residual, spread + noise) + rounded) / size
        # The last factor is for the norms themselves.
        bound = bound * (1 + self.exact_rounding + 8 * entries * unit_roundoff(c.dtype))
        # The adjoint of nothing is nothing; a norm of 0 alone may be that of products below the range.
        nothing = (amax(c.abs()) == 0) & (amax(exact_v.abs()) == 0)
        bound = torch.where(nothing, 0.0, bound)
        proven = (self.kappa < 1) & all_finite(g) & torch.isfinite(bound)
        relative = torch.where(size > 0, residual / size, residual)
        return g, relative.to(v.dtype), torch.where(proven, bound, math.inf)


def underflow_of_norm(stages: list[Tensor], count: int) -> Tensor:
    """(batch,) what underflow adds to ||J^T c||_w: an error e below the range at some step counts <e, that step's w>."""
    total = torch.stack([stage.flatten(1).double().sum(1) for stage in stages]).sum(0)
    entries = max(stage[:1].numel() for stage in stages)
    return 8 * (count + entries) * torch.finfo(torch.float64).tiny * (1 + total)


def weights_for(steep: Jacobian, start: Tensor, rounding: float, fixed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """w > 0, J w and (batch,) kappa with J w <= kappa w, by power iteration (Collatz-Wielandt).

    The weights are scaled to a largest entry of 1 per sample.
    """
    w = _scaled(start)
    best, image = w, w
    lost = steep.underflow(w)
    kappa = torch.full((len(w),), math.inf, dtype=w.dtype, device=w.device)
    for k in range(2 if fixed else _POWER_STEPS):
        jw = steep.matvec(w)
        ratio = jw / w
        top = amax(ratio) * (1 + rounding) + 2 * lost / amin(w)
        better = top < kappa
        mask = per_sample(better, w)
        best, image = torch.where(mask, w, best), torch.where(mask, jw, image)
        kappa = torch.where(better, top, kappa)
        # The spectral radius is about the mean of J w / w, weighted by w.
        radius = jw.flatten(1).sum(1) / w.flatten(1).sum(1)
        if not fixed and (k + 1 == _POWER_STEPS or not bool((1 - kappa < _GOOD * (1 - radius)).any())):
            break
        w = _scaled(jw + 0.05 * w)
    return best, image, kappa


def _scaled(w: Tensor) -> Tensor:
    w = w / per_sample(amax(w), w).clamp_min(torch.finfo(w.dtype).tiny)
    return w.clamp_min(math.sqrt(torch.finfo(w.dtype).tiny))
