"""Subhomogeneous equilibrium layers (SubDEQ): z = N((sigma(W z) + s)^theta + b), N a division by a norm, or nothing.

Source: Sittoni, Tudisco, "Subhomogeneous deep equilibrium models", ICML 2024 (arXiv 2403.00720). The reference layers
have W of any sign, where uniqueness can fail; that is `weights="signed"` here, certified sample by sample where it can be
(see `perron.theory.contraction`), and "nonnegative" and "signed_bounded" keep W where the certificate holds for every input.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

from perron.activations import Activation, get_activation
from perron.cells.activation import Activate
from perron.cells.injection import Inject
from perron.cells.normalization import Normalize
from perron.constraints import bounded_rows, nonnegative
from perron.nn.recurrent import Affine, ConvolutionalMaps, LinearMaps, Maps, Recurrent, RecurrentOptions, Unpack

__all__ = [
    "SubhomogeneousConv1d",
    "SubhomogeneousConv2d",
    "SubhomogeneousConv3d",
    "SubhomogeneousLinear",
    "SubhomogeneousOptions",
    "Weights",
]

Weights = Literal["nonnegative", "signed", "signed_bounded"]

# Of the largest gain below 1 at which the signed_bounded weights are kept.
_GAIN = 0.95


class SubhomogeneousOptions(RecurrentOptions, total=False):
    """Options of `SubhomogeneousLinear` and of the convolutions."""

    normalize: float | None
    normalize_dim: int | None
    weights: Weights
    initial_radius: float


class _Subhomogeneous(Recurrent):
    """What the linear and convolutional layers share."""

    def __init__(
        self,
        maps: Maps,
        activation: str | Activation,
        *,
        normalize: float | None = None,
        normalize_dim: int | None = None,
        weights: Weights = "nonnegative",
        initial_radius: float = 0.9,
        **options: Unpack[RecurrentOptions],
    ) -> None:
        if weights not in ("nonnegative", "signed", "signed_bounded"):
            raise ValueError(f"weights must be 'nonnegative', 'signed' or 'signed_bounded', got {weights!r}")
        if weights == "signed_bounded" and normalize is not None:
            raise ValueError(
                "with a normalisation no bound on signed weights is known to certify; use 'nonnegative' or 'signed'"
            )
        sigma = get_activation(activation)
        bound = _largest_row(sigma) if weights == "signed_bounded" else math.inf

        def cell(recurrent: Affine) -> nn.Sequential:
            if weights == "nonnegative":
                nonnegative(recurrent)
            elif weights == "signed_bounded":
                bounded_rows(recurrent, bound=bound)
            norm = [] if normalize is None else [Normalize(normalize, normalize_dim)]
            return nn.Sequential(recurrent, Activate(sigma), Inject(), *norm)

        super().__init__(maps, cell, "relu", **options)
        self.weights, self.initial_radius, self._bound = weights, initial_radius, bound
        self._initialise_recurrent()

    def _initialise_recurrent(self) -> None:
        # Rows longer than the mean must stay within the bound.
        self._draw(min(self.initial_radius, 0.5 * self._bound), signed=self.weights != "nonnegative")

    def _describe(self) -> str:
        norms = [f", {step.extra_repr()}" for step in self.cell if isinstance(step, Normalize)]
        return f", weights={self.weights!r}{''.join(norms)}"


def _largest_row(sigma: Activation) -> float:
    """The sum |W_ij| of a row that the activation, at its steepest, makes a gain of `_GAIN`."""
    line = torch.full((1,), math.inf, dtype=torch.float64)
    slope = float(sigma.steepest(-line, line))
    if not slope < math.inf:
        raise ValueError(f"the slope of {sigma.name!r} is not bounded on the whole line; use 'nonnegative' weights")
    return _GAIN / slope


class SubhomogeneousLinear(_Subhomogeneous):
    """z = N(sigma(W z) + b(x)) with a subhomogeneous sigma: a contraction in Thompson's metric where W >= 0.

    Args:
        in_features: features of the input.
        features: width of the equilibrium.
        activation: a name as in `perron.activations`, with shift and power: "tanh+1.2", "(sigmoid+0.1)^0.5", ...
        normalize: None, or the p of the norm that z is divided by (doubles the degree).
        normalize_dim: None for the norm of the whole sample, or the dimension it sums over.
        weights: "nonnegative" (certified for every input), "signed" (certified for the samples where the weighted sup
            norm contracts on the box of possible values) or "signed_bounded" (absolute row sums times the largest slope
            at most 0.95: certified for every input; not with `normalize`).
        initial_radius: mean absolute row sum of W at initialisation.
        injection: "inside" (b = relu of an affine map of x), "pre" (b = relu of the input) or "given".
        bias, solver, gradient, device, dtype: as in `PositiveConcaveLinear`.

    Shape:
        input (batch, in_features), output (batch, features).

    Raises:
        ValueError: wrong shape, signed_bounded weights with `normalize` or with slopes that have no bound.
        TypeError: the input is not floating point, or more precise than the layer; an unknown option.

    >>> layer = SubhomogeneousLinear(4, 8, normalize=float("inf"))
    >>> layer.certificate().kind, layer.certificate().rate < 0.5
    ('subhomogeneous', True)
    >>> layer.solve(torch.randn(16, 4)).certified
    True
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        activation: str | Activation = "tanh+1.2",
        **options: Unpack[SubhomogeneousOptions],
    ) -> None:
        super().__init__(LinearMaps(in_features, features), activation, **options)


class _SubhomogeneousConv(_Subhomogeneous):
    """z = N(sigma(K * z) + b(x)) with a kernel K that keeps the spatial size.

    Args:
        in_features, features: channels of the input and of the equilibrium.
        kernel_size: odd; both convolutions pad by (kernel_size - 1)/2 with zeros and have stride 1.
        activation: and further options as in `SubhomogeneousLinear`; normalize_dim=1 divides by the norm over channels.

    Shape:
        input (batch, in_features, *spatial), output (batch, features, *spatial).

    Raises:
        ValueError: even kernel_size, or as in `SubhomogeneousLinear`, where TypeError is, too.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        kernel_size: int = 3,
        activation: str | Activation = "tanh+1.2",
        **options: Unpack[SubhomogeneousOptions],
    ) -> None:
        super().__init__(ConvolutionalMaps(self.dims, in_features, features, kernel_size), activation, **options)


class SubhomogeneousConv1d(_SubhomogeneousConv):
    dims = 1


class SubhomogeneousConv2d(_SubhomogeneousConv):
    dims = 2


class SubhomogeneousConv3d(_SubhomogeneousConv):
    dims = 3
