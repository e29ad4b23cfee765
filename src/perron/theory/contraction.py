"""Cells that contract, though they are not nondecreasing and concave: subhomogeneous ones, and those of bounded gain.

Two metrics, two factors (Sittoni & Tudisco, "Subhomogeneous deep equilibrium models", ICML 2024; Lemmens & Nussbaum 2012):

* Thompson's metric d(x, y) = max_i |log x_i - log y_i| on the open orthant. If `|J(z)| z <= mu F(z)` for all z > 0, F
  contracts with factor mu, its degree. A nonnegative matrix has degree 1, adding nonnegative constants does not raise
  it, division by a norm doubles it, and an activation has sup v sigma'(v)/sigma(v); degrees multiply.
* The weighted sup norm max_i |x_i|/w_i. If `|J(z)| w <= kappa w` on a box that F maps into itself, F contracts there with
  factor kappa, for weights of any sign. This is never worse than the degree on the box: that condition,
  `|J(z)| hi <= mu lo`, is the case w = hi, less sharply.

For signed weights the degree of the activation alone proves nothing: tanh(W z) + 1.2 with W = [[10, -10], [-10, 10]] has
two fixed points though it is subhomogeneous of degree below 1. There the second factor decides, sample by sample.

From either factor q and one evaluation, the distance of z* from F(z) is at most q d(z, F(z))/(1 - q).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from perron._numerics.batch import all_finite, all_true, amax, amin, per_sample
from perron._numerics.rounding import Number, Rounding, gamma, product_above
from perron.activations import Activation, get_activation
from perron.cells.activation import ActivationStep
from perron.cells.chain import Chain, ChainLinearization, Step, unknown_step
from perron.cells.injection import InjectStep
from perron.cells.normalization import LEAST_NORMALIZED, NormalizeStep
from perron.cells.step import AffineStep, Refusal

__all__ = ["Contraction", "activation_degree", "contraction", "degree", "gain", "sensitivity", "underflow", "variation"]

_GRID = 400_000
# Rounds that shrink the invariant box, and power steps for the weights of the norm, and least weights that are tried.
_SHRINKINGS, _POWER_STEPS = 6, 8
_FLOORS = (1.0, 0.1, 1e-2, 1e-3, 1e-5, 1e-9)
_U = 2.0**-53


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


def rest(q: Number, d: Number) -> Number:
    """At least d(F(z), z*), from d = d(z, F(z)) and d(F(z), z*) <= q d(z, z*) <= q (d + d(F(z), z*)), for 0 <= q < 1."""
    return q / (1 - q) * d


@dataclass(frozen=True, kw_only=True)
class Contraction:
    """By how much F contracts, per sample, in float64.

    Attributes:
        thompson: (batch,) factor in Thompson's metric on the whole orthant, 1 or more where there is none.
        supremum: (batch,) factor in the weighted sup norm on the box; inf where there is none.
        weights: (batch, ...) w of that norm.
        lower, upper: (batch, ...) the box, which F maps into itself; it contains every fixed point.
        error: (batch, ...) bound on the rounding of F on the box, absolute.
        rounding: of F for nonnegative weights and injections; infinite for others.
    """

    thompson: Tensor
    supremum: Tensor
    weights: Tensor
    lower: Tensor
    upper: Tensor
    error: Tensor
    rounding: Rounding

    @property
    def factor(self) -> Tensor:
        """(batch,) the better of both."""
        return torch.minimum(self.supremum, self.thompson)

    def select(self, index: Tensor) -> Contraction:
        parts: dict[str, Any] = {k: v[index] for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **parts)

    def enclose(self, z: Tensor, fz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bounds of z* and (batch,) whether they are proven, from z in the box and the computed F(z), float64."""
        low, high, by_norm = self._by_norm(z, fz)
        spread, by_degree = self._by_degree(z, fz)
        # Without the degree a sample may have any sign, and 0 is no lower bound of it.
        mask, factor = per_sample(by_degree, fz), per_sample(torch.exp(spread), fz)
        low = torch.where(mask, torch.maximum(low, fz / factor), low)
        high = torch.where(mask, torch.minimum(high, fz * factor), high)
        return low, high, (by_norm | by_degree) & all_finite(fz)

    def _by_norm(self, z: Tensor, fz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bounds in the weighted norm, whether F(z) was computed with `error` or without."""
        q, error = self.supremum, torch.nan_to_num(self.error, nan=math.inf)
        # 1 - q is exact from 1/2 on, and rounded once below.
        distance = amax(((fz - z).abs() + error) / self.weights) * (1 + 8 * _U)
        radius = rest(q, distance) * (1 + 8 * _U)
        proven = (q < 1) & radius.isfinite() & (amax(error) < math.inf)
        reach = per_sample(torch.where(proven, radius, math.inf), fz) * self.weights + error
        reach = reach * (1 + 4 * _U) + 4 * _U * fz.abs()
        return fz - reach, fz + reach, proven

    def _by_degree(self, z: Tensor, fz: Tensor) -> tuple[Tensor, Tensor]:
        """(batch,) a bound on |log(z*/fz)| in Thompson's metric, and whether it is proven."""
        mu, least = self.thompson, amin(torch.where(z > 0, fz, 0.0))
        # F = (fz - A)/(1 + r) with |A| <= absolute and |r| <= relative; |log(1 - x)| <= 2 |x| for |x| <= 1/2. The last term
        # covers the rounding of quotients, and of logarithms and exponentials of numbers up to some hundreds.
        share = self.rounding.relative + self.rounding.absolute / least
        slack = 2 * share + 1e-12
        apart = amax(torch.log(fz / z).abs()) + slack
        spread = rest(mu, apart) * (1 + 1e-12) + slack
        return spread, (mu < 1) & (least > 0) & (share < 0.5) & spread.isfinite()


@torch.no_grad()
def contraction(chain: Chain, injection: Tensor) -> Contraction:
    """How F contracts for these injections, (batch, ...) float64; sums of the chain must be rigorous.

    Thompson's metric where the weights are nonnegative and the injection too; else, or where its factor is not below 1,
    the weighted sup norm on the smallest box found.

    Raises:
        Refusal: the chain is no known map of a space into itself.
    """
    chain.sizes()
    try:
        mu, rounding = degree(chain), chain.rounding(torch.float64, injection[:1].numel())
    except Refusal:
        mu, rounding = math.inf, Rounding(math.inf, math.inf)
    unknown = torch.full((len(injection),), math.inf, dtype=injection.dtype, device=injection.device)
    whole, ones = torch.full_like(injection, math.inf), torch.ones_like(injection)
    nonnegative = all_true(injection >= 0)
    if mu < 1 and bool((nonnegative | ~all_finite(injection)).all()):
        least = torch.full_like(injection, torch.finfo(injection.dtype).tiny)
        return Contraction(
            thompson=torch.where(nonnegative, mu, unknown),
            supremum=unknown,
            weights=ones,
            lower=least,
            upper=whole,
            error=whole,
            rounding=rounding,
        )
    thompson = torch.where(nonnegative & (mu < 1), mu, unknown)
    box = _invariant_box(chain, injection)
    if box is None:
        return Contraction(
            thompson=thompson, supremum=unknown, weights=ones, lower=-whole, upper=whole, error=whole, rounding=rounding
        )
    lower, upper = box
    steep, _, error = sensitivity(chain, injection, lower, upper)
    factor, weights = _weighted(steep, upper - lower, sum(s.terms + 4 for s in chain.affine) + 4 * len(chain.steps))
    return Contraction(
        thompson=thompson, supremum=factor, weights=weights, lower=lower, upper=upper, error=error, rounding=rounding
    )


def gain(chain: Chain) -> float:
    """A bound on the factor of F in the sup norm on the whole space, for every injection; inf where there is none.

    The product of absolute row sums and largest slopes, each rounded up; F(z) = kappa z + b attains it.

    Raises:
        Refusal: a step is not known.
    """
    factors: list[float] = []
    line = torch.full((1,), math.inf, dtype=torch.float64)
    for step in chain.known:
        if isinstance(step, AffineStep):
            factors.append(float(step.row_sums()))
        elif isinstance(step, ActivationStep):
            factors.append(float(step.activation.steepest(-line, line)))
        elif isinstance(step, NormalizeStep):
            return math.inf
        elif not isinstance(step, InjectStep):
            raise unknown_step(step)
    return product_above(factors)


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
    """The range of the last bounded activation, if no sum follows it."""
    bounded = [k for k, s in enumerate(chain.steps) if isinstance(s, ActivationStep) and s.activation.bounded]
    if not bounded or any(isinstance(s, AffineStep) for s in chain.steps[bounded[-1] :]):
        return None
    activation = chain.steps[bounded[-1]].activation  # type: ignore[union-attr]
    if math.isnan(activation.infimum):
        return None
    lower = torch.full_like(injection, activation.infimum - 1e-12 * (1 + abs(activation.infimum)))
    upper = torch.full_like(injection, activation.supremum * (1 + 1e-12))
    return _over(chain, injection, lower, upper, bounded[-1] + 1)


def _ball(chain: Chain, injection: Tensor) -> tuple[Tensor, Tensor] | None:
    """|z| <= |F(0)|/(1 - kappa) in the sup norm, where F contracts on the whole space, 0 <= kappa < 1.

    From |F(z)| <= |F(0)| + kappa |z|: F maps this ball into itself, and F(z) = kappa z + b has its fixed point on it.
    """
    kappa = gain(chain)
    if not kappa < 1:
        return None
    # F(0) with its rounding, which cancelling sums may make larger than F(0) itself.
    zero = torch.zeros_like(injection)
    low, high = _over(chain, injection, zero, zero, 0)
    radius = amax(torch.maximum(low.abs(), high.abs())) / (1 - kappa) * (1 + 1e-12) + 1e-290
    ball = per_sample(radius, injection).expand_as(injection)
    return -ball, ball


def _over(chain: Chain, injection: Tensor, lower: Tensor, upper: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Bounds of what the steps from `start` on make of a box."""
    for step in chain.known[start:]:
        lower, upper = _step_over(step, injection, lower, upper)
    return lower, upper


def _step_over(step: Step, injection: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(step, AffineStep):
        return step.over(lower, upper)
    if isinstance(step, InjectStep):
        low, high = step(lower, injection), step(upper, injection)
        return low - 2 * _U * low.abs(), high + 2 * _U * high.abs()
    if isinstance(step, ActivationStep):
        slack = _activation_error(step.activation, lower, upper)
        return step(lower) - slack, step(upper) + slack
    if isinstance(step, NormalizeStep):
        raise Refusal("division by a norm is not nondecreasing: no box is known")
    raise unknown_step(step)


def _activation_error(activation: Activation, lower: Tensor, upper: Tensor) -> Tensor:
    """Absolute rounding of the activation for arguments between these; not finite where it is not known."""
    base, shift, power = activation.inner or (activation, 0.0, 1.0)
    low, high = base(lower), base(upper)
    size = torch.maximum(low.abs(), high.abs()) + 2 * base.at_zero
    error = 2 * base.ulps * _U * size + 1e-300
    if activation.inner is None:
        return error
    error = error + 2 * _U * (size + shift)
    if power == 1:
        return error
    # A power is steep next to zero. NaN where base + shift may be negative.
    least = low + shift - 2 * error
    return power * least.pow(power - 1) * error + 128 * _U * (high + shift + 2 * error).pow(power)


def sensitivity(
    chain: Chain, injection: Tensor, lower: Tensor, upper: Tensor
) -> tuple[ChainLinearization, tuple[Tensor | None, ...], Tensor]:
    """What is known of J on a box, float64.

    Returns:
        |A| and the largest slopes, as an operator that bounds |J(z)| for every z in the box; the smallest slopes, one for
        each step; and the rounding of F on the box, absolute and entrywise: an error e of v leaves A v with at most
        |A| e + gamma (|A| (|v| + e) + |c|), and sigma(v) with at most the largest slope times e, and with its own.

    Raises:
        Refusal: a step is not known, or divides by a norm.
    """
    largest: list[Tensor | None] = []
    smallest: list[Tensor | None] = []
    shapes: list[torch.Size] = []
    error = torch.zeros_like(lower)
    for step in chain.known:
        shapes.append(lower.shape)
        steep = flat = None
        if isinstance(step, AffineStep):
            magnitude = step.magnitude()
            size = torch.maximum(lower.abs(), upper.abs())
            # gamma |A| e is in the last factor.
            error = (magnitude.linear(error) + gamma(step.terms + 4, lower.dtype) * magnitude(size)) * (1 + 1e-9)
            error = error + step.underflow(lower.dtype)
        elif isinstance(step, ActivationStep):
            # Widened by the error of its argument.
            steep = step.activation.steepest(lower - error, upper + error)
            flat = step.activation.flattest(lower - error, upper + error)
            error = steep * error * (1 + 1e-12) + _activation_error(step.activation, lower - error, upper + error)
        lower, upper = _step_over(step, injection, lower, upper)
        if isinstance(step, InjectStep):
            error = error + 2 * _U * torch.maximum(lower.abs(), upper.abs())
        error = error + 1e-300
        largest.append(steep)
        smallest.append(flat)
    steps = tuple(s.magnitude() if isinstance(s, AffineStep) else s for s in chain.steps)
    return ChainLinearization(steps, tuple(shapes), tuple(largest)), tuple(smallest), error


def variation(steep: ChainLinearization, smallest: tuple[Tensor | None, ...], w: Tensor) -> Tensor:
    """At least |J(x) - J(y)| w for x, y in the box of `sensitivity`, w >= 0, but for rounding.

    With u = J_k(x) w and u' = J_k(y) w so far, |u| <= w and |u - u'| <= change, slopes d, d' in [least, most] give
    |d u - d' u'| <= d' |u - u'| + |d - d'| |u| <= most change + (most - least) w; attained by one step of slopes most, least.
    """
    change = torch.zeros_like(w)
    for step, most, least in zip(steep.steps, steep.diagonals, smallest, strict=True):
        if isinstance(step, AffineStep):
            w, change = step.linear(w), step.linear(change)
        elif isinstance(step, ActivationStep) and most is not None and least is not None:
            w, change = most * w, most * change + (most - least) * w
        elif not isinstance(step, InjectStep):
            raise Refusal(f"the slopes of a {type(step).__name__} are not known")
    return change


def underflow(steep: ChainLinearization, w: Tensor) -> Tensor:
    """(batch,) what it takes at most from an entry of |J| w: a number below the range may meet large weights later."""
    lost, first = w.new_zeros(len(w)), True
    for step, diagonal in zip(steep.steps, steep.diagonals, strict=True):
        if isinstance(step, AffineStep):
            passed = lost if first else 2 * step.row_sums() * lost
            lost, first = passed + step.underflow(w.dtype), False
        elif diagonal is not None:
            lost, first = 2 * amax(diagonal) * lost + torch.finfo(w.dtype).tiny, False
    return lost


def _weighted(steep: ChainLinearization, start: Tensor, terms: int) -> tuple[Tensor, Tensor]:
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
    cost, lost = kappa, underflow(steep, w)
    for floor in _FLOORS:
        trial = w.clamp_min(floor)
        top = amax(steep.matvec(trial) / trial) * (1 + 2 * gamma(terms + 4, w.dtype)) + 2 * lost / amin(trial)
        # NaN compares false.
        now = torch.where(top < 1, top / (1 - top) * amax(1 / trial), math.inf)
        better = now < cost
        best = torch.where(per_sample(better, w), trial, best)
        kappa, cost = torch.where(better, top, kappa), torch.where(better, now, cost)
    return kappa, best
