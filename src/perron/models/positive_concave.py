"""The networks of Gabor, Piotrowski, Cavalcante (ICML 2024): one linear, one convolutional, or three blocks.

pre-injection (Linear or Conv3x3, BatchNorm) -> equilibrium -> [MaxPool3x3 stride 1] -> BatchNorm -> [next block]
-> [AvgPool] -> Linear. pcDEQ-1 is activation tanh, softsign or relu6; pcDEQ-2 is sigmoid. The pooling before the
classifier (to 4x4) is our choice: the paper does not give it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from perron.cells.reading import container
from perron.constraints import Method
from perron.nn import PositiveConcaveConv2d, PositiveConcaveLinear
from perron.solvers import Auto

__all__ = ["PRESETS", "PositiveConcaveConvNet", "PositiveConcaveLinearNet", "convolutional_blocks"]


@container
class Network(nn.Sequential):
    """A Sequential whose slices are plain ones: nn.Sequential would call the subclass's constructor."""

    def __getitem__(self, index: int | slice) -> nn.Module:  # type: ignore[override]
        return nn.Sequential(*list(self)[index]) if isinstance(index, slice) else super().__getitem__(index)


@container
class PositiveConcaveLinearNet(Network):
    """Flatten, Linear, BatchNorm, equilibrium of `width`, BatchNorm, Linear.

    Args:
        in_features: pixels of an image, all channels.
        classes: number of logits.
        width: of the equilibrium; 80 in the paper.
        activation, constraint, weight_norm, initial_radius: of the equilibrium layer.
        tol, max_steps: of its solver.

    Shape:
        input (batch, ...) with `in_features` entries a sample, output (batch, classes).

    >>> import torch
    >>> PositiveConcaveLinearNet(64, 10, width=16)(torch.randn(3, 1, 8, 8)).shape
    torch.Size([3, 10])
    """

    def __init__(
        self,
        in_features: int = 784,
        classes: int = 10,
        *,
        width: int = 80,
        activation: str = "tanh",
        constraint: Method = "square",
        weight_norm: bool = False,
        initial_radius: float = 0.9,
        tol: float = 1e-4,
        max_steps: int = 200,
    ) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(in_features, width),
            nn.BatchNorm1d(width),
            PositiveConcaveLinear(
                width,
                width,
                activation,
                injection="pre",
                constraint=constraint,
                weight_norm=weight_norm,
                initial_radius=initial_radius,
                solver=Auto(tol=tol, max_steps=max_steps),
            ),
            nn.BatchNorm1d(width),
            nn.Linear(width, classes),
        )


@container
class PositiveConcaveConvNet(Network):
    """One block per width: Conv3x3 (stride 2 from the second on), BatchNorm, equilibrium, MaxPool3x3, BatchNorm.

    Args:
        in_channels: of the images.
        classes: number of logits.
        widths: channels of each block's equilibrium; (82,) and (12, 24, 48) on MNIST in the paper.
        image_size: side of the square images.
        activation, constraint, weight_norm, initial_radius: of the equilibrium layers.
        tol, max_steps: of their solvers.

    Shape:
        input (batch, in_channels, image_size, image_size), output (batch, classes).

    Raises:
        ValueError: no widths, or images too small for that many blocks.

    >>> import torch
    >>> PositiveConcaveConvNet(1, 10, widths=[4, 6], image_size=16)(torch.rand(2, 1, 16, 16)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        in_channels: int = 1,
        classes: int = 10,
        *,
        widths: Sequence[int] = (82,),
        image_size: int = 28,
        activation: str = "tanh",
        constraint: Method = "square",
        weight_norm: bool = False,
        initial_radius: float = 0.9,
        tol: float = 1e-4,
        max_steps: int = 200,
    ) -> None:
        def core(width: int) -> nn.Module:
            return PositiveConcaveConv2d(
                width,
                width,
                activation=activation,
                injection="pre",
                constraint=constraint,
                weight_norm=weight_norm,
                initial_radius=initial_radius,
                solver=Auto(tol=tol, max_steps=max_steps),
            )

        super().__init__(*convolutional_blocks(core, in_channels, classes, widths, image_size))


def convolutional_blocks(
    core: Callable[[int], nn.Module], in_channels: int, classes: int, widths: Sequence[int], image_size: int
) -> list[nn.Module]:
    """The modules of such a network around a core that keeps (batch, width, height, width): a function of the width.

    Raises:
        ValueError: no widths, or images too small for that many blocks.
    """
    size = image_size
    for _ in widths[1:]:
        size = (size + 1) // 2
    if not widths or size < 4:
        raise ValueError(
            f"{len(widths)} blocks on images of side {image_size} leave {size} pixels; at least 4 are needed"
        )
    blocks: list[nn.Module] = []
    for number, (before, width) in enumerate(zip([in_channels, *widths], widths, strict=False)):
        blocks += [
            nn.Conv2d(before, width, 3, stride=1 if number == 0 else 2, padding=1),
            nn.BatchNorm2d(width),
            core(width),
            nn.MaxPool2d(3, stride=1, padding=1),
            nn.BatchNorm2d(width),
        ]
    pool = size // 4
    side = size // pool
    return [*blocks, nn.AvgPool2d(pool), nn.Flatten(), nn.Linear(widths[-1] * side * side, classes)]


PRESETS: dict[str, tuple[type[nn.Module], dict[str, object]]] = {
    "mnist-linear": (PositiveConcaveLinearNet, {"in_features": 784, "width": 80}),
    "mnist-conv": (PositiveConcaveConvNet, {"in_channels": 1, "widths": (82,), "image_size": 28}),
    "mnist-multi": (PositiveConcaveConvNet, {"in_channels": 1, "widths": (12, 24, 48), "image_size": 28}),
    "cifar10-conv": (PositiveConcaveConvNet, {"in_channels": 3, "widths": (125,), "image_size": 32}),
    "cifar10-multi": (PositiveConcaveConvNet, {"in_channels": 3, "widths": (20, 50, 80), "image_size": 32}),
    "cifar10-augmented": (PositiveConcaveConvNet, {"in_channels": 3, "widths": (100, 120, 140), "image_size": 32}),
}
"""The paper's networks by name: class and arguments; add `activation="sigmoid"` for pcDEQ-2."""
