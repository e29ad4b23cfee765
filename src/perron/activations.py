"""Scalar activations, each with the facts the proofs use.

A positive concave cell needs activations that are nonnegative, nondecreasing and concave on [0, inf). Such a function
satisfies `sigma(a v) <= a sigma(v)` for a >= 1, so a relative error of its argument is never amplified: the whole
rounding analysis of `perron.theory.enclosure` rests on that. Every fact below is tested numerically.

The class is closed under adding a constant and taking a power up to 1, so "tanh+1.2" and "(tanh+1.2)^0.5" are
activations as well; their facts are computed from those of tanh.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "Activation", "activation_degree", "get_activation", "sigmoid_derivative"]

_SQRT_SHIFT = 0.25
_U = 2.0**-53
# Points of the grid on which a degree is bounded.
_GRID = 400_000
# Of the supremum and the infimum of a composite, outwards.
_ROUNDING = 2.0**-50


@dataclass(frozen=True, kw_only=True)
class Activation:
    """A nonnegative, nondecreasing, concave function on [0, inf) and what is known of it.

    Attributes:
        name: the field's name of the function.
        function: the function itself, elementwise on tensors of any shape.
        derivative: its derivative on [0, inf), elementwise (at a kink, the derivative from the right).
        at_zero: sigma(0).
        supremum: sup of sigma over [0, inf), possibly inf.
        asymptotic_slope: lim sigma(t)/t for t to infinity.
        slope_at_zero: sigma'(0), the largest slope.
        derivative_of_value: sigma'(v) as a function of sigma(v), where there is an accurate one: nonincreasing, and with
            the rounding that `ulps` allows.
        smooth: whether the slope is continuous on (0, inf). Where it jumps, a value that was rounded does not give it, and
            proofs take it from the argument instead.
        below_zero: what is known of sigma(v) for v < 0: "odd", 2 sigma(0) - sigma(-v); "flat", sigma(0); None, nothing.
        inner: for (sigma + shift)^power the parts (sigma, shift, power).
        ulps: bound on the relative rounding error of `function`, and on the absolute one of `derivative` divided by
            `slope_at_zero`, in units of the unit roundoff. Twice what was measured at worst against 50 digits.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    at_zero: float
    supremum: float
    asymptotic_slope: float
    slope_at_zero: float
    derivative_of_value: Callable[[Tensor], Tensor] | None = None
    smooth: bool = True
    below_zero: Literal["odd", "flat"] | None = None
    inner: tuple[Activation, float, float] | None = None
    ulps: int = 12

    def __call__(self, v: Tensor) -> Tensor:
        return self.function(v)

    @property
    def bounded(self) -> bool:
        return math.isfinite(self.supremum)

    @property
    def infimum(self) -> float:
        """inf of sigma over the whole line; NaN where nothing is known below zero."""
        if self.inner is not None:
            base, shift, power = self.inner
            return (base.infimum + shift) ** power * (1 - _ROUNDING) if base.infimum + shift >= 0 else math.nan
        return {"odd": 2 * self.at_zero - self.supremum, "flat": self.at_zero, None: math.nan}[self.below_zero]

    @property
    def nonexpansive(self) -> bool:
        """Whether it is known to be nondecreasing with slopes up to 1 on the whole line."""
        if self.inner is not None:
            base, _, power = self.inner
            return power == 1 and base.nonexpansive
        return self.below_zero is not None and self.slope_at_zero <= 1

    def own_rounding(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Absolute, for float64 arguments between these; not finite where it is not known."""
        base, shift, power = self.inner or (self, 0.0, 1.0)
        low, high = base(lower), base(upper)
        size = torch.maximum(low.abs(), high.abs()) + 2 * base.at_zero
        error = 2 * base.ulps * _U * size + 1e-300
        if self.inner is None:
            return error
        error = error + 2 * _U * (size + shift)
        if power == 1:
            return error
        # A power is steep next to zero. NaN where base + shift may be negative.
        least = low + shift - 2 * error
        return power * least.pow(power - 1) * error + 128 * _U * (high + shift + 2 * error).pow(power)

    def flattest(self, lower: Tensor, upper: Tensor) -> Tensor:
        """The smallest slope between `lower` and `upper`, entrywise, rounded down; 0 where it is not known."""
        if self.inner is not None:
            base, shift, power = self.inner
            most = base(upper)
            most = most + self.ulps * torch.finfo(lower.dtype).eps * (most.abs() + shift) + shift
            factor = power * most.pow(power - 1) if power != 1 else 1.0
            return base.flattest(lower, upper) * factor * (1 - self.ulps * torch.finfo(lower.dtype).eps)
        farthest = torch.maximum(lower.abs(), upper.abs()) if self.below_zero == "odd" else upper
        slope = self.derivative(farthest) - self.ulps * torch.finfo(lower.dtype).eps * self.slope_at_zero
        known = torch.ones_like(lower, dtype=torch.bool) if self.below_zero == "odd" else lower >= 0
        return torch.where(known, slope.clamp_min(0), 0.0)

    def steepest(self, lower: Tensor, upper: Tensor) -> Tensor:
        """The largest slope between `lower` and `upper`, entrywise, rounded up; NaN where it is not known."""
        if self.inner is not None:
            base, shift, power = self.inner
            least = base(lower)
            least = least - self.ulps * torch.finfo(lower.dtype).eps * (least.abs() + shift) + shift
            factor = power * least.pow(power - 1) if power != 1 else 1.0
            return base.steepest(lower, upper) * factor * (1 + self.ulps * torch.finfo(lower.dtype).eps)
        # The slope falls with the distance from zero.
        nearest = torch.zeros_like(lower).clamp(lower, upper)
        slope = self.derivative(nearest.abs() if self.below_zero == "odd" else nearest.clamp_min(0))
        slope = slope + self.ulps * torch.finfo(lower.dtype).eps * self.slope_at_zero
        return slope if self.below_zero is not None else torch.where(lower >= 0, slope, torch.nan)

    def over(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds of sigma between `lower` and `upper`, entrywise, rounding included; NaN where nothing is known of it.

        sigma is nondecreasing, so the ends are its values at the ends, each moved outwards by its own rounding.
        """
        eps, tiny = torch.finfo(lower.dtype).eps, torch.finfo(lower.dtype).tiny
        if self.inner is not None:
            base, shift, power = self.inner
            low, high = (t + shift for t in base.over(lower, upper))
            low, high = low - eps * (low.abs() + 2 * shift), high + eps * (high.abs() + 2 * shift)
            if power != 1:
                # Of negative numbers there is none.
                low, high = (torch.where(low >= 0, t, torch.nan).pow(power) for t in (low, high))
            return low - self.ulps * eps * low.abs() - tiny, high + self.ulps * eps * high.abs() + tiny
        known = torch.ones_like(lower, dtype=torch.bool) if self.below_zero is not None else lower >= 0
        low, high = (torch.where(known, self.function(t), torch.nan) for t in (lower, upper))
        # Below zero, 2 sigma(0) - sigma(-v) is as exact as its two terms are.
        low = low - self.ulps * eps * (low.abs() + 2 * self.at_zero) - tiny
        high = high + self.ulps * eps * (high.abs() + 2 * self.at_zero) + tiny
        least = self.at_zero if self.below_zero is None else self.infimum
        return low.clamp(least, self.supremum), high.clamp(least, self.supremum)


def sigmoid_derivative(v: Tensor) -> Tensor:
    """On the whole line."""
    s = torch.sigmoid(v)
    return s * (1 - s)


ACTIVATIONS: dict[str, Activation] = {
    a.name: a
    for a in (
        Activation(
            name="tanh",
            function=torch.tanh,
            derivative=lambda v: 1 - torch.tanh(v).square(),
            at_zero=0.0,
            supremum=1.0,
            asymptotic_slope=0.0,
            slope_at_zero=1.0,
            derivative_of_value=lambda s: 1 - s.square(),
            below_zero="odd",
        ),
        # v/(1 + |v|) is torch's softsign; on [0, inf) they agree.
        Activation(
            name="softsign",
            function=nn.functional.softsign,
            derivative=lambda v: (1 + v.abs()).square().reciprocal(),
            at_zero=0.0,
            supremum=1.0,
            asymptotic_slope=0.0,
            slope_at_zero=1.0,
            derivative_of_value=lambda s: (1 - s).square(),
            below_zero="odd",
        ),
        Activation(
            name="relu6",
            function=nn.functional.relu6,
            derivative=lambda v: ((v >= 0) & (v < 6)).to(v.dtype),
            at_zero=0.0,
            supremum=6.0,
            asymptotic_slope=0.0,
            slope_at_zero=1.0,
            derivative_of_value=lambda s: (s < 6).to(s.dtype),
            smooth=False,
            below_zero="flat",
        ),
        Activation(
            name="sigmoid",
            function=torch.sigmoid,
            derivative=sigmoid_derivative,
            at_zero=0.5,
            supremum=1.0,
            asymptotic_slope=0.0,
            slope_at_zero=0.25,
            derivative_of_value=lambda s: s * (1 - s),
            below_zero="odd",
        ),
        Activation(
            name="one_minus_exp",
            function=lambda v: -torch.expm1(-v),
            derivative=lambda v: torch.exp(-v),
            at_zero=0.0,
            supremum=1.0,
            asymptotic_slope=0.0,
            slope_at_zero=1.0,
            derivative_of_value=lambda s: 1 - s,
        ),
        Activation(
            name="arctan",
            function=torch.arctan,
            derivative=lambda v: (1 + v.square()).reciprocal(),
            at_zero=0.0,
            # The nearest number is less than pi/2.
            supremum=math.nextafter(math.pi / 2, 2.0),
            asymptotic_slope=0.0,
            slope_at_zero=1.0,
            derivative_of_value=lambda s: torch.cos(s).square(),
            below_zero="odd",
        ),
        Activation(
            name="erf",
            function=torch.erf,
            derivative=lambda v: torch.exp(-v.square()) * (2 / math.sqrt(math.pi)),
            at_zero=0.0,
            supremum=1.0,
            asymptotic_slope=0.0,
            slope_at_zero=2 / math.sqrt(math.pi),
            below_zero="odd",
        ),
        Activation(
            name="log1p",
            function=torch.log1p,
            derivative=lambda v: (1 + v).reciprocal(),
            at_zero=0.0,
            supremum=math.inf,
            asymptotic_slope=0.0,
            slope_at_zero=1.0,
            derivative_of_value=lambda s: torch.exp(-s),
        ),
        Activation(
            name="sqrt_shift",
            function=lambda v: torch.sqrt(v + _SQRT_SHIFT),
            derivative=lambda v: 0.5 * torch.rsqrt(v + _SQRT_SHIFT),
            at_zero=math.sqrt(_SQRT_SHIFT),
            supremum=math.inf,
            asymptotic_slope=0.0,
            slope_at_zero=0.5 / math.sqrt(_SQRT_SHIFT),
            derivative_of_value=lambda s: 0.5 * s.reciprocal(),
        ),
        # On [0, inf) the rectifier is the identity.
        Activation(
            name="relu",
            function=torch.relu,
            derivative=lambda v: (v >= 0).to(v.dtype),
            at_zero=0.0,
            supremum=math.inf,
            asymptotic_slope=1.0,
            slope_at_zero=1.0,
            derivative_of_value=lambda s: (s >= 0).to(s.dtype),
            below_zero="flat",
        ),
        Activation(
            name="identity",
            function=lambda v: v,
            derivative=torch.ones_like,
            at_zero=0.0,
            supremum=math.inf,
            asymptotic_slope=1.0,
            slope_at_zero=1.0,
            derivative_of_value=torch.ones_like,
            below_zero="odd",
        ),
    )
}


def get_activation(activation: str | Activation) -> Activation:
    """The activation of that name, or the one given.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.

    >>> get_activation("sigmoid").at_zero
    0.5
    """
    if isinstance(activation, Activation):
        return activation
    if activation in ACTIVATIONS:
        return ACTIVATIONS[activation]
    return _composite(activation.replace(" ", ""))


_COMPOSITE = re.compile(
    r"(?P<open>\()?(?P<base>[a-z]\w*)(?:\+(?P<shift>[0-9.]+))?(?P<close>\))?(?:\^(?P<power>[0-9.]+))?"
)


@cache
def _composite(name: str) -> Activation:
    """(base + shift)^power, written "tanh+1.2", "sigmoid^0.5" or "(tanh+1.2)^0.5"."""
    match = _COMPOSITE.fullmatch(name)
    if match is None or match["base"] not in ACTIVATIONS or bool(match["open"]) != bool(match["close"]):
        raise ValueError(
            f"unknown activation {name!r}; choose one of {', '.join(sorted(ACTIVATIONS))}, or build one of them as in "
            "'tanh+1.2', 'sigmoid^0.5', '(tanh+1.2)^0.5'"
        )
    try:
        shift, power = float(match["shift"] or 0), float(match["power"] or 1)
    except ValueError as error:
        raise ValueError(f"activation {name!r}: shift and power must be numbers") from error
    if match["shift"] and match["power"] and not match["open"]:
        raise ValueError(f"activation {name!r}: write ({match['base']}+{shift:g})^{power:g}")
    if not (0 <= shift < math.inf and 0 < power <= 1):
        raise ValueError(f"activation {name!r}: the shift must not be negative and the power in (0, 1]")
    return _composed(ACTIVATIONS[match["base"]], shift, power, name)


def _composed(base: Activation, shift: float, power: float, name: str) -> Activation:
    lowest = base.at_zero + shift
    if lowest == 0 and power < 1:
        raise ValueError(
            f"activation {name!r} has an infinite slope at 0; add a shift, as in ({base.name}+0.1)^{power:g}"
        )

    def function(v: Tensor) -> Tensor:
        y = base(v) + shift
        return y if power == 1 else y.pow(power)

    def derivative(v: Tensor) -> Tensor:
        slope = base.derivative(v)
        return slope if power == 1 else power * slope * (base(v) + shift).pow(power - 1)

    return Activation(
        name=name,
        function=function,
        derivative=derivative,
        at_zero=lowest**power,
        supremum=(base.supremum + shift) ** power * (1 + _ROUNDING),
        asymptotic_slope=base.asymptotic_slope if power == 1 else 0.0,
        slope_at_zero=power * lowest ** (power - 1) * base.slope_at_zero,
        inner=(base, shift, power),
        # A rounded exponent counts with the logarithm of what it is applied to.
        ulps=2 * base.ulps + 8 + (0 if base.bounded or power == 1 else 96),
    )


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
