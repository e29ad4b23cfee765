"""The reference networks of Sittoni, Tudisco, "Subhomogeneous deep equilibrium models" (ICML 2024; arXiv 2403.00720).

A subhomogeneous layer with its affine input map inside, BatchNorm, [AvgPool,] Linear. The paper's weights have any sign,
`weights="signed"`, which certifies single samples at best; "nonnegative" and "signed_bounded" are certified for all.
"""

from __future__ import annotations

from torch import nn

from perron.cells.reading import container
from perron.models.positive_concave import Network
from perron.nn import SubhomogeneousConv2d, SubhomogeneousLinear
from perron.nn.subhomogeneous import Weights
from perron.solvers import Auto

__all__ = ["SubhomogeneousConvNet", "SubhomogeneousLinearNet"]


@container
class SubhomogeneousLinearNet(Network):
    """Flatten, equilibrium of `width`, BatchNorm, Linear.

    Args:
        in_features: pixels of an image, all channels.
        classes: number of logits.
        width: of the equilibrium; 87 in the paper.
        activation, normalize, weights: of the equilibrium layer; "tanh+1.2" without, or "tanh+1.603" with normalize=inf.
        tol, max_steps: of its solver; 1e-3 in the paper.

    Shape:
        input (batch, ...) with `in_features` entries a sample, output (batch, classes).

    >>> import torch
    >>> SubhomogeneousLinearNet(64, 10, width=16)(torch.randn(3, 1, 8, 8)).shape
    torch.Size([3, 10])
    """

    def __init__(
        self,
        in_features: int = 784,
        classes: int = 10,
        *,
        width: int = 87,
        activation: str = "tanh+1.2",
        normalize: float | None = None,
        weights: Weights = "signed",
        tol: float = 1e-3,
        max_steps: int = 200,
    ) -> None:
        solver = Auto(tol=tol, max_steps=max_steps, on_failure="ignore")
        super().__init__(
            nn.Flatten(),
            SubhomogeneousLinear(in_features, width, activation, normalize=normalize, weights=weights, solver=solver),
            nn.BatchNorm1d(width),
            nn.Linear(width, classes),
        )


@container
class SubhomogeneousConvNet(Network):
    """Convolutional equilibrium of `width` channels at full resolution, BatchNorm, AvgPool, Linear.

    Args:
        in_channels: of the images.
        classes: number of logits.
        width: channels; 32 on MNIST, 48 on CIFAR-10 and SVHN, 64 on Tiny ImageNet in the paper.
        pool: side of the windows that are averaged; 6 on MNIST, else 8.
        image_size: side of the square images.
        activation, normalize, normalize_dim, weights: of the equilibrium layer. Dividing by the norm over channels
            (normalize_dim=1) is our choice.
        tol, max_steps: of its solver; 1e-3 in the paper.

    Shape:
        input (batch, in_channels, image_size, image_size), output (batch, classes).

    Raises:
        ValueError: the images are smaller than a window.

    >>> import torch
    >>> SubhomogeneousConvNet(width=4, image_size=12)(torch.rand(2, 1, 12, 12)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        in_channels: int = 1,
        classes: int = 10,
        *,
        width: int = 32,
        pool: int = 6,
        image_size: int = 28,
        activation: str = "tanh+1.2",
        normalize: float | None = None,
        normalize_dim: int | None = 1,
        weights: Weights = "signed",
        tol: float = 1e-3,
        max_steps: int = 200,
    ) -> None:
        side = image_size // pool
        if side < 1:
            raise ValueError(f"windows of side {pool} do not fit into images of side {image_size}")
        layer = SubhomogeneousConv2d(
            in_channels,
            width,
            activation=activation,
            normalize=normalize,
            normalize_dim=normalize_dim,
            weights=weights,
            solver=Auto(tol=tol, max_steps=max_steps, on_failure="ignore"),
        )
        super().__init__(
            layer, nn.BatchNorm2d(width), nn.AvgPool2d(pool), nn.Flatten(), nn.Linear(width * side * side, classes)
        )
