"""Activations with declared facts, as modules and as steps."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from perron._numerics.rounding import Rounding, compound, gamma, unit_roundoff
from perron.activations import ACTIVATIONS, Activation, activation_degree, get_activation
from perron.cells import reading
from perron.cells.elementwise import ElementwiseStep
from perron.cells.refusal import Refusal
from perron.cells.step import Side, Weightless, known

__all__ = ["ACTIVATION_MODULES", "Activate", "ActivationStep", "is_tested"]

_U = 2.0**-53
# Those that project onto an interval.
_PROJECTIONS = ("relu", "relu6", "identity")


class Activate(nn.Module):
    """An activation of `perron.activations` as a module, for use in a cell.

    >>> import torch
    >>> Activate("erf")(torch.zeros(1))
    tensor([0.])
    """

    def __init__(self, activation: str | Activation) -> None:
        super().__init__()
        self.activation = get_activation(activation)

    def forward(self, v: Tensor) -> Tensor:
        return self.activation(v)

    def extra_repr(self) -> str:
        return repr(self.activation.name)

    def __reduce__(self) -> Any:
        # Activations hold functions that cannot be pickled; the name says it all.
        if is_tested(self.activation):
            return _rebuild_activate, (self.activation.name, self.training)
        return super().__reduce__()


def is_tested(activation: Activation) -> bool:
    """Whether its facts are the tested ones, rather than somebody's word."""
    try:
        # Equal, with the same functions: copies of a layer copy the record.
        return get_activation(activation.name) == activation
    except ValueError:
        return False


def _rebuild_activate(name: str, training: bool) -> Activate:
    return Activate(name).train(training)


@known
@dataclass(frozen=True, kw_only=True)
class ActivationStep(Weightless, ElementwiseStep):
    """v -> sigma(v)."""

    activation: Activation

    def __call__(self, v: Tensor, injection: Tensor | None = None) -> Tensor:
        return self.activation(v)

    def check(self) -> None:
        if not is_tested(self.activation):
            raise Refusal(f"the facts of activation {self.activation.name!r} are not among the tested ones")

    def rounded(self, before: Rounding, dtype: torch.dtype, entries: int) -> Rounding:
        sigma = self.activation
        relative = compound(before.relative, gamma(sigma.ulps, dtype))
        return Rounding(relative, 2 * max(sigma.slope_at_zero, 1.0) * before.absolute + torch.finfo(dtype).tiny)

    def derivative(self, v: Tensor) -> Tensor:
        # From the argument, not from the value: where sigma saturates only that has any digits.
        return self.activation.derivative(v)

    def bounded_derivative(self, v: Tensor, side: Side, slack: Rounding) -> Tensor:
        error = self.activation.ulps * unit_roundoff(v.dtype) * self.activation.slope_at_zero
        # Concave: the slope falls with v, so an upper bound is taken a little to the left.
        sign = 1 if side == "upper" else -1
        return (self.activation.derivative(v * (1 - sign * slack.relative)) + sign * error).clamp_min(0)

    def slope_of_value(self, value: Tensor, side: Side | None) -> Tensor | None:
        sigma = self.activation
        if sigma.derivative_of_value is None or not sigma.smooth:
            return None
        # A bound, or the middle of two, may lie out of the range of sigma, where the slope is no function of the value.
        value = value.clamp(sigma.at_zero, sigma.supremum)
        slope = sigma.derivative_of_value(value)
        if side is None:
            return slope
        error = sigma.ulps * unit_roundoff(value.dtype) * sigma.slope_at_zero
        return (slope + error if side == "upper" else slope - error).clamp_min(0)

    def slopes(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        return self.activation.steepest(lower, upper), self.activation.flattest(lower, upper)

    def own_rounding(self, lower: Tensor, upper: Tensor) -> Tensor:
        return self.activation.own_rounding(lower, upper)

    def propagate(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        return self.activation.over(lower, upper)

    def rounding_of_value(self, value: Tensor) -> Tensor:
        base, shift, _ = self.activation.inner or (self.activation, 0.0, 1.0)
        return 2 * self.activation.ulps * _U * (value.abs() + (shift + 2 * base.at_zero))

    def range(self, like: Tensor) -> tuple[Tensor, Tensor] | None:
        sigma = self.activation
        if not sigma.bounded or math.isnan(sigma.infimum):
            return None
        lower = torch.full_like(like, sigma.infimum - 1e-12 * (1 + abs(sigma.infimum)))
        return lower, torch.full_like(like, sigma.supremum * (1 + 1e-12))

    @property
    def largest_slope(self) -> float:
        line = torch.full((1,), math.inf, dtype=torch.float64)
        return float(self.activation.steepest(-line, line))

    @property
    def nonexpansive(self) -> bool:
        return self.activation.nonexpansive

    def check_concave(self) -> None:
        """Every activation is: its facts."""

    def positive(self, before: bool, injected: bool) -> bool:
        return before or self.activation.at_zero > 0

    @property
    def least(self) -> float:
        return self.activation.at_zero

    @property
    def asymptotic_slope(self) -> float:
        return self.activation.asymptotic_slope

    def degree(self, least: float) -> tuple[float, float]:
        # Never more than 1, as sigma is concave with sigma(0) >= 0.
        return min(activation_degree(self.activation), 1.0), self.activation.at_zero

    @property
    def name(self) -> str:
        return self.activation.name

    @property
    def is_affine(self) -> bool:
        return self.activation.name == "identity"

    @property
    def scalar(self) -> Activation:
        return self.activation

    @property
    def supremum(self) -> float:
        return self.activation.supremum

    @property
    def projects(self) -> bool:
        return self.activation.name in _PROJECTIONS

    def signature(self) -> Hashable:
        # Itself, not its name.
        return self.activation


ACTIVATION_MODULES: dict[type[nn.Module], str] = {
    nn.Tanh: "tanh",
    nn.Softsign: "softsign",
    nn.ReLU6: "relu6",
    nn.Sigmoid: "sigmoid",
    nn.ReLU: "relu",
    nn.Identity: "identity",
}


@reading.reads(Activate, *ACTIVATION_MODULES)
def activation_step(module: nn.Module, path: str) -> ActivationStep:
    """
    Raises:
        Refusal: it is not one of `perron.activations`.
    """
    if isinstance(module, Activate):
        if not is_tested(module.activation):
            raise Refusal(f"the facts of activation {module.activation.name!r} are not among the tested ones")
        return ActivationStep(activation=module.activation)
    if isinstance(module, nn.ReLU6) and (module.min_val, module.max_val) != (0, 6):
        raise Refusal(f"{path} is a ReLU6 from {module.min_val} to {module.max_val}; use limits of 0 and 6")
    kind = parametrize.type_before_parametrizations(module)
    return ActivationStep(activation=ACTIVATIONS[ACTIVATION_MODULES[kind]])
