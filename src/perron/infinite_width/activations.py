"""Activations of random networks: any function of the line, with its kinks and the closed forms it has.

`perron.activations` holds activations with the facts that proofs need; these here need not be nondecreasing, and are centred
where they are used: phi = phi0 - E phi0(tau xi).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perron.activations import sigmoid_derivative

__all__ = ["ScalarFunction", "clip_abs", "hard_tanh", "scalar_function", "transformed", "two_slopes"]


# Numbers that a function is made with may be 0-d tensors: then its values are differentiable with respect to them.
Number = float | Tensor


@dataclass(frozen=True, kw_only=True)
class ScalarFunction:
    """A function phi0 of the line, applied entrywise.

    Attributes:
        name: how it is written.
        value, slope: phi0 and its derivative.
        kinks: where the slope jumps.
        slopes: (right, left of 0) of a function that is linear on both sides: its dual has a closed form.
        is_erf: the error function, whose dual has one too.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    kinks: tuple[Number, ...] = ()
    slopes: tuple[Number, Number] | None = None
    is_erf: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        return self.value(x)

    def __repr__(self) -> str:
        return self.name


def two_slopes(right: Number, left: Number) -> ScalarFunction:
    """right x for x > 0, left x for x < 0: relu is two_slopes(1, 0).

    Raises:
        ValueError: a slope is not finite.
    """
    if not (math.isfinite(right) and math.isfinite(left)):
        raise ValueError(f"slopes must be finite, got {right} and {left}")
    return ScalarFunction(
        name=f"two_slopes({right:.9g}, {left:.9g})",
        value=lambda x: torch.where(x > 0, right * x, left * x),
        slope=lambda x: right * (x > 0).to(x) + left * (x <= 0).to(x),
        kinks=() if right == left else (0.0,),
        slopes=(right, left),
    )


def hard_tanh(scale: Number, limit: Number) -> ScalarFunction:
    """scale clip(x, -limit, limit).

    Raises:
        ValueError: the limit is not positive, or a number is not finite.
    """
    if not (math.isfinite(scale) and 0 < limit < math.inf):
        raise ValueError(f"scale must be finite and limit positive and finite, got {scale} and {limit}")
    return ScalarFunction(
        name=f"hard_tanh({scale:.9g}, {limit:.9g})",
        value=lambda x: scale * x.clamp(-limit, limit),  # type: ignore[arg-type, operator]
        slope=lambda x: scale * (x.abs() < limit).to(x),
        kinks=(-limit, limit),
    )


def clip_abs(scale: Number, limit: Number, even: Number) -> ScalarFunction:
    """scale clip(x, -limit, limit) + even |x|.

    Raises:
        ValueError: the limit is not positive, or a number is not finite.
    """
    clipped = hard_tanh(scale, limit)
    if not math.isfinite(even):
        raise ValueError(f"even must be finite, got {even}")
    return ScalarFunction(
        name=f"clip_abs({scale:.9g}, {limit:.9g}, {even:.9g})",
        value=lambda x: clipped.value(x) + even * x.abs(),
        slope=lambda x: clipped.slope(x) + even * x.sign(),
        kinks=(-limit, 0.0, limit),
    )


def transformed(inner: ScalarFunction, outer: Number, stretch: Number, shift: Number) -> ScalarFunction:
    """outer phi0(stretch x + shift).

    Raises:
        ValueError: a number is not finite, or stretch is 0.
    """
    if not all(map(math.isfinite, (outer, stretch, shift))) or stretch == 0:
        raise ValueError(f"outer, stretch and shift must be finite and stretch not 0, got {outer}, {stretch}, {shift}")
    return ScalarFunction(
        name=f"{outer:.9g} {inner.name}({stretch:.9g} x + {shift:.9g})",
        value=lambda x: outer * inner.value(stretch * x + shift),
        slope=lambda x: outer * stretch * inner.slope(stretch * x + shift),
        kinks=tuple((k - shift) / stretch for k in inner.kinks),
    )


def _normal_density(x: Tensor) -> Tensor:
    return torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


_NAMED: dict[str, ScalarFunction] = {
    f.name: f
    for f in (
        ScalarFunction(name="linear", value=lambda x: x, slope=torch.ones_like, slopes=(1.0, 1.0)),
        ScalarFunction(name="abs", value=torch.abs, slope=torch.sign, kinks=(0.0,), slopes=(1.0, -1.0)),
        ScalarFunction(name="relu", value=torch.relu, slope=lambda x: (x > 0).to(x), kinks=(0.0,), slopes=(1.0, 0.0)),
        ScalarFunction(name="tanh", value=torch.tanh, slope=lambda x: 1 - torch.tanh(x) ** 2),
        ScalarFunction(name="sigmoid", value=torch.sigmoid, slope=sigmoid_derivative),
        ScalarFunction(
            name="erf", value=torch.erf, slope=lambda x: 2 / math.sqrt(math.pi) * torch.exp(-x * x), is_erf=True
        ),
        ScalarFunction(name="swish", value=F.silu, slope=lambda x: torch.sigmoid(x) + x * sigmoid_derivative(x)),
        ScalarFunction(name="gelu", value=F.gelu, slope=lambda x: torch.special.ndtr(x) + x * _normal_density(x)),
        ScalarFunction(name="softplus", value=F.softplus, slope=torch.sigmoid),
        ScalarFunction(
            name="hard_tanh", value=lambda x: x.clamp(-1, 1), slope=lambda x: (x.abs() < 1).to(x), kinks=(-1.0, 1.0)
        ),
    )
}


def scalar_function(given: str | ScalarFunction) -> ScalarFunction:
    """A function by its name: linear, abs, relu, "leaky_relu(0.2)", tanh, sigmoid, erf, swish, gelu, softplus or hard_tanh.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
        TypeError: it is neither a name nor a `ScalarFunction`; a layer is no activation.

    >>> scalar_function("leaky_relu(0.2)").slopes
    (1.0, 0.2)
    """
    if isinstance(given, ScalarFunction):
        return given
    if isinstance(given, nn.Module):
        raise TypeError(
            f"an activation is needed, and {type(given).__name__} is a layer or module: these kernels are of random networks "
            "with centred Gaussian weights. Nonnegative layers are not centred: W z is one scalar per sample when they are "
            "wide (perron.infinite_width.mean_field)"
        )
    if not isinstance(given, str):
        raise TypeError(f"an activation is a name or a ScalarFunction(name, value, slope), got {given!r}")
    if given in _NAMED:
        return _NAMED[given]
    if given.startswith("leaky_relu(") and given.endswith(")"):
        try:
            return two_slopes(1.0, float(given[len("leaky_relu(") : -1]))
        except ValueError as error:
            raise ValueError(f"the slope in {given!r} is not a finite number") from error
    raise ValueError(f"unknown activation {given!r}; choose one of {', '.join(_NAMED)}, or 'leaky_relu(slope)'")
