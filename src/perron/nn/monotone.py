"""Monotone operator equilibrium layers (monDEQ): z = sigma(W z + b), W = (1 - m) I - A^T A + B - B^T.

Source: Winston, Kolter, "Monotone operator equilibrium networks", NeurIPS 2020 (arXiv 2006.08591).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from perron.activations import Activation, get_activation
from perron.cells.activation import Activate
from perron.cells.circular import MonotoneConvolution2d
from perron.cells.injection import Inject
from perron.constraints import monotone_operator
from perron.nn.recurrent import InputMode, Recurrent, convolutional_maps, linear_maps
from perron.solvers import Solver
from perron.theory.monotone_operator import nonexpansive

__all__ = ["MonotoneConv2d", "MonotoneLinear"]


class _Monotone(Recurrent):
    """What the linear and the convolutional layer share."""

    def __init__(
        self,
        in_features: int,
        features: int,
        recurrent: nn.Module,
        affine: nn.Module,
        *,
        activation: str | Activation,
        margin: float,
        injection: InputMode,
        solver: Solver | None,
    ) -> None:
        sigma = get_activation(activation)
        if not nonexpansive(sigma):
            raise ValueError(f"{sigma.name!r} is not known to be nondecreasing with slopes up to 1 on the whole line")
        cell = nn.Sequential(recurrent, Inject(), Activate(sigma))
        super().__init__(in_features, features, cell, affine, mode=injection, positivity="free", solver=solver)
        self.margin = margin
        self._initialise_recurrent()

    def _describe(self) -> str:
        return f"activation={self.cell[2].activation.name!r}, margin={self.margin}"  # type: ignore[index, union-attr]


class MonotoneLinear(_Monotone):
    """z = sigma(W z + b(x)) with I - W strongly monotone: exists and is unique for W and b of any sign.

    Args:
        in_features: features of the input.
        features: width of the equilibrium.
        activation: nondecreasing with slopes up to 1: "relu", "tanh", "softsign", "sigmoid", "arctan", "relu6".
        margin: m; the smaller, the freer is W and the slower the solve.
        injection: "inside" (b is an affine map of x), or "pre" or "given" (the input is b).
        bias: of the affine input map.
        solver: default `Auto()`, which takes Peaceman and Rachford's steps here.

    Shape:
        input (batch, in_features), output (batch, features).

    Raises:
        ValueError: wrong shape, inconsistent options, an activation that is not known to be nondecreasing and nonexpansive.
        TypeError: the input is not floating point, or more precise than the layer.

    >>> layer = MonotoneLinear(4, 8)
    >>> layer.certificate().kind
    'monotone operator'
    >>> layer.solve(torch.randn(16, 4)).certified
    True
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        activation: str | Activation = "relu",
        *,
        margin: float = 0.1,
        injection: InputMode = "inside",
        bias: bool = True,
        solver: Solver | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        recurrent, affine = linear_maps(in_features, features, bias=bias, device=device, dtype=dtype)
        super().__init__(
            in_features,
            features,
            monotone_operator(recurrent, margin=margin),
            affine,
            activation=activation,
            margin=margin,
            injection=injection,
            solver=solver,
        )

    @torch.no_grad()
    def _initialise_recurrent(self) -> None:
        """A and B uniform as the weights of nn.Linear."""
        parameters = self.recurrent.parametrizations.weight  # type: ignore[union-attr, index]
        assert isinstance(parameters, parametrize.ParametrizationList)
        for raw in (parameters.original0, parameters.original1):
            bound = max(self.features, 1) ** -0.5
            raw.uniform_(-bound, bound)  # type: ignore[operator]


class MonotoneConv2d(_Monotone):
    """z = sigma(W z + b(x)) with W = (1 - m) I - A^T A + B - B^T of circular convolutions, otherwise as `MonotoneLinear`.

    Args:
        in_features, features: channels of the input and of the equilibrium.
        kernel_size: of A and B, which wrap around, and of the input convolution, which is padded with zeros; odd.
        activation, margin, injection, bias, solver: as in `MonotoneLinear`.

    Shape:
        input (batch, in_features, height, width), output (batch, features, height, width).

    Raises:
        ValueError: even kernel_size, wrong shape, inconsistent options, an activation as in `MonotoneLinear`.
        TypeError: the input is not floating point, or more precise than the layer.

    >>> layer = MonotoneConv2d(1, 2)
    >>> layer.solve(torch.randn(2, 1, 6, 6)).certified
    True
    """

    dims = 2

    def __init__(
        self,
        in_features: int,
        features: int,
        kernel_size: int = 3,
        activation: str | Activation = "relu",
        *,
        margin: float = 0.1,
        injection: InputMode = "inside",
        bias: bool = True,
        solver: Solver | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _, affine = convolutional_maps(2, in_features, features, kernel_size, bias=bias, device=device, dtype=dtype)
        super().__init__(
            in_features,
            features,
            MonotoneConvolution2d(features, kernel_size, margin=margin, device=device, dtype=dtype),
            affine,
            activation=activation,
            margin=margin,
            injection=injection,
            solver=solver,
        )

    def _initialise_recurrent(self) -> None:
        self.recurrent.reset_parameters()  # type: ignore[operator]
