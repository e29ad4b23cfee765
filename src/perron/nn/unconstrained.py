"""Deep equilibrium layers without any constraint: the reference that has no guarantee.

Source: Bai, Kolter, Koltun, "Deep equilibrium models", NeurIPS 2019 (arXiv 1909.01377).
"""

from __future__ import annotations

import torch
from torch import nn

from perron.activations import Activation
from perron.cells.activation import Activate
from perron.cells.injection import Inject
from perron.gradients import Gradient
from perron.nn.recurrent import InputMode, Recurrent, convolutional_maps, linear_maps
from perron.solvers import Solver

__all__ = ["UnconstrainedConv2d", "UnconstrainedLinear"]


class _Unconstrained(Recurrent):
    """What the linear and the convolutional layer share."""

    def __init__(
        self,
        in_features: int,
        features: int,
        maps: tuple[nn.Module, nn.Module],
        *,
        activation: str | Activation,
        injection: InputMode,
        initial_radius: float,
        solver: Solver | None,
        gradient: Gradient | None,
    ) -> None:
        recurrent, affine = maps
        cell = nn.Sequential(recurrent, Inject(), Activate(activation))
        super().__init__(
            in_features, features, cell, affine, mode=injection, positivity="free", solver=solver, gradient=gradient
        )
        self.initial_radius = initial_radius
        self._initialise_recurrent()

    def _initialise_recurrent(self) -> None:
        """W uniform and centred, with mean absolute row sum `initial_radius`."""
        self._draw(-2 * self.initial_radius, 2 * self.initial_radius)

    def _describe(self) -> str:
        return f"activation={self.cell[2].activation.name!r}, gradient={self.gradient!r}"  # type: ignore[index, union-attr]


class UnconstrainedLinear(_Unconstrained):
    """z = sigma(W z + b(x)), W and b of any sign: solved and reported as observed, certified only where luck has it.

    `certificate()` says what holds for the present W: none in general, "bounded gain" or "monotone operator" while W is small.

    Args:
        in_features: features of the input.
        features: width of the equilibrium.
        activation: a name in `perron.activations`.
        injection: "inside" (b is an affine map of x), or "pre" or "given" (the input is b).
        bias: of the affine input map.
        initial_radius: mean absolute row sum of W at initialisation.
        solver: default `Auto()`.
        gradient: of `perron.gradients`, see `Equilibrium`. `perron.nn.penalties` has
            regularisations of its Jacobian.

    Shape:
        input (batch, in_features), output (batch, features).

    Raises:
        ValueError: wrong shape, inconsistent options.
        TypeError: the input is not floating point, or more precise than the layer.

    >>> bool(UnconstrainedLinear(4, 8, initial_radius=8.0).certificate())
    False
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        activation: str | Activation = "tanh",
        *,
        injection: InputMode = "inside",
        bias: bool = True,
        initial_radius: float = 0.9,
        solver: Solver | None = None,
        gradient: Gradient | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features,
            features,
            linear_maps(in_features, features, bias=bias, device=device, dtype=dtype),
            activation=activation,
            injection=injection,
            initial_radius=initial_radius,
            solver=solver,
            gradient=gradient,
        )


class UnconstrainedConv2d(_Unconstrained):
    """z = sigma(K * z + b(x)) with a kernel K that keeps the spatial size, otherwise as `UnconstrainedLinear`.

    Args:
        in_features, features: channels of the input and of the equilibrium.
        kernel_size: odd; both convolutions pad by (kernel_size - 1)/2 with zeros and have stride 1.
        activation, injection, bias, initial_radius, solver, gradient: as in `UnconstrainedLinear`.

    Shape:
        input (batch, in_features, height, width), output (batch, features, height, width).

    Raises:
        ValueError: even kernel_size, wrong shape, inconsistent options.
        TypeError: the input is not floating point, or more precise than the layer.
    """

    dims = 2

    def __init__(
        self,
        in_features: int,
        features: int,
        kernel_size: int = 3,
        activation: str | Activation = "tanh",
        *,
        injection: InputMode = "inside",
        bias: bool = True,
        initial_radius: float = 0.9,
        solver: Solver | None = None,
        gradient: Gradient | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features,
            features,
            convolutional_maps(self.dims, in_features, features, kernel_size, bias=bias, device=device, dtype=dtype),
            activation=activation,
            injection=injection,
            initial_radius=initial_radius,
            solver=solver,
            gradient=gradient,
        )
