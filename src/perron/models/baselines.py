"""One network, many cores: implicit layers and what they are to be compared with, at equal numbers of parameters.

Flatten, Linear, BatchNorm, core, BatchNorm, Linear, or the convolutional blocks, as in Gabor et al. (ICML 2024); only the
core differs. Two of them have no equilibrium: "explicit" applies tanh twice, and "no-equilibrium" is pcDEQ-1 with W = 0,
which shows what the equilibrium itself is worth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from perron.cells.reading import container
from perron.gradients import JacobianFree, Phantom
from perron.models.positive_concave import Network, convolutional_blocks
from perron.nn import (
    MonotoneConv2d,
    MonotoneLinear,
    PositiveConcaveConv2d,
    PositiveConcaveLinear,
    SubhomogeneousConv2d,
    SubhomogeneousLinear,
    UnconstrainedConv2d,
    UnconstrainedLinear,
)
from perron.nn.equilibrium import Injection, positive_injection
from perron.nn.ode import NeuralODE
from perron.solvers import Auto, Solver

__all__ = ["CONVOLUTIONAL_CORES", "CORES", "BaselineConvNet", "BaselineNet", "matched_width", "parameter_count"]


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
    "deq": lambda w: UnconstrainedLinear(w, w, injection="pre", solver=_solver()),
    "deq-jacobian-free": lambda w: UnconstrainedLinear(
        w, w, injection="pre", solver=_solver(), gradient=JacobianFree()
    ),
    "deq-phantom": lambda w: UnconstrainedLinear(w, w, injection="pre", solver=_solver(), gradient=Phantom()),
    "node": lambda w: NeuralODE(w),
    "anode": lambda w: NeuralODE(w, augment=max(w // 8, 1)),
    "explicit": _explicit,
    "no-equilibrium": lambda w: InjectOnly(),
}
"""What may stand in the middle of `BaselineNet`, by name: a function of the width."""


def _concave_convolution(activation: str) -> Callable[[int], nn.Module]:
    return lambda w: PositiveConcaveConv2d(w, w, activation=activation, injection="pre", solver=_solver())


def _explicit_convolution(width: int) -> nn.Module:
    return nn.Sequential(nn.Tanh(), nn.Conv2d(width, width, 3, padding=1, bias=False), nn.Tanh())


CONVOLUTIONAL_CORES: dict[str, Callable[[int], nn.Module]] = {
    "pcdeq1-tanh": _concave_convolution("tanh"),
    "pcdeq1-softsign": _concave_convolution("softsign"),
    "pcdeq1-relu6": _concave_convolution("relu6"),
    "pcdeq2-sigmoid": _concave_convolution("sigmoid"),
    "subdeq-nonnegative": lambda w: SubhomogeneousConv2d(
        w, w, normalize=math.inf, normalize_dim=1, injection="pre", solver=_solver()
    ),
    "subdeq-bounded": lambda w: SubhomogeneousConv2d(w, w, weights="signed_bounded", injection="pre", solver=_solver()),
    "subdeq-signed": lambda w: SubhomogeneousConv2d(w, w, weights="signed", injection="pre", solver=_solver()),
    "mondeq": lambda w: MonotoneConv2d(w, w, injection="pre", solver=_solver()),
    "deq": lambda w: UnconstrainedConv2d(w, w, injection="pre", solver=_solver()),
    "explicit": _explicit_convolution,
    "no-equilibrium": lambda w: InjectOnly(),
}
"""The same for `BaselineConvNet`: kernels of 3x3."""


@container
class BaselineNet(Network):
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
    >>> BaselineNet("mondeq", 64, 10, width=16)(torch.randn(3, 1, 8, 8)).shape
    torch.Size([3, 10])
    """

    def __init__(self, core: str, in_features: int = 784, classes: int = 10, *, width: int = 80) -> None:
        _check_core(core, CORES)
        super().__init__(
            nn.Flatten(),
            nn.Linear(in_features, width),
            nn.BatchNorm1d(width),
            CORES[core](width),
            nn.BatchNorm1d(width),
            nn.Linear(width, classes),
        )


@container
class BaselineConvNet(Network):
    """The convolutional blocks of `perron.models.PositiveConcaveConvNet`, around a core for every block.

    Args:
        core: a name in `CONVOLUTIONAL_CORES`.
        in_channels: of the images.
        classes: number of logits.
        widths: channels of each block.
        image_size: side of the square images.

    Shape:
        input (batch, in_channels, image_size, image_size), output (batch, classes).

    Raises:
        ValueError: the core is unknown; no widths, or images too small for that many blocks.

    >>> import torch
    >>> BaselineConvNet("mondeq", widths=[4], image_size=8)(torch.randn(3, 1, 8, 8)).shape
    torch.Size([3, 10])
    """

    def __init__(
        self,
        core: str,
        in_channels: int = 1,
        classes: int = 10,
        *,
        widths: Sequence[int] = (82,),
        image_size: int = 28,
    ) -> None:
        _check_core(core, CONVOLUTIONAL_CORES)
        super().__init__(*convolutional_blocks(CONVOLUTIONAL_CORES[core], in_channels, classes, widths, image_size))


def _check_core(core: str, known: dict[str, Callable[[int], nn.Module]]) -> None:
    if core not in known:
        raise ValueError(f"unknown core {core!r}; choose one of {', '.join(known)}")


def parameter_count(module: nn.Module) -> int:
    """Trainable numbers in a module."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def matched_width(build: Callable[[int], nn.Module], parameters: int) -> int:
    """The width at which `build(width)` has the number of parameters nearest to the one asked for."""

    def count(width: int) -> int:
        return parameter_count(build(width))

    low, high = 1, 2
    while count(high) < parameters:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < parameters else (low, middle)
    return min((low, high), key=lambda w: abs(count(w) - parameters))
