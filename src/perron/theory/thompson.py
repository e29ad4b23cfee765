"""Thompson's metric: subhomogeneous cells, which contract in it.

d(x, y) = max_i |log x_i - log y_i| on the open orthant. If `|J(z)| z <= mu F(z)` for all z > 0, F contracts with factor mu,
its degree (Sittoni & Tudisco, "Subhomogeneous deep equilibrium models", ICML 2024; Lemmens & Nussbaum 2012). A nonnegative
matrix has degree 1, adding nonnegative constants does not raise it, division by a norm doubles it, and an activation has
sup v sigma'(v)/sigma(v); degrees multiply.

For signed weights the degree of the activation alone proves nothing: tanh(W z) + 1.2 with W = [[10, -10], [-10, 10]] has
two fixed points though it is subhomogeneous of degree below 1. There the weighted norm of `perron.theory.contraction` decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from perron._numerics.batch import all_finite, all_true, amax, amin, per_sample
from perron._numerics.interval import Interval, centre_and_radius
from perron._numerics.rounding import Rounding, product_above
from perron.activations import activation_degree
from perron.cells.chain import Chain
from perron.cells.refusal import Refusal
from perron.theory.base import Batch, Facts, Near, Sign, Solve
from perron.theory.certificate import Certificate, near_one
from perron.theory.contraction import Contractive
from perron.theory.posterior import Posterior, rest

__all__ = [
    "InThompsonsMetric",
    "Thompson",
    "activation_degree",
    "degree",
    "distance",
    "in_thompsons_metric",
]

_TINY = torch.finfo(torch.float64).tiny


def degree(chain: Chain) -> float:
    """mu with |J(z)| z <= mu F(z) for all z > 0 and all nonnegative injections, from the actual weights: that of the steps.

    Raises:
        Refusal: a step is not known, a weight is negative or not finite, or F(z) > 0 could not be verified.
    """
    degrees, least = [1.0], 0.0
    for step in chain.known:
        mu, least = step.degree(least)
        degrees.append(mu)
    if chain.normalizes and not chain.steps[-1].normalizes:
        raise Refusal("Normalize() is only verified as the last step of a cell")
    if not chain.normalizes and least <= 0:
        raise Refusal("F(z) > 0 could not be verified; use a shift, as in 'tanh+1.2'")
    return product_above(degrees)


@dataclass(frozen=True, kw_only=True)
class InThompsonsMetric:
    """By how much F contracts in Thompson's metric, per sample, float64.

    Attributes:
        factor: (batch,) 1 or more, or inf, where there is none.
        rounding: of F for nonnegative weights and injections; infinite for others.
        lower, upper: (batch, ...) the orthant.
    """

    factor: Tensor
    rounding: Rounding
    lower: Tensor
    upper: Tensor

    def select(self, index: Tensor) -> InThompsonsMetric:
        return InThompsonsMetric(
            factor=self.factor[index], rounding=self.rounding, lower=self.lower[index], upper=self.upper[index]
        )

    def enclose(self, z: Tensor, fz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bounds of z* and (batch,) whether they are proven, from z > 0 and the computed F(z)."""
        spread, proven = self.spread(z, fz)
        mask, factor = per_sample(proven, fz), per_sample(torch.exp(spread), fz)
        whole = torch.full_like(fz, math.inf)
        return torch.where(mask, fz / factor, -whole), torch.where(mask, fz * factor, whole), proven & all_finite(fz)

    def spread(self, z: Tensor, fz: Tensor) -> tuple[Tensor, Tensor]:
        """(batch,) a bound on |log(z*/fz)|, and whether it is proven, from z and the computed F(z)."""
        mu, least = self.factor, amin(torch.where(z > 0, fz, 0.0))
        # F = (fz - A)/(1 + r) with |A| <= absolute and |r| <= relative; |log(1 - x)| <= 2 |x| for |x| <= 1/2. The last term
        # covers the rounding of quotients, and of logarithms and exponentials of numbers up to some hundreds.
        share = self.rounding.relative + self.rounding.absolute / least
        slack = 2 * share + 1e-12
        apart = amax(torch.log(fz / z).abs()) + slack
        spread = rest(mu, apart) * (1 + 1e-12) + slack
        return spread, (mu < 1) & (least > 0) & (share < 0.5) & spread.isfinite()


def in_thompsons_metric(chain: Chain, injection: Tensor) -> InThompsonsMetric:
    """How F contracts in Thompson's metric for these injections, (batch, ...) float64; sums of the chain must be rigorous."""
    try:
        mu, rounding = degree(chain), chain.rounding(torch.float64, injection[:1].numel())
    except Refusal:
        mu, rounding = math.inf, Rounding(math.inf, math.inf)
    nonnegative = all_true(injection >= 0)
    unknown = injection.new_full((len(injection),), math.inf)
    return InThompsonsMetric(
        factor=torch.where(nonnegative & (mu < 1), mu, unknown),
        rounding=rounding,
        lower=torch.full_like(injection, torch.finfo(injection.dtype).tiny),
        upper=torch.full_like(injection, math.inf),
    )


def distance(chain: Chain, b: Interval, centre: Tensor) -> Tensor:
    """(batch,) between F(z; b) and F(z; centre), whatever z > 0 and b >= 0 in the box are.

    Raises:
        Refusal: a step is not known, or it is not known what it does to distances.
    """
    place, rest = chain.behind_injection()
    # v + b and v + c are farthest apart, as ratios, where v is least.
    least = chain.steps[place - 1].least * (1 - 1e-12) if place else 0.0
    up, down = (least + b.upper) / (least + centre), (least + centre) / (least + b.lower)
    apart = amax(torch.log(torch.maximum(up, down)))
    for step in rest.steps:
        apart = step.thompson(apart)
    return apart


@dataclass(frozen=True)
class Thompson(Contractive):
    """Nonnegative weights and a degree below 1: F contracts in Thompson's metric, for all nonnegative injections."""

    kind: ClassVar[str] = "subhomogeneous"
    by_sample: ClassVar[bool] = True
    orthant: ClassVar[bool] = True

    def certify(self, chain: Chain, sign: Sign) -> Certificate:
        if sign is Sign.ANY:
            raise Refusal("the injection may have any sign")
        mu = degree(chain)
        if not mu < 1:
            raise Near(
                f"the degree of the cell is only bounded by {near_one(mu)}, not below 1; use a larger shift or a power",
                mu,
            )
        checked = (
            "all weights of the cell are finite and nonnegative",
            f"F is subhomogeneous of degree at most {near_one(mu)} < 1, the product of its activations' degrees"
            + (", doubled by the normalisation" if chain.normalizes else ""),
        )
        return Certificate(
            exists=True,
            unique=True,
            geometric=True,
            kind=self.kind,
            assumptions=checked,
            rate=mu,
            metric="Thompson metric",
        )

    def at(self, batch: Batch) -> Facts:
        return Posterior(batch=batch, known=in_thompsons_metric(batch.map, batch.injection))

    def moved(self, chain: Chain, b: Interval, solve: Solve) -> Interval:
        """From the enclosure at the centre c: with q = mu and D >= d(F(z; b), F(z; c)) for every z, in Thompson's metric,
        d(z*(b), z*(c)) <= q d(z*(b), z*(c)) + D, so at most D/(1 - q).
        """
        centre, _ = centre_and_radius(b)
        found = solve(centre)
        # The quotients and logarithms in D are exact to 1e-12, absolutely.
        apart = (distance(chain, b, centre) + 1e-12) / (1 - degree(chain)) * (1 + 1e-12)
        factor = per_sample(torch.exp(apart) * (1 + 1e-12), centre)
        return found.where_proven(Interval(found.lower / factor, found.upper * factor + _TINY))
