"""Positive concave equilibrium layers (pcDEQ): z = sigma(W z + b), W >= 0, sigma concave and nondecreasing.

Source: Gabor, Piotrowski, Cavalcante, "Positive concave deep equilibrium models", ICML 2024 (arXiv 2402.04029).
Differences by choice: W starts at a spectral radius near 0.9 instead of near 0, so that the equilibrium is one from the
first step on, and stays nonnegative by parametrisation instead of projection (`constraint="projection"` for that).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from perron.activations import Activation, get_activation
from perron.cells import Activate, Inject
from perron.constraints import Method, nonnegative
from perron.nn.equilibrium import Equilibrium, Injection
from perron.solvers import Solver

__all__ = ["PositiveConcaveConv1d", "PositiveConcaveConv2d", "PositiveConcaveConv3d", "PositiveConcaveLinear"]

InputMode = Literal["inside", "pre", "given"]

_CONVOLUTIONS: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class _PositiveConcave(Equilibrium):
    """What the linear and convolutional layers share."""

    dims = 0
    input: nn.Module | None

    def __init__(
        self,
        in_features: int,
        features: int,
        recurrent: nn.Module,
        affine: nn.Module,
        *,
        activation: str | Activation,
        injection: InputMode,
        constraint: Method,
        weight_norm: bool,
        initial_radius: float,
        solver: Solver | None,
    ) -> None:
        if injection not in ("inside", "pre", "given"):
            raise ValueError(f"injection must be 'inside', 'pre' or 'given', got {injection!r}")
        if injection != "inside" and in_features != features:
            raise ValueError(
                f"with injection={injection!r} the input is the injection: in_features={in_features} must equal {features}"
            )
        if not 0 <= initial_radius < float("inf"):
            raise ValueError(f"initial_radius must be finite and not negative, got {initial_radius}")
        sigma = get_activation(activation)
        # With sigma(0) = 0 the proof needs b > 0.
        positivity: Injection = "given" if injection == "given" else ("relu" if sigma.at_zero > 0 else "softplus")
        super().__init__(nn.Sequential(recurrent, Inject(), Activate(sigma)), injection=positivity, solver=solver)
        self.in_features, self.features = in_features, features
        self.input = affine if injection == "inside" else None
        self.initial_radius = initial_radius
        nonnegative(recurrent, method=constraint, normalize=weight_norm)
        self._initialise_recurrent()

    @property
    def weight(self) -> Tensor:
        """The nonnegative W."""
        return self.cell[0].weight  # type: ignore[index, return-value, union-attr]

    @property
    def activation(self) -> Activation:
        return self.cell[2].activation  # type: ignore[index, return-value, union-attr]

    def reset_parameters(self) -> None:
        """Draw W anew, uniform with mean row sum `initial_radius`, and the affine input map as torch does."""
        self._initialise_recurrent()
        if self.input is not None:
            self.input.reset_parameters()  # type: ignore[operator]

    @torch.no_grad()
    def _initialise_recurrent(self) -> None:
        weight = self.weight
        fan = max(weight[0].numel(), 1) if len(weight) else 1
        self.cell[0].weight = torch.rand_like(weight) * (2 * self.initial_radius / fan)  # type: ignore[index, union-attr]

    def _pre_injection(self, x: Tensor) -> Tensor:
        self._check_input(x)
        name = "features" if self.dims == 0 else "channels"
        wanted = "(batch, " + ", ".join([str(self.in_features), *["*"] * self.dims]) + ")"
        if x.dim() != 2 + self.dims or x.shape[1] != self.in_features:
            raise ValueError(f"the input must be {wanted} ({self.in_features} {name}), got {tuple(x.shape)}")
        if self.input is None:
            return x
        dtype = self._parameter_dtype()
        return self.input(x if dtype is None else x.to(dtype))

    def extra_repr(self) -> str:
        mode = "inside" if self.input is not None else ("given" if self.injection == "given" else "pre")
        return f"{self.in_features}, {self.features}, activation={self.activation.name!r}, injection={mode!r}, solver={self.solver}"


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
            nn.Linear(features, features, bias=False, device=device, dtype=dtype),
            nn.Linear(in_features, features, bias=bias, device=device, dtype=dtype),
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
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size must be odd and positive, so that the spatial size is kept, got {kernel_size}"
            )
        convolution = _CONVOLUTIONS[self.dims]
        padding = (kernel_size - 1) // 2
        super().__init__(
            in_features,
            features,
            convolution(features, features, kernel_size, padding=padding, bias=False, device=device, dtype=dtype),
            convolution(in_features, features, kernel_size, padding=padding, bias=bias, device=device, dtype=dtype),
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
