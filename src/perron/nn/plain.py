"""A deep equilibrium layer without any constraint: the reference that has no guarantee.

Source: Bai, Kolter, Koltun, "Deep equilibrium models", NeurIPS 2019 (arXiv 1909.01377).
"""

from __future__ import annotations

import torch
from torch import nn

from perron.activations import Activation, get_activation
from perron.cells import Activate, Inject
from perron.nn.recurrent import InputMode, Recurrent, linear_maps
from perron.solvers import Solver

__all__ = ["PlainLinear"]


class PlainLinear(Recurrent):
    """z = sigma(W z + b(x)), W and b of any sign: solved and reported as observed, certified only where luck has it.

    `certificate()` says what holds for the present W: none in general, "bounded gain" or "monotone" while W is small.

    Args:
        in_features: features of the input.
        features: width of the equilibrium.
        activation: a name in `perron.activations`.
        injection: "inside" (b is an affine map of x), or "pre" or "given" (the input is b).
        bias: of the affine input map.
        initial_radius: mean absolute row sum of W at initialisation.
        solver: default `Auto()`.

    Shape:
        input (batch, in_features), output (batch, features).

    Raises:
        ValueError: wrong shape, inconsistent options.
        TypeError: the input is not floating point, or more precise than the layer.

    >>> bool(PlainLinear(4, 8, initial_radius=8.0).certificate())
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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sigma = get_activation(activation)
        recurrent, affine = linear_maps(in_features, features, bias=bias, device=device, dtype=dtype)
        cell = nn.Sequential(recurrent, Inject(), Activate(sigma))
        super().__init__(in_features, features, cell, affine, mode=injection, positivity="free", solver=solver)
        self.initial_radius = initial_radius
        self._initialise_recurrent()

    def _initialise_recurrent(self) -> None:
        """W uniform and centred, with mean absolute row sum `initial_radius`."""
        self._draw(-2 * self.initial_radius, 2 * self.initial_radius)

    def _describe(self) -> str:
        return f"activation={self.cell[2].activation.name!r}"  # type: ignore[index, union-attr]
