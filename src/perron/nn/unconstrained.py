"""Deep equilibrium layers without any constraint: the reference that has no guarantee.

Source: Bai, Kolter, Koltun, "Deep equilibrium models", NeurIPS 2019 (arXiv 1909.01377).
"""

from __future__ import annotations

from torch import nn

from perron.activations import Activation
from perron.cells.activation import Activate
from perron.cells.injection import Inject
from perron.nn.recurrent import ConvolutionalMaps, LinearMaps, Maps, Recurrent, RecurrentOptions, Unpack

__all__ = ["UnconstrainedConv2d", "UnconstrainedLinear", "UnconstrainedOptions"]


class UnconstrainedOptions(RecurrentOptions, total=False):
    """Options of `UnconstrainedLinear` and of the convolution."""

    initial_radius: float


class _Unconstrained(Recurrent):
    """What the linear and the convolutional layer share."""

    def __init__(
        self,
        maps: Maps,
        activation: str | Activation,
        *,
        initial_radius: float = 0.9,
        **options: Unpack[RecurrentOptions],
    ) -> None:
        super().__init__(
            maps, lambda recurrent: nn.Sequential(recurrent, Inject(), Activate(activation)), "free", **options
        )
        self.initial_radius = initial_radius
        self._initialise_recurrent()

    def _initialise_recurrent(self) -> None:
        self._draw(self.initial_radius, signed=True)

    def _describe(self) -> str:
        return f", gradient={self.gradient!r}"


class UnconstrainedLinear(_Unconstrained):
    """z = sigma(W z + b(x)), W and b of any sign: solved and reported as observed, certified only where luck has it.

    `certificate()` says what holds for the present W: none in general, "bounded gain" or "monotone operator" while W is small.

    Args:
        in_features: features of the input.
        features: width of the equilibrium.
        activation: a name in `perron.activations`.
        initial_radius: mean absolute row sum of W at initialisation.
        injection, bias, solver, device, dtype: as in `MonotoneLinear`.
        gradient: of `perron.gradients`, see `Equilibrium`; `perron.nn.penalties` has penalties on its Jacobian.

    Shape:
        input (batch, in_features), output (batch, features).

    Raises:
        ValueError, TypeError: as in `PositiveConcaveLinear`, but that b may have any sign.

    >>> bool(UnconstrainedLinear(4, 8, initial_radius=8.0).certificate())
    False
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        activation: str | Activation = "tanh",
        **options: Unpack[UnconstrainedOptions],
    ) -> None:
        super().__init__(LinearMaps(in_features, features), activation, **options)


class UnconstrainedConv2d(_Unconstrained):
    """z = sigma(K * z + b(x)) with a kernel K that keeps the spatial size, otherwise as `UnconstrainedLinear`.

    Args:
        in_features, features: channels of the input and of the equilibrium.
        kernel_size: odd; both convolutions pad by (kernel_size - 1)/2 with zeros and have stride 1.
        activation: and further options as in `UnconstrainedLinear`.

    Shape:
        input (batch, in_features, height, width), output (batch, features, height, width).

    Raises:
        ValueError: even kernel_size, or as in `UnconstrainedLinear`, where TypeError is, too.
    """

    dims = 2

    def __init__(
        self,
        in_features: int,
        features: int,
        kernel_size: int = 3,
        activation: str | Activation = "tanh",
        **options: Unpack[UnconstrainedOptions],
    ) -> None:
        super().__init__(ConvolutionalMaps(self.dims, in_features, features, kernel_size), activation, **options)
