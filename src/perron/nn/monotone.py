"""Monotone operator equilibrium layers (monDEQ): z = sigma(W z + b), W = (1 - m) I - A^T A + B - B^T.

Source: Winston, Kolter, "Monotone operator equilibrium networks", NeurIPS 2020 (arXiv 2006.08591).
"""

from __future__ import annotations

import torch
from torch import nn

from perron.activations import Activation, get_activation
from perron.cells.activation import Activate
from perron.cells.circular import MonotoneConvolution2d
from perron.cells.injection import Inject
from perron.constraints import monotone_operator
from perron.nn.recurrent import Affine, ConvolutionalMaps, LinearMaps, Maps, Recurrent, RecurrentOptions, Unpack

__all__ = ["MonotoneConv2d", "MonotoneLinear", "MonotoneOptions"]


class MonotoneOptions(RecurrentOptions, total=False):
    """Options of `MonotoneLinear` and of the convolution."""

    margin: float


class _Monotone(Recurrent):
    """What the linear and the convolutional layer share."""

    def __init__(
        self, maps: Maps, activation: str | Activation, *, margin: float = 0.1, **options: Unpack[RecurrentOptions]
    ) -> None:
        sigma = get_activation(activation)
        if not sigma.nonexpansive:
            raise ValueError(f"{sigma.name!r} is not known to be nondecreasing with slopes up to 1 on the whole line")
        super().__init__(
            maps,
            lambda recurrent: nn.Sequential(self._constrained(recurrent, margin), Inject(), Activate(sigma)),
            "free",
            **options,
        )
        self.margin = margin
        self._initialise_recurrent()

    @staticmethod
    def _constrained(recurrent: Affine, margin: float) -> nn.Module:
        """W, with that margin, in place of an unconstrained one."""
        raise NotImplementedError

    def _describe(self) -> str:
        return f", margin={self.margin}"


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
        gradient, device, dtype: as in `PositiveConcaveLinear`.

    Shape:
        input (batch, in_features), output (batch, features).

    Raises:
        ValueError: wrong shape, inconsistent options, an activation that is not known to be nondecreasing and nonexpansive.
        TypeError: the input is not floating point, or more precise than the layer; an unknown option.

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
        **options: Unpack[MonotoneOptions],
    ) -> None:
        super().__init__(LinearMaps(in_features, features), activation, **options)

    @staticmethod
    def _constrained(recurrent: Affine, margin: float) -> nn.Module:
        return monotone_operator(recurrent, margin=margin)

    @torch.no_grad()
    def _initialise_recurrent(self) -> None:
        """A and B uniform as the weights of nn.Linear."""
        for raw in self.recurrent.parameters():
            bound = max(self.features, 1) ** -0.5
            raw.uniform_(-bound, bound)


class MonotoneConv2d(_Monotone):
    """z = sigma(W z + b(x)) with W = (1 - m) I - A^T A + B - B^T of circular convolutions, otherwise as `MonotoneLinear`.

    Args:
        in_features, features: channels of the input and of the equilibrium.
        kernel_size: of A and B, which wrap around, and of the input convolution, which is padded with zeros; odd.
        activation: and further options as in `MonotoneLinear`.

    Shape:
        input (batch, in_features, height, width), output (batch, features, height, width).

    Raises:
        ValueError: even kernel_size, or as in `MonotoneLinear`, where TypeError is, too.

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
        **options: Unpack[MonotoneOptions],
    ) -> None:
        super().__init__(ConvolutionalMaps(self.dims, in_features, features, kernel_size), activation, **options)

    @staticmethod
    def _constrained(recurrent: Affine, margin: float) -> nn.Module:
        size, weight = int(recurrent.weight.shape[-1]), recurrent.weight
        return MonotoneConvolution2d(len(weight), size, margin=margin, device=weight.device, dtype=weight.dtype)

    def _initialise_recurrent(self) -> None:
        self._step(MonotoneConvolution2d).reset_parameters()
