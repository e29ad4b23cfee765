"""The weighted sup norm: cells that contract in it, with weights of any sign.

In the norm max_i |x_i|/w_i: if `|J(z)| w <= kappa w` on a box that F maps into itself, F contracts there with factor kappa.
This is never worse than the degree on the box (`perron.theory.thompson`): that condition, `|J(z)| hi <= mu lo`, is the case
w = hi, less sharply.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from perron._numerics.batch import amax, amin, per_sample
from perron._numerics.interval import Interval, centre_and_radius, widened
from perron._numerics.rounding import gamma, product_above
from perron.cells.chain import Chain
from perron.cells.jacobian import Factor, Jacobian
from perron.cells.map import Linearization
from perron.cells.refusal import Refusal
from perron.theory.base import Batch, Facts, GradientBound, Near, RankOne, Sign, Solve, Theory
from perron.theory.certificate import Certificate, near_one
from perron.theory.perron_vector import Majorant
from perron.theory.posterior import Posterior, rest
from perron.theory.weighted_norm import WeightedNormBound, underflow_of_norm, weights_for

__all__ = [
    "BoundedGain",
    "Contractive",
    "InWeightedNorm",
    "SignedGradientBound",
    "gain",
    "in_weighted_norm",
    "norm_of_gain",
    "sensitivity",
    "shift",
    "signed_bound",
]

# Rounds that shrink the invariant box, and power steps for the weights of the norm, and least weights that are tried.
_SHRINKINGS, _POWER_STEPS = 6, 8
_FLOORS = (1.0, 0.1, 1e-2, 1e-3, 1e-5, 1e-9)
_U = 2.0**-53


@dataclass(frozen=True, kw_only=True)
class InWeightedNorm:
    """By how much F contracts in a weighted sup norm on a box, per sample, float64.

    Attributes:
        factor: (batch,) inf where there is none.
        weights: (batch, ...) w of the norm.
        lower, upper: (batch, ...) the box, which F maps into itself; it contains every fixed point.
        error: (batch, ...) bound on the rounding of F on the box, absolute.
    """

    factor: Tensor
    weights: Tensor
    lower: Tensor
    upper: Tensor
    error: Tensor

    def select(self, index: Tensor) -> InWeightedNorm:
        return InWeightedNorm(**{k: v[index] for k, v in vars(self).items()})

    def enclose(self, z: Tensor, fz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bounds of z* and (batch,) whether they are proven, whether F(z) was computed with `error` or without."""
        q, error = self.factor, torch.nan_to_num(self.error, nan=math.inf)
        # 1 - q is exact from 1/2 on, and rounded once below.
        distance = amax(((fz - z).abs() + error) / self.weights) * (1 + 8 * _U)
        radius = rest(q, distance) * (1 + 8 * _U)
        proven = (q < 1) & radius.isfinite() & (amax(error) < math.inf)
        reach = per_sample(torch.where(proven, radius, math.inf), fz) * self.weights + error
        reach = reach * (1 + 4 * _U) + 4 * _U * fz.abs()
        return fz - reach, fz + reach, proven


def in_weighted_norm(chain: Chain, injection: Tensor) -> InWeightedNorm:
    """How F contracts for these injections, (batch, ...) float64, on the smallest box found; sums of the chain must be rigorous.

    Raises:
        Refusal: a step is not known.
    """
    box = _invariant_box(chain, injection)
    if box is None:
        whole, unknown = torch.full_like(injection, math.inf), injection.new_full((len(injection),), math.inf)
        return InWeightedNorm(
            factor=unknown, weights=torch.ones_like(injection), lower=-whole, upper=whole, error=whole
        )
    lower, upper = box
    steep, _, error = sensitivity(chain, injection, lower, upper)
    factor, weights = _weighted(steep, upper - lower, chain.roundings)
    if not bool((factor < 1).all()) and (norm := norm_of_gain(chain)).factor < 1:
        # The slopes here are no larger than those that it was found with.
        serves = ~(factor < norm.factor)
        factor = torch.where(serves, norm.factor, factor)
        weights = torch.where(per_sample(serves, weights), norm.over(weights), weights)
    return InWeightedNorm(factor=factor, weights=weights, lower=lower, upper=upper, error=error)


def gain(chain: Chain) -> float:
    """A bound on the factor of F in the sup norm on the whole space, for every injection; inf where there is none.

    The product of absolute row sums and largest slopes, each rounded up; F(z) = kappa z + b attains it.

    Raises:
        Refusal: a step is not known.
    """
    return product_above(itertools.chain([largest_slope(chain)], (float(a.row_sums()) for a in chain.affine)))


def largest_slope(chain: Chain) -> float:
    """The product of the largest slopes of the elementwise steps, on the whole line; inf where a step divides by a norm.

    Raises:
        Refusal: a step is not known.
    """
    return product_above(step.largest_slope for step in chain.known)


@dataclass(frozen=True, kw_only=True)
class NormOfGain:
    """A weighted sup norm in which F contracts on the whole space, for every injection.

    Attributes:
        factor: inf where there is none.
        weights: (n,) of channels or features, or None for ones.
        majorant: what bounds differences of F.
    """

    factor: float
    weights: Tensor | None = None
    majorant: Majorant | None = None

    def over(self, like: Tensor) -> Tensor:
        """The weights, shaped like a batch of states."""
        if self.weights is None or self.majorant is None:
            return torch.ones_like(like)
        return self.majorant.over(self.weights, like)


def norm_of_gain(chain: Chain) -> NormOfGain:
    """The sup norm where F contracts in it, else the one that a Perron vector of the majorant of F weights.

    |F(x) - F(y)| <= L |A_K| ... |A_1| |x - y| entrywise, L the product of the largest slopes; with `L |A_K| ... |A_1| w <=
    kappa w`, w > 0, a distance of at most d w becomes one of at most kappa d w. F(z) = kappa z + b attains it. For one matrix
    kappa can be as small as L rho(|W|), whatever the row sums of |W| are.

    Raises:
        Refusal: a step is not known.
    """
    factor = gain(chain)
    if factor < 1 or not factor < math.inf:
        return NormOfGain(factor=factor)
    try:
        majorant = Majorant.of(chain, largest_slope(chain))
        found = majorant.perron_vector(below_one=True)
        if not found.factor < 1:
            return NormOfGain(factor=min(factor, found.factor))
    except Refusal:
        return NormOfGain(factor=factor)
    # As flat as it can be, since a residual counts most where w is small.
    trials = [found.weights.clamp_min(floor) for floor in (*_FLOORS, 0.0)]
    factors = [majorant.factor(w) for w in trials]
    costs = [k / (1 - k) / float(w.min()) if k < 1 else math.inf for k, w in zip(factors, trials, strict=True)]
    best = min(range(len(trials)), key=costs.__getitem__)
    return NormOfGain(factor=factors[best], weights=trials[best], majorant=majorant)


def _invariant_box(chain: Chain, injection: Tensor) -> tuple[Tensor, Tensor] | None:
    """A box that F maps into itself, which contains every fixed point; None where none was found.

    From a box B with F(B) in B: B and the hull of F(B) meet in a box that F maps into itself, too.
    """
    if chain.normalizes:
        return None
    box = _range_box(chain, injection)
    box = _ball(chain, injection) if box is None else box
    if box is None:
        return None
    lower, upper = box
    for _ in range(_SHRINKINGS):
        low, high = _over(chain, injection, lower, upper, 0)
        lower, upper = torch.maximum(low, lower), torch.minimum(high, upper)
    return lower, upper


def _range_box(chain: Chain, injection: Tensor) -> tuple[Tensor, Tensor] | None:
    """The range of the last bounded step, if no sum follows it."""
    for k in range(len(chain.steps) - 1, -1, -1):
        step = chain.steps[k]
        if step.affine:
            return None
        if math.isfinite(step.supremum):
            box = step.range(injection)
            return None if box is None else _over(chain, injection, *box, k + 1)
    return None


def _ball(chain: Chain, injection: Tensor) -> tuple[Tensor, Tensor] | None:
    """|z| <= |F(0)|/(1 - kappa) in the norm in which F contracts on the whole space, 0 <= kappa < 1.

    From |F(z)| <= |F(0)| + kappa |z|: F maps this ball into itself, and F(z) = kappa z + b has its fixed point on it.
    """
    norm = norm_of_gain(chain)
    if not norm.factor < 1:
        return None
    # F(0) with its rounding, which cancelling sums may make larger than F(0) itself.
    zero = torch.zeros_like(injection)
    low, high = _over(chain, injection, zero, zero, 0)
    size = torch.maximum(low.abs(), high.abs())
    weights = None if norm.weights is None else norm.over(injection)
    radius = amax(size if weights is None else size / weights) / (1 - norm.factor) * (1 + 1e-12) + 1e-290
    ball = per_sample(radius, injection).expand_as(injection)
    ball = ball if weights is None else ball * weights * (1 + 1e-15) + 1e-300
    return -ball, ball


def _over(chain: Chain, injection: Tensor, lower: Tensor, upper: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Bounds of what the steps from `start` on make of a box."""
    for step in chain.known[start:]:
        lower, upper = step.over(lower, upper, injection)
    return lower, upper


def sensitivity(chain: Chain, injection: Tensor, lower: Tensor, upper: Tensor) -> tuple[Jacobian, Jacobian, Tensor]:
    """What is known of J on a box, float64.

    Returns:
        |A| with the largest slopes, which bounds |J(z)| for every z in the box; |A| with the smallest; and the rounding of F
        on the box, absolute and entrywise.

    Raises:
        Refusal: a step is not known, or divides by a norm.
    """
    steep: list[Factor] = []
    flat: list[Factor] = []
    error = torch.zeros_like(lower)
    for step in chain.known:
        found = step.reach(lower, upper, error, injection)
        lower, upper, error = found.lower, found.upper, found.error + 1e-300
        steep += found.steep
        flat += found.flat
    return Jacobian(tuple(steep)), Jacobian(tuple(flat)), error


def _weighted(steep: Jacobian, start: Tensor, terms: int) -> tuple[Tensor, Tensor]:
    """(batch,) kappa < 1 with |J| w <= kappa w, and w, where one was found; inf elsewhere.

    Power iteration (Collatz-Wielandt) looks for the least kappa; then w is made as flat as kappa allows, since a residual
    counts most where w is small. Whatever w > 0 is, max |J| w/w is a factor; one product of nonnegative numbers gives it,
    with a relative error of gamma(terms) and what underflow takes.
    """
    w = start / per_sample(amax(start).clamp_min(1e-300), start) + _FLOORS[-1]
    for _ in range(_POWER_STEPS):
        w = steep.matvec(w) + 0.05 * w
        w = w / per_sample(amax(w).clamp_min(1e-300), w) + _FLOORS[-1]
    best, kappa = w, torch.full((len(w),), math.inf, dtype=w.dtype, device=w.device)
    cost, lost = kappa, steep.underflow(w)
    for floor in _FLOORS:
        trial = w.clamp_min(floor)
        top = amax(steep.matvec(trial) / trial) * (1 + 2 * gamma(terms + 4, w.dtype)) + 2 * lost / amin(trial)
        # NaN compares false.
        now = torch.where(top < 1, top / (1 - top) * amax(1 / trial), math.inf)
        better = now < cost
        best = torch.where(per_sample(better, w), trial, best)
        kappa, cost = torch.where(better, top, kappa), torch.where(better, now, cost)
    return kappa, best


class SignedGradientBound(WeightedNormBound):
    """|J| is bounded over the whole enclosure, and so is its variation in it."""

    def __init__(
        self,
        chain: Chain,
        injection: Tensor,
        bounds: tuple[Tensor, Tensor],
        *,
        fixed: bool = False,
    ) -> None:
        self.exact, self.injection = chain.to(torch.float64), injection
        count = chain.roundings
        self.rounding = self.exact_rounding = 4 * gamma(count, torch.float64)
        lower, upper = (t.double() for t in bounds)
        steep, flat, _ = sensitivity(self.exact, injection.double(), lower, upper)
        self.weights, _, self.kappa = weights_for(steep, torch.ones_like(lower), self.rounding, fixed)
        if not bool(self.contracts.all()) and (norm := norm_of_gain(chain)).weights is not None:
            weights, _, kappa = weights_for(steep, norm.over(lower), self.rounding, fixed)
            self.weights = torch.where(per_sample(kappa < self.kappa, weights), weights, self.weights)
            self.kappa = torch.minimum(kappa, self.kappa)
        self.spread = steep.variation(flat, self.weights) * (1 + self.rounding)
        self.underflow = underflow_of_norm(steep.stages(self.weights), count)

    def linearize(self, z: Tensor) -> Linearization:
        return self.exact.linearize(z, self.injection.double())


def signed_bound(
    chain: Chain, injection: Tensor, bounds: tuple[Tensor, Tensor], *, fixed: bool = False
) -> SignedGradientBound | None:
    """The bound of gradients where the Jacobian is one of diagonals and matrices; division by a norm has none."""
    return None if chain.normalizes else SignedGradientBound(chain, injection, bounds, fixed=fixed)


class Contractive(Theory):
    """A theory of cells whose Jacobian may have negative entries."""

    def bound_gradient(
        self, chain: Chain, injection: Tensor, bounds: tuple[Tensor, Tensor], *, model: RankOne | None, fixed: bool
    ) -> GradientBound | None:
        return signed_bound(chain, injection, bounds, fixed=fixed)


@dataclass(frozen=True)
class BoundedGain(Contractive):
    """Absolute row sums, weighted by a Perron vector where that helps, times the largest slopes, below 1: F contracts in the
    (weighted) sup norm, for weights and injections of any sign.
    """

    kind: ClassVar[str] = "bounded gain"
    by_sample: ClassVar[bool] = True

    def certify(self, chain: Chain, sign: Sign) -> Certificate:
        norm = norm_of_gain(chain)
        if not norm.factor < 1:
            raise Near(
                f"absolute row sums times largest slopes are {near_one(gain(chain))}, not below 1 "
                "(weights='signed_bounded' keeps them there)",
                norm.factor,
            )
        what = "absolute row sums" if norm.weights is None else "absolute row sums, weighted by a Perron vector,"
        return Certificate(
            exists=True,
            unique=True,
            geometric=True,
            kind=self.kind,
            assumptions=(f"{what} times largest slopes are at most {near_one(norm.factor)} < 1",),
            rate=norm.factor,
            metric="sup norm" if norm.weights is None else "weighted sup norm",
        )

    def at(self, batch: Batch) -> Facts:
        return Posterior(batch=batch, known=in_weighted_norm(batch.map, batch.injection))

    def moved(self, chain: Chain, b: Interval, solve: Solve) -> Interval:
        """With L the gain of what follows the injection, |F(z; b) - F(z; c)| <= L |b - c| for every z, and so
        |z*(b) - z*(c)| <= L |b - c|/(1 - kappa), all in the norm in which F contracts.
        """
        centre, radius = centre_and_radius(b)
        found = solve(centre)
        reach = shift(chain, radius)
        return found.where_proven(widened(found.lower - reach, found.upper + reach, 4 * _U))


def shift(chain: Chain, radius: Tensor) -> Tensor:
    """(batch, ...) how far the fixed point moves while b does by at most `radius`."""
    norm, behind = norm_of_gain(chain), chain.behind_injection()[1]
    if norm.weights is None or norm.majorant is None:
        return per_sample(gain(behind) * amax(radius) / (1 - norm.factor) * (1 + 8 * _U), radius).expand_as(radius)
    weights = norm.over(radius)
    passed = norm.majorant.behind_injection(largest_slope(behind)).factor(norm.weights)
    # A quotient below the range has no digits.
    apart = amax(radius / weights + torch.finfo(radius.dtype).tiny)
    moved = passed * apart / (1 - norm.factor) * (1 + 16 * _U)
    return per_sample(moved, radius) * weights * (1 + 4 * _U) + torch.finfo(radius.dtype).tiny
