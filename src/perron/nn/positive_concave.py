"""Positive concave equilibrium layers (pcDEQ): z = sigma(W z + b), W >= 0, sigma concave and nondecreasing.

Source: Gabor, Piotrowski, Cavalcante, "Positive concave deep equilibrium models", ICML 2024 (arXiv 2402.04029).
Differences by choice: W starts at a spectral radius near 0.9 instead of near 0, so that the equilibrium is one from the
first step on, and stays nonnegative by parametrisation instead of projection (`constraint="projection"` for that).
"""

from __future__ import annotations

from torch import nn

from perron.activations import Activation, get_activation
from perron.cells.activation import Activate
from perron.cells.injection import Inject
from perron.constraints import Method, nonnegative
from perron.nn.recurrent import ConvolutionalMaps, LinearMaps, Maps, Recurrent, RecurrentOptions, Unpack

__all__ = [
    "PositiveConcaveConv1d",
    "PositiveConcaveConv2d",
    "PositiveConcaveConv3d",
    "PositiveConcaveLinear",
    "PositiveConcaveOptions",
]


class PositiveConcaveOptions(RecurrentOptions, total=False):
    """Options of `PositiveConcaveLinear` and of the convolutions."""

    constraint: Method
    weight_norm: bool
    initial_radius: float


class _PositiveConcave(Recurrent):
    """What the linear and convolutional layers share."""

    def __init__(
        self,
        maps: Maps,
        activation: str | Activation,
        *,
        constraint: Method = "square",
        weight_norm: bool = False,
        initial_radius: float = 0.9,
        **options: Unpack[RecurrentOptions],
    ) -> None:
        sigma = get_activation(activation)
        super().__init__(
            maps,
            lambda recurrent: nn.Sequential(
                nonnegative(recurrent, method=constraint, normalize=weight_norm), Inject(), Activate(sigma)
            ),
            # With sigma(0) = 0 the proof needs b > 0.
            "relu" if sigma.at_zero > 0 else "softplus",
            **options,
        )
        self.initial_radius = initial_radius
        self._initialise_recurrent()

    def _initialise_recurrent(self) -> None:
        self._draw(self.initial_radius, signed=False)


class PositiveConcaveLinear(_PositiveConcave):
    """z = sigma(W z + b(x)), W a nonnegative (features, features) matrix: exists, is unique, converges geometrically.

    Args:
        in_features: features of the input.
        features: width of the equilibrium.
        activation: a name in `perron.activations.ACTIVATIONS`; "identity" is certified only while rho(W) < 1.
        constraint: "square" or "projection", see `perron.constraints.Nonnegative`.
        weight_norm: weight normalisation, as in the paper.
        initial_radius: about the spectral radius of W at initialisation.
        injection: "inside" (b = softplus or relu of an affine map of x), "pre" (the input is the pre-activation of b,
            as after a BatchNorm) or "given" (the input is b itself, checked).
        bias: of the affine input map.
        solver: default `Auto()`.
        gradient: of `perron.gradients`, see `Equilibrium`.
        device, dtype: of the parameters.

    Shape:
        input (batch, in_features), output (batch, features).

    Raises:
        ValueError: wrong shape, negative given injection, inconsistent options.
        TypeError: the input is not floating point, or more precise than the layer; an unknown option.

    >>> import torch
    >>> layer = PositiveConcaveLinear(4, 8)
    >>> layer(torch.randn(16, 4)).shape
    torch.Size([16, 8])
    >>> layer.certificate().unique
    True
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        activation: str | Activation = "tanh",
        **options: Unpack[PositiveConcaveOptions],
    ) -> None:
        super().__init__(LinearMaps(in_features, features), activation, **options)


class _PositiveConcaveConv(_PositiveConcave):
    """z = sigma(K * z + b(x)), K a nonnegative convolution kernel that keeps the spatial size.

    Args:
        in_features, features: channels of the input and of the equilibrium.
        kernel_size: odd; both convolutions pad by (kernel_size - 1)/2 with zeros and have stride 1.
        activation: and further options as in `PositiveConcaveLinear`.

    Shape:
        input (batch, in_features, *spatial), output (batch, features, *spatial).

    Raises:
        ValueError: even kernel_size, or as in `PositiveConcaveLinear`, where TypeError is, too.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        kernel_size: int = 3,
        activation: str | Activation = "tanh",
        **options: Unpack[PositiveConcaveOptions],
    ) -> None:
        super().__init__(ConvolutionalMaps(self.dims, in_features, features, kernel_size), activation, **options)


class PositiveConcaveConv1d(_PositiveConcaveConv):
    dims = 1


class PositiveConcaveConv2d(_PositiveConcaveConv):
    dims = 2


class PositiveConcaveConv3d(_PositiveConcaveConv):
    dims = 3
