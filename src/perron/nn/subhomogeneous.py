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
from perron.nn.recurrent import InputMode, Recurrent, convolutional_maps, linear_maps
from perron.solvers import Solver

__all__ = ["SubhomogeneousConv1d", "SubhomogeneousConv2d", "SubhomogeneousConv3d", "SubhomogeneousLinear"]

Weights = Literal["nonnegative", "signed", "signed_bounded"]

# Of the largest gain below 1 at which the signed_bounded weights are kept.
_GAIN = 0.95


class _Subhomogeneous(Recurrent):
    """What the linear and convolutional layers share."""

    def __init__(
        self,
        in_features: int,
        features: int,
        maps: tuple[nn.Module, nn.Module],
        *,
        activation: str | Activation,
        normalize: float | None,
        normalize_dim: int | None,
        weights: Weights,
        injection: InputMode,
        initial_radius: float,
        solver: Solver | None,
    ) -> None:
        if weights not in ("nonnegative", "signed", "signed_bounded"):
            raise ValueError(f"weights must be 'nonnegative', 'signed' or 'signed_bounded', got {weights!r}")
        if not 0 <= initial_radius < float("inf"):
            raise ValueError(f"initial_radius must be finite and not negative, got {initial_radius}")
        if weights == "signed_bounded" and normalize is not None:
            raise ValueError(
                "with a normalisation no bound on signed weights is known to certify; use 'nonnegative' or 'signed'"
            )
        sigma = get_activation(activation)
        recurrent, affine = maps
        cell = nn.Sequential(recurrent, Activate(sigma), Inject())
        if normalize is not None:
            cell.append(Normalize(normalize, normalize_dim))
        super().__init__(in_features, features, cell, affine, mode=injection, positivity="relu", solver=solver)
        self.weights, self.initial_radius = weights, initial_radius
        if weights == "nonnegative":
            nonnegative(recurrent)
        elif weights == "signed_bounded":
            line = torch.full((1,), math.inf, dtype=torch.float64)
            slope = float(sigma.steepest(-line, line))
            if not slope < math.inf:
                raise ValueError(
                    f"the slope of {sigma.name!r} is not bounded on the whole line; use 'nonnegative' weights"
                )
            bounded_rows(recurrent, bound=_GAIN / slope)
        self._initialise_recurrent()

    @property
    def activation(self) -> Activation:
        return self.cell[1].activation  # type: ignore[index, return-value, union-attr]

    def _initialise_recurrent(self) -> None:
        """W uniform, nonnegative or centred, with mean absolute row sum `initial_radius`, and within its bound."""
        radius = self.initial_radius
        if self.weights == "signed_bounded":
            # Rows longer than the mean must stay within the bound.
            bound = self.recurrent.parametrizations.weight[0].bound  # type: ignore[union-attr, index]
            radius = min(radius, 0.5 * bound)
        self._draw(0 if self.weights == "nonnegative" else -2 * radius, 2 * radius)

    def _describe(self) -> str:
        norm = f", {self.cell[3].extra_repr()}" if len(self.cell) > 3 else ""  # type: ignore[arg-type, index, operator, union-attr]
        return f"activation={self.activation.name!r}, weights={self.weights!r}{norm}"


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
        injection: "inside" (b = relu of an affine map of x), "pre" (b = relu of the input) or "given".
        bias: of the affine input map.
        initial_radius: mean absolute row sum of W at initialisation.
        solver: default `Auto()`.

    Shape:
        input (batch, in_features), output (batch, features).

    Raises:
        ValueError: wrong shape, inconsistent options.
        TypeError: the input is not floating point, or more precise than the layer.

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
        *,
        normalize: float | None = None,
        normalize_dim: int | None = None,
        weights: Weights = "nonnegative",
        injection: InputMode = "inside",
        bias: bool = True,
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
            normalize=normalize,
            normalize_dim=normalize_dim,
            weights=weights,
            injection=injection,
            initial_radius=initial_radius,
            solver=solver,
        )


class _SubhomogeneousConv(_Subhomogeneous):
    """z = N(sigma(K * z) + b(x)) with a kernel K that keeps the spatial size.

    Args:
        in_features, features: channels of the input and of the equilibrium.
        kernel_size: odd; both convolutions pad by (kernel_size - 1)/2 with zeros and have stride 1.
        activation, normalize, normalize_dim, weights, injection, bias, initial_radius, solver: as in
            `SubhomogeneousLinear`; normalize_dim=1 divides by the norm over channels.

    Shape:
        input (batch, in_features, *spatial), output (batch, features, *spatial).

    Raises:
        ValueError: even kernel_size, wrong shape, inconsistent options.
        TypeError: the input is not floating point, or more precise than the layer.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        kernel_size: int = 3,
        activation: str | Activation = "tanh+1.2",
        *,
        normalize: float | None = None,
        normalize_dim: int | None = None,
        weights: Weights = "nonnegative",
        injection: InputMode = "inside",
        bias: bool = True,
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
            normalize=normalize,
            normalize_dim=normalize_dim,
            weights=weights,
            injection=injection,
            initial_radius=initial_radius,
            solver=solver,
        )


class SubhomogeneousConv1d(_SubhomogeneousConv):
    __doc__ = _SubhomogeneousConv.__doc__
    dims = 1


class SubhomogeneousConv2d(_SubhomogeneousConv):
    __doc__ = _SubhomogeneousConv.__doc__
    dims = 2


class SubhomogeneousConv3d(_SubhomogeneousConv):
    __doc__ = _SubhomogeneousConv.__doc__
    dims = 3
