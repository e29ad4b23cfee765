"""Positive concave equilibrium layers (pcDEQ): z = sigma(W z + b), W >= 0, sigma concave and nondecreasing.

Source: Gabor, Piotrowski, Cavalcante, "Positive concave deep equilibrium models", ICML 2024 (arXiv 2402.04029).
Differences by choice: W starts at a spectral radius near 0.9 instead of near 0, so that the equilibrium is one from the
first step on, and stays nonnegative by parametrisation instead of projection (`constraint="projection"` for that).
"""

from __future__ import annotations

import torch
from torch import nn

from perron.activations import Activation, get_activation
from perron.cells.activation import Activate
from perron.cells.injection import Inject
from perron.constraints import Method, nonnegative
from perron.nn.recurrent import InputMode, Recurrent, convolutional_maps, linear_maps
from perron.solvers import Solver

__all__ = ["PositiveConcaveConv1d", "PositiveConcaveConv2d", "PositiveConcaveConv3d", "PositiveConcaveLinear"]


class _PositiveConcave(Recurrent):
    """What the linear and convolutional layers share."""

    def __init__(
        self,
        in_features: int,
        features: int,
        maps: tuple[nn.Module, nn.Module],
        *,
        activation: str | Activation,
        injection: InputMode,
        constraint: Method,
        weight_norm: bool,
        initial_radius: float,
        solver: Solver | None,
    ) -> None:
        if not 0 <= initial_radius < float("inf"):
            raise ValueError(f"initial_radius must be finite and not negative, got {initial_radius}")
        sigma = get_activation(activation)
        recurrent, affine = maps
        super().__init__(
            in_features,
            features,
            nn.Sequential(recurrent, Inject(), Activate(sigma)),
            affine,
            mode=injection,
            # With sigma(0) = 0 the proof needs b > 0.
            positivity="relu" if sigma.at_zero > 0 else "softplus",
            solver=solver,
        )
        self.initial_radius = initial_radius
        nonnegative(recurrent, method=constraint, normalize=weight_norm)
        self._initialise_recurrent()

    @property
    def activation(self) -> Activation:
        return self.cell[2].activation  # type: ignore[index, return-value, union-attr]

    def _initialise_recurrent(self) -> None:
        """W uniform with mean row sum `initial_radius`."""
        self._draw(0, 2 * self.initial_radius)

    def _describe(self) -> str:
        return f"activation={self.activation.name!r}"


class PositiveConcaveLinear(_PositiveConcave):
    """z = sigma(W z + b(x)), W a nonnegative (features, features) matrix: exists, is unique, converges geometrically.

    Args:
        in_features: features of the input.
        features: width of the equilibrium.
        activation: a name in `perron.activations.ACTIVATIONS`; "identity" is certified only while rho(W) < 1.
        injection: "inside" (b = softplus or relu of an affine map of x), "pre" (the input is the pre-activation of b,
            as after a BatchNorm) or "given" (the input is b itself, checked).
        bias: of the affine input map.
        constraint: "square" or "projection", see `perron.constraints.Nonnegative`.
        weight_norm: weight normalisation, as in the paper.
        initial_radius: about the spectral radius of W at initialisation.
        solver: default `Auto()`.

    Shape:
        input (batch, in_features), output (batch, features).

    Raises:
        ValueError: wrong shape, negative given injection, inconsistent options.
        TypeError: the input is not floating point, or more precise than the layer.

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
        *,
        injection: InputMode = "inside",
        bias: bool = True,
        constraint: Method = "square",
        weight_norm: bool = False,
        initial_radius: float = 0.9,
        solver: Solver | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features,
            features,
            linear_maps(in_features, features, bias=bias, device=device, dtype=dtype),
            activation=activation,
            injection=injection,
            constraint=constraint,
            weight_norm=weight_norm,
            initial_radius=initial_radius,
            solver=solver,
        )


class _PositiveConcaveConv(_PositiveConcave):
    """z = sigma(K * z + b(x)), K a nonnegative convolution kernel that keeps the spatial size.

    Args:
        in_features, features: channels of the input and of the equilibrium.
        kernel_size: odd; both convolutions pad by (kernel_size - 1)/2 with zeros and have stride 1.
        activation, injection, bias, constraint, weight_norm, initial_radius, solver: as in `PositiveConcaveLinear`.

    Shape:
        input (batch, in_features, *spatial), output (batch, features, *spatial).

    Raises:
        ValueError: even kernel_size, wrong shape, negative given injection, inconsistent options.
        TypeError: the input is not floating point, or more precise than the layer.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        kernel_size: int = 3,
        activation: str | Activation = "tanh",
        *,
        injection: InputMode = "inside",
        bias: bool = True,
        constraint: Method = "square",
        weight_norm: bool = False,
        initial_radius: float = 0.9,
        solver: Solver | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features,
            features,
            convolutional_maps(self.dims, in_features, features, kernel_size, bias=bias, device=device, dtype=dtype),
            activation=activation,
            injection=injection,
            constraint=constraint,
            weight_norm=weight_norm,
            initial_radius=initial_radius,
            solver=solver,
        )


class PositiveConcaveConv1d(_PositiveConcaveConv):
    __doc__ = _PositiveConcaveConv.__doc__
    dims = 1


class PositiveConcaveConv2d(_PositiveConcaveConv):
    __doc__ = _PositiveConcaveConv.__doc__
    dims = 2


class PositiveConcaveConv3d(_PositiveConcaveConv):
    __doc__ = _PositiveConcaveConv.__doc__
    dims = 3
