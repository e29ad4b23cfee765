"""Scalar activations, each with the facts the proofs use.

A positive concave cell needs activations that are nonnegative, nondecreasing and concave on [0, inf). Such a function
satisfies `sigma(a v) <= a sigma(v)` for a >= 1, so a relative error of its argument is never amplified: the whole
rounding analysis of `perron.enclosure` rests on that. Every fact below is tested numerically.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "Activation", "get_activation"]

_SQRT_SHIFT = 0.25


@dataclass(frozen=True)
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
    ulps: int = 12

    def __call__(self, v: Tensor) -> Tensor:
        return self.function(v)

    @property
    def bounded(self) -> bool:
        return math.isfinite(self.supremum)


def _sigmoid_derivative(v: Tensor) -> Tensor:
    s = torch.sigmoid(v)
    return s * (1 - s)


ACTIVATIONS: dict[str, Activation] = {
    a.name: a
    for a in (
        Activation(
            "tanh",
            torch.tanh,
            lambda v: 1 - torch.tanh(v).square(),
            0.0,
            1.0,
            0.0,
            1.0,
            lambda s: 1 - s.square(),
        ),
        # v/(1 + |v|) is torch's softsign; on [0, inf) they agree.
        Activation(
            "softsign",
            nn.functional.softsign,
            lambda v: (1 + v.abs()).square().reciprocal(),
            0.0,
            1.0,
            0.0,
            1.0,
            lambda s: (1 - s).square(),
        ),
        Activation(
            "relu6",
            nn.functional.relu6,
            lambda v: ((v >= 0) & (v < 6)).to(v.dtype),
            0.0,
            6.0,
            0.0,
            1.0,
            lambda s: (s < 6).to(s.dtype),
        ),
        Activation("sigmoid", torch.sigmoid, _sigmoid_derivative, 0.5, 1.0, 0.0, 0.25, lambda s: s * (1 - s)),
        Activation(
            "one_minus_exp",
            lambda v: -torch.expm1(-v),
            lambda v: torch.exp(-v),
            0.0,
            1.0,
            0.0,
            1.0,
            lambda s: 1 - s,
        ),
        Activation(
            "arctan",
            torch.arctan,
            lambda v: (1 + v.square()).reciprocal(),
            0.0,
            math.pi / 2,
            0.0,
            1.0,
            lambda s: torch.cos(s).square(),
        ),
        Activation(
            "erf",
            torch.erf,
            lambda v: torch.exp(-v.square()) * (2 / math.sqrt(math.pi)),
            0.0,
            1.0,
            0.0,
            2 / math.sqrt(math.pi),
        ),
        Activation(
            "log1p",
            torch.log1p,
            lambda v: (1 + v).reciprocal(),
            0.0,
            math.inf,
            0.0,
            1.0,
            lambda s: torch.exp(-s),
        ),
        Activation(
            "sqrt_shift",
            lambda v: torch.sqrt(v + _SQRT_SHIFT),
            lambda v: 0.5 * torch.rsqrt(v + _SQRT_SHIFT),
            math.sqrt(_SQRT_SHIFT),
            math.inf,
            0.0,
            0.5 / math.sqrt(_SQRT_SHIFT),
            lambda s: 0.5 * s.reciprocal(),
        ),
        # On [0, inf) the rectifier is the identity.
        Activation(
            "relu", torch.relu, lambda v: (v >= 0).to(v.dtype), 0.0, math.inf, 1.0, 1.0, lambda s: (s >= 0).to(s.dtype)
        ),
        Activation("identity", lambda v: v, torch.ones_like, 0.0, math.inf, 1.0, 1.0, torch.ones_like),
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
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; choose one of {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[activation]
