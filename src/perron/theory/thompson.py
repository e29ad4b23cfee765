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
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from perron._numerics.batch import all_finite, all_true, amax, amin, per_sample
from perron._numerics.interval import Interval, centre_and_radius
from perron._numerics.rounding import Rounding, product_above
from perron.activations import Activation, get_activation
from perron.cells.activation import ActivationStep
from perron.cells.chain import Chain, unknown_step
from perron.cells.injection import InjectStep
from perron.cells.normalization import LEAST_NORMALIZED, NormalizeStep
from perron.cells.step import AffineStep, Refusal
from perron.theory.base import Batch, Facts, Near, Sign, Solve
from perron.theory.certificate import Certificate, near_one
from perron.theory.contraction import Contractive
from perron.theory.posterior import Posterior, rest

__all__ = [
    "InThompsonsMetric",
    "Thompson",
    "activation_degree",
    "check_nonnegative",
    "degree",
    "distance",
    "in_thompsons_metric",
]

_GRID = 400_000
_U = 2.0**-53
_TINY = torch.finfo(torch.float64).tiny


@cache
def _degree_of(activation: Activation, signed: bool) -> float:
    """sup p |v| b'(v)/(b(v) + s) of (b + s)^p, from a grid 0 = v_0 < ... < v_N; b is nondecreasing, and concave for v >= 0.

    * on [v_k, v_k+1], k >= 1: at most v_k+1 b'(v_k)/(b(v_k) + s);
    * on [0, v_1]: v b'(v) <= b(v) - b(0), and (b - b(0))/(b + s) rises with b;
    * beyond v_N: v b'(v) <= 2 (b(v) - b(v/2)) <= 2 (sup b - b(v_N/2)), over at least b(v_N) + s; for b unbounded 1 will
      do, from v b'(v) <= b(v) - b(0);
    * for v = -t and b odd about b(0): b'(v) = b'(t), and b(v) = 2 b(0) - b(t) falls with t, to 2 b(0) - sup b.

    Slopes are taken larger and what they are divided by smaller by their rounding: differences have lost digits.
    """
    base, shift, power = activation.inner or (activation, 0.0, 1.0)
    v = torch.cat([torch.zeros(1, dtype=torch.float64), torch.logspace(-6, 6, _GRID, dtype=torch.float64)])
    value = base(v)
    slope = base.derivative(v) + 2 * base.ulps * _U * base.slope_at_zero
    lost = 2 * (base.ulps + 2) * _U * (value.abs() + 2 * abs(base.at_zero) + shift)
    above = value + shift - lost
    near = (value[1] - base.at_zero + lost[1]) / above[1]
    tail = 2 * (base.supremum - base(v[-1:] / 2) + lost[-1]).clamp_min(0)[0] if base.bounded else above[-1]
    found = [(v[2:] * slope[1:-1] / above[1:-1]).max(), near, tail / above[-1]]
    if signed:
        if base.below_zero != "odd":
            return math.inf
        below, least = 2 * base.at_zero - value + shift - lost, 2 * base.at_zero - base.supremum + shift - lost[-1]
        if not bool((below > 0).all()) or not least > 0:
            return math.inf
        found += [(v[1:] * slope[:-1] / below[1:]).max(), tail / least]
    # What is left are a few roundings of positive numbers.
    return power * max(float(t) for t in found) * (1 + 1e-12)


def activation_degree(activation: str | Activation, *, signed: bool = False) -> float:
    """A rigorous upper bound on sup |v sigma'(v)|/sigma(v) over v > 0, or over all v.

    By monotonicity of sigma and of its slope on the cells of a grid; at most a relative 1e-4 above the supremum.

    Raises:
        ValueError: the activation is not one of `perron.activations`.

    >>> round(activation_degree("tanh+1.3", signed=True), 3)
    0.791
    >>> activation_degree("sigmoid^0.5") <= 0.5
    True
    """
    return _degree_of(get_activation(activation), signed)


def degree(chain: Chain) -> float:
    """mu with |J(z)| z <= mu F(z) for all z > 0 and all nonnegative injections, from the actual weights.

    Matrices A >= 0 have A z <= A z + c, so degree 1; so has v -> v + b. v/|v|_p has 2: with g = log v its logarithm moves
    by dg_i - sum_j s_j dg_j with s_j = v_j^p/sum v^p, at most 2 max |dg|, attained in the limit.

    Raises:
        Refusal: a step is not known, a weight is negative or not finite, or F(z) > 0 could not be verified.
    """
    degrees, least = [1.0], 0.0
    for step in chain.known:
        if isinstance(step, AffineStep):
            check_nonnegative(step)
            bias = step.bias
            least = float(bias.min()) if bias is not None and bias.numel() else 0.0
        elif isinstance(step, ActivationStep):
            # Never more than 1, as sigma is concave with sigma(0) >= 0.
            degrees.append(min(activation_degree(step.activation), 1.0))
            least = step.activation.at_zero
        elif isinstance(step, NormalizeStep):
            if least < LEAST_NORMALIZED:
                raise Refusal(
                    "what is divided by its norm must have a positive lower bound; use a shift, as in 'tanh+1.2'"
                )
            if not step.p >= 1 or not (step.dim is None or step.dim >= 1):
                raise Refusal(f"no norm of a sample is known with p = {step.p} over dimension {step.dim}")
            degrees.append(2.0)
            least = 0.0
        elif not isinstance(step, InjectStep):
            raise unknown_step(step)
    if chain.normalizes and not isinstance(chain.steps[-1], NormalizeStep):
        raise Refusal("Normalize() is only verified as the last step of a cell")
    if not chain.normalizes and least <= 0:
        raise Refusal("F(z) > 0 could not be verified; use a shift, as in 'tanh+1.2'")
    return product_above(degrees)


def check_nonnegative(step: AffineStep) -> None:
    """Raise Refusal unless all tensors of the step are finite and nonnegative."""
    signs = step.signs
    if signs is None:
        raise Refusal("an affine step has negative entries whatever its weights are")
    for name, tensor in (*(("weight", w) for w in signs), ("bias", step.bias)):
        if tensor is None or tensor.numel() == 0:
            continue
        low, high = (float(t) for t in torch.aminmax(tensor.detach()))
        if not (low > -math.inf and high < math.inf):
            raise Refusal(f"the {name} of an affine step is not finite")
        if low < 0:
            raise Refusal(f"the {name} of an affine step has the entry {low:.3g}; it must be nonnegative")


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

    Affine steps with nonnegative entries do not enlarge it, activations multiply it by their degree, and division by a norm
    at most doubles it: d(x/|x|, y/|y|) <= d(x, y) + |log(|x|/|y|)|.
    """
    place, rest = chain.behind_injection()
    before = chain.steps[place - 1] if place else None
    # v + b and v + c are farthest apart, as ratios, where v is least.
    least = before.activation.at_zero * (1 - 1e-12) if isinstance(before, ActivationStep) else 0.0
    up, down = (least + b.upper) / (least + centre), (least + centre) / (least + b.lower)
    apart = amax(torch.log(torch.maximum(up, down)))
    for step in rest.steps:
        if isinstance(step, ActivationStep):
            apart = apart * min(activation_degree(step.activation), 1.0)
        elif isinstance(step, NormalizeStep):
            apart = apart * 2
        elif not isinstance(step, AffineStep):
            raise Refusal(f"what a {type(step).__name__} does to distances is not known")
    return apart


@dataclass(frozen=True)
class Thompson(Contractive):
    """Nonnegative weights and a degree below 1: F contracts in Thompson's metric, for all nonnegative injections."""

    kind: ClassVar[str] = "subhomogeneous"
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
