"""What layers with one recurrent map W and one affine input map share: shapes, modes of injection, the input map."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from perron.gradients import Gradient
from perron.nn.equilibrium import Equilibrium, Injection
from perron.solvers import Solver

__all__ = ["InputMode", "Recurrent", "convolutional_maps", "linear_maps"]

InputMode = Literal["inside", "pre", "given"]

_CONVOLUTIONS: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def linear_maps(
    in_features: int, features: int, *, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[nn.Module, nn.Module]:
    """The recurrent and the input map of a linear layer."""
    recurrent = nn.Linear(features, features, bias=False, device=device, dtype=dtype)
    return recurrent, nn.Linear(in_features, features, bias=bias, device=device, dtype=dtype)


def convolutional_maps(
    dims: int,
    in_features: int,
    features: int,
    kernel_size: int,
    *,
    bias: bool,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> tuple[nn.Module, nn.Module]:
    """The recurrent and the input map of a convolutional layer that keeps the spatial size.

    Raises:
        ValueError: kernel_size is even or not positive.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive, so that the spatial size is kept, got {kernel_size}")
    convolution, padding = _CONVOLUTIONS[dims], (kernel_size - 1) // 2
    recurrent = convolution(features, features, kernel_size, padding=padding, bias=False, device=device, dtype=dtype)
    return recurrent, convolution(
        in_features, features, kernel_size, padding=padding, bias=bias, device=device, dtype=dtype
    )


class Recurrent(Equilibrium):
    """An equilibrium whose cell begins with a map W of the state, and whose injection comes from an affine map of x.

    Args:
        in_features: features or channels of the input.
        features: those of the equilibrium.
        cell: a Sequential that begins with W.
        affine: the input map.
        mode: "inside" (b is made of affine(x)), "pre" (of the input itself) or "given" (the input is b).
        positivity: how b is made, see `Equilibrium`; in mode "given" only "free" has an effect.
        solver: default `Auto()`.
        gradient: see `Equilibrium`; an attribute of every layer.
    """

    dims = 0
    input: nn.Module | None

    def __init__(
        self,
        in_features: int,
        features: int,
        cell: nn.Sequential,
        affine: nn.Module,
        *,
        mode: InputMode,
        positivity: Injection,
        solver: Solver | None,
        gradient: Gradient | None = None,
    ) -> None:
        if mode not in ("inside", "pre", "given"):
            raise ValueError(f"injection must be 'inside', 'pre' or 'given', got {mode!r}")
        if mode != "inside" and in_features != features:
            raise ValueError(
                f"with injection={mode!r} the input is the injection: in_features={in_features} must equal {features}"
            )
        given = mode == "given" and positivity != "free"
        super().__init__(cell, injection="given" if given else positivity, solver=solver, gradient=gradient)
        self.in_features, self.features, self.mode = in_features, features, mode
        self.input = affine if mode == "inside" else None

    @property
    def recurrent(self) -> nn.Module:
        return self.cell[0]  # type: ignore[index, return-value]

    @property
    def weight(self) -> Tensor:
        """W, as the cell uses it."""
        return self.recurrent.weight  # type: ignore[return-value]

    def reset_parameters(self) -> None:
        """Draw W anew as at construction, and the affine input map as torch does."""
        self._initialise_recurrent()
        if self.input is not None:
            self.input.reset_parameters()  # type: ignore[operator]

    def _initialise_recurrent(self) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def _draw(self, low: float, high: float) -> None:
        """W uniform, so that the mean sum of a row lies between these times its length."""
        weight = self.weight
        fan = max(weight[0].numel(), 1) if len(weight) else 1
        new = torch.empty_like(weight).uniform_(low / fan, high / fan)
        if parametrize.is_parametrized(self.recurrent):
            self.recurrent.weight = new  # type: ignore[assignment]
        else:
            weight.copy_(new)

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

    def _describe(self) -> str:
        """What the layer adds to its representation."""
        return ""

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.features}, {self._describe()}, injection={self.mode!r}, solver={self.solver}"
