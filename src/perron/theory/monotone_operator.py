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
from typing import ClassVar

import torch
from torch import Tensor

from perron._numerics.batch import all_finite, euclidean, per_sample
from perron._numerics.interval import Interval, centre_and_radius, widened
from perron._numerics.rounding import Number, gamma, unit_roundoff
from perron.cells.affine_map import AffineMap
from perron.cells.chain import Chain
from perron.cells.refusal import Refusal
from perron.cells.step import Step
from perron.theory.base import Batch, Facts, GradientAim, GradientBound, Near, RankOne, Sign, Solve, Theory
from perron.theory.certificate import Certificate, near_one
from perron.theory.contraction import sensitivity, signed_bound
from perron.theory.posterior import Posterior

__all__ = ["MonotoneGradientBound", "MonotoneOperator", "Monotonicity", "margin", "monotonicity", "shift"]

# Residuals below so many units of roundoff are not asked for.
_ROUNDING = 16

_U = 2.0**-53
# More than underflow in the few operations of a proof amounts to.
_TINY = 1e-300


def distance(image: Number, m: Number) -> Number:
    """At least |y - z*|, from m |y - z*|^2 <= <W (z - y), y - z*> <= image |y - z*|, for m > 0."""
    return image / m


def _parts(chain: Chain) -> tuple[AffineMap, Step] | None:
    """W, with its bias, and sigma of a chain sigma(W z + b), or None."""
    steps = chain.known
    if len(steps) != 3 or not steps[0].affine or not steps[1].injects or not steps[2].nonexpansive:
        return None
    return chain.affine[0], steps[2]


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
        sigma: float64.
        norm: a bound on that of W.
        injection: (batch, ..., features) b, float64.
        margin: m > 0.
        underflow: what it adds at most to the error of an entry of W z.
    """

    step: AffineMap
    sigma: Step
    norm: float
    injection: Tensor
    margin: float
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
        sizes = magnitude.affine_image(z.abs()) + self.injection.abs()
        terms = gamma(self.step.terms + 6, torch.float64)
        # Of fz: sigma passes on at most the error of its argument and adds its own.
        error = 2 * terms * sizes + self.sigma.rounding_of_value(fz) + self.underflow
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
    found = -math.inf if parts is None else parts[0].margin()
    if parts is None or not found > 0:
        return None
    step, sigma = parts
    underflow = float(step.underflow(torch.float64)) + _TINY
    return Monotonicity(
        step=step,
        sigma=sigma,
        norm=step.norm(),
        injection=injection,
        margin=found,
        underflow=underflow,
    )


def amplification(norm: Number, m: Number) -> Number:
    """|g* - c| / |r| at most, for m |y|^2 <= <r, y> and |g* - c| <= norm |y| + |r|, m > 0; see `MonotoneGradientBound`."""
    return 1 + norm / m


class MonotoneGradientBound(GradientBound):
    """A bound for cells sigma(W z + b) with I - W strongly monotone, however large J is; in the Euclidean norm.

    With the residual r = W^T D* c + v - c at the exact slopes D*, e = g* - c solves e = W^T D* e + r. For y = D* e that
    says m |y|^2 <= <(I - W^T) y, y> + <(1/D* - 1) y, y> = <r, y>, hence |e| <= (1 + |W|/m) |r|.
    """

    improves = False

    def __init__(self, chain: Chain, injection: Tensor, bounds: tuple[Tensor, Tensor], least: float) -> None:
        rigorous = chain.to(torch.float64).rigorous()
        assert rigorous is not None
        self.exact, self.injection = rigorous, injection.double()
        lower, upper = (t.double() for t in bounds)
        steep, flat, _ = sensitivity(rigorous, self.injection, lower, upper)
        self.steepest, self.flattest = steep.slope, flat.slope
        (step,) = rigorous.affine
        self.step, self.norm = step, step.norm()
        self.underflow = lower[:1].numel() * step.underflow(torch.float64) + 1e-290
        self.amplification = amplification(self.norm, least) * (1 + 1e-12)

    def aim(self, tol: float, v: Tensor) -> GradientAim:
        # The bound is so many times the residual; what rounding keeps the steps from is not asked of them.
        goal = max(0.25 * tol / self.amplification, _ROUNDING * unit_roundoff(v.dtype))
        return GradientAim(goal=goal, weights=None, room=1.0)

    def finish(self, z: Tensor, candidate: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The candidate; (batch,) its relative residual, and the bound on |candidate - g*| / |candidate|."""
        c, v = candidate.double(), v.double()
        slope = self.exact.linearize_steps(z.double(), self.injection).slope
        summed = self.step.magnitude().transpose(slope * c.abs(), c.shape) + v.abs() + c.abs()
        r = self.step.transpose(slope * c, c.shape) + v - c
        # Any slope will do: what it is away from the exact one is bounded over the whole enclosure.
        away = torch.maximum(self.steepest - slope, slope - self.flattest).clamp_min(0) * c.abs()
        rounding = 2 * gamma(self.step.terms + 8, c.dtype)
        size, norms = euclidean(c), 1 + gamma(c[:1].numel() + 16, c.dtype)
        total = euclidean(r) + rounding * euclidean(summed) + self.norm * euclidean(away) + self.underflow
        bound = self.amplification * total / size * norms**2
        relative = torch.where(size > 0, euclidean(r) / size, euclidean(r))
        bound = torch.where((size == 0) & (euclidean(v) == 0), 0.0, bound)
        return candidate, relative.to(candidate.dtype), torch.where(all_finite(c) & bound.isfinite(), bound, math.inf)


@dataclass(frozen=True)
class MonotoneOperator(Theory):
    """sigma(W z + b) with I - W strongly monotone: one fixed point for every b, which operator splitting reaches."""

    kind: ClassVar[str] = "monotone operator"
    splits: ClassVar[bool] = True

    def certify(self, chain: Chain, sign: Sign) -> Certificate:
        least = margin(chain)
        if not least > -math.inf:
            raise Refusal(
                "the cell is not of the form sigma(W z + b) with a nonexpansive sigma and a W of known margin"
            )
        if not least > 0:
            raise Near(
                f"the symmetric part of W has eigenvalues up to {near_one(1 - least)}, not below 1 "
                "(MonotoneLinear keeps them there)",
                1 - least,
            )
        checked = (
            f"I - W is strongly monotone with margin at least {least:.6g} > 0",
            "the activation is nondecreasing with slopes up to 1",
        )
        return Certificate(
            exists=True, unique=True, geometric=True, kind=self.kind, assumptions=checked, method="operator splitting"
        )

    def at(self, batch: Batch) -> Facts:
        known = monotonicity(batch.map, batch.injection)
        if known is None:
            raise Refusal("I - W is not strongly monotone")
        return Posterior(batch=batch, known=known)

    def bound_gradient(
        self, chain: Chain, injection: Tensor, bounds: tuple[Tensor, Tensor], *, model: RankOne | None, fixed: bool
    ) -> GradientBound | None:
        by_norm = signed_bound(chain, injection, bounds, fixed=fixed)
        if by_norm is None or bool(by_norm.contracts.all()) or not (least := margin(chain)) > 0:
            return by_norm
        return MonotoneGradientBound(chain, injection, bounds, least)

    def moved(self, chain: Chain, b: Interval, solve: Solve) -> Interval:
        """m |z*(b) - z*(c)|^2 <= <b - c, z*(b) - z*(c)>, so |z*(b) - z*(c)| <= |b - c|/m in the Euclidean norm."""
        centre, radius = centre_and_radius(b)
        found = solve(centre)
        reach = per_sample(shift(chain, radius), centre)
        return found.where_proven(widened(found.lower - reach, found.upper + reach, 4 * _U))


def shift(chain: Chain, radius: Tensor) -> Tensor:
    """(batch,) how far the fixed point moves, in every entry, while b does by at most `radius`."""
    return euclidean(radius) / margin(chain) * (1 + gamma(radius[:1].numel() + 16, torch.float64))
