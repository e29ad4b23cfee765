"""One network, many cores: implicit layers and what they are to be compared with, at equal numbers of parameters.

Flatten, Linear, BatchNorm, core, BatchNorm, Linear, as in Gabor et al. (ICML 2024); only the core differs. Two of them
have no equilibrium: "explicit" applies tanh twice, and "no-equilibrium" is pcDEQ-1 with W = 0, which shows what the
equilibrium itself is worth.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from perron.models.positive_concave import Network
from perron.nn import MonotoneLinear, PlainLinear, PositiveConcaveLinear, SubhomogeneousLinear
from perron.nn.equilibrium import Injection, positive_injection
from perron.nn.ode import NeuralODE
from perron.solvers import Auto, Solver

__all__ = ["CORES", "RivalNet", "matched_width", "parameter_count"]


class InjectOnly(nn.Module):
    """sigma(b(x)): a positive concave layer with W = 0, without the W.

    Args:
        injection: how x becomes b, see `perron.nn.Equilibrium`.
    """

    def __init__(self, injection: Injection = "softplus") -> None:
        super().__init__()
        self.injection = injection

    def forward(self, x: Tensor) -> Tensor:
        return positive_injection(x, self.injection).tanh()


def _solver() -> Solver:
    return Auto(on_failure="ignore")


def _concave(activation: str) -> Callable[[int], nn.Module]:
    return lambda w: PositiveConcaveLinear(w, w, activation, injection="pre", solver=_solver())


def _explicit(width: int) -> nn.Module:
    return nn.Sequential(nn.Tanh(), nn.Linear(width, width, bias=False), nn.Tanh())


CORES: dict[str, Callable[[int], nn.Module]] = {
    "pcdeq1-tanh": _concave("tanh"),
    "pcdeq1-softsign": _concave("softsign"),
    "pcdeq1-relu6": _concave("relu6"),
    "pcdeq2-sigmoid": _concave("sigmoid"),
    "subdeq-nonnegative": lambda w: SubhomogeneousLinear(
        w, w, "tanh+1.2", normalize=math.inf, injection="pre", solver=_solver()
    ),
    "subdeq-bounded": lambda w: SubhomogeneousLinear(
        w, w, "tanh+1.2", weights="signed_bounded", injection="pre", solver=_solver()
    ),
    "subdeq-signed": lambda w: SubhomogeneousLinear(
        w, w, "tanh+1.2", weights="signed", injection="pre", solver=_solver()
    ),
    "mondeq": lambda w: MonotoneLinear(w, w, injection="pre", solver=_solver()),
    "deq": lambda w: PlainLinear(w, w, injection="pre", solver=_solver()),
    "node": lambda w: NeuralODE(w),
    "anode": lambda w: NeuralODE(w, augment=max(w // 8, 1)),
    "explicit": _explicit,
    "no-equilibrium": lambda w: InjectOnly(),
}
"""What may stand in the middle of `RivalNet`, by name: a function of the width."""


class RivalNet(Network):
    """Flatten, Linear, BatchNorm, core of `width`, BatchNorm, Linear.

    Args:
        core: a name in `CORES`.
        in_features: pixels of an image, all channels.
        classes: number of logits.
        width: of the core.

    Shape:
        input (batch, ...) with `in_features` entries a sample, output (batch, classes).

    Raises:
        ValueError: the core is unknown; the message lists the known ones.

    >>> import torch
    >>> RivalNet("mondeq", 64, 10, width=16)(torch.randn(3, 1, 8, 8)).shape
    torch.Size([3, 10])
    """

    def __init__(self, core: str, in_features: int = 784, classes: int = 10, *, width: int = 80) -> None:
        if core not in CORES:
            raise ValueError(f"unknown core {core!r}; choose one of {', '.join(CORES)}")
        super().__init__(
            nn.Flatten(),
            nn.Linear(in_features, width),
            nn.BatchNorm1d(width),
            CORES[core](width),
            nn.BatchNorm1d(width),
            nn.Linear(width, classes),
        )


def parameter_count(module: nn.Module) -> int:
    """Trainable numbers in a module."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def matched_width(core: str, parameters: int, in_features: int, classes: int) -> int:
    """The width at which `RivalNet` with this core has the number of parameters nearest to the one asked for."""

    def count(width: int) -> int:
        return parameter_count(RivalNet(core, in_features, classes, width=width))

    low, high = 1, 2
    while count(high) < parameters:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < parameters else (low, middle)
    return min((low, high), key=lambda w: abs(count(w) - parameters))
