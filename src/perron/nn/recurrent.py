"""What layers with one recurrent map W and one affine input map share: shapes, modes of injection, options, the maps."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypedDict, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import Unpack

from perron.activations import Activation
from perron.cells.activation import Activate
from perron.gradients import Gradient
from perron.nn.equilibrium import Equilibrium, Injection
from perron.solvers import Solver

__all__ = ["Affine", "ConvolutionalMaps", "InputMode", "LinearMaps", "Maps", "Recurrent", "RecurrentOptions", "Unpack"]

InputMode = Literal["inside", "pre", "given"]
Affine: TypeAlias = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
Step = TypeVar("Step", bound=nn.Module)

_CONVOLUTIONS: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class RecurrentOptions(TypedDict, total=False):
    """Options of every layer with a recurrent map; `Recurrent` has their defaults.

    A family of layers adds its own in a subclass of this record, and its constructor names those with their defaults and
    hands the others on. Every constructor shows all of them in its signature.
    """

    injection: InputMode
    bias: bool
    solver: Solver | None
    gradient: Gradient | None
    device: torch.device | str | None
    dtype: torch.dtype | None


class Maps(ABC):
    """The sizes of a layer, from which its two maps are built."""

    in_features: int
    features: int

    @abstractmethod
    def build(
        self, *, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> tuple[Affine, Affine]:
        """The recurrent map, which has no bias, and the input map."""


@dataclass(frozen=True)
class LinearMaps(Maps):
    """Of a layer on (batch, features)."""

    in_features: int
    features: int

    def build(
        self, *, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> tuple[Affine, Affine]:
        recurrent = nn.Linear(self.features, self.features, bias=False, device=device, dtype=dtype)
        return recurrent, nn.Linear(self.in_features, self.features, bias=bias, device=device, dtype=dtype)


@dataclass(frozen=True)
class ConvolutionalMaps(Maps):
    """Of a layer on (batch, channels, *spatial) that keeps the spatial size.

    Raises:
        ValueError: kernel_size is even or not positive.
    """

    dims: int
    in_features: int
    features: int
    kernel_size: int

    def __post_init__(self) -> None:
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size must be odd and positive, so that the spatial size is kept, got {self.kernel_size}"
            )

    def build(
        self, *, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> tuple[Affine, Affine]:
        def convolution(channels: int, bias: bool) -> Affine:
            return _CONVOLUTIONS[self.dims](
                channels,
                self.features,
                self.kernel_size,
                padding=self.kernel_size // 2,
                bias=bias,
                device=device,
                dtype=dtype,
            )

        recurrent = convolution(self.features, bias=False)
        return recurrent, convolution(self.in_features, bias=bias)


class Recurrent(Equilibrium):
    """An equilibrium whose cell begins with a map W of the state, and whose injection comes from an affine map of x.

    Args:
        maps: the sizes of W and of the affine map.
        cell: makes of W the Sequential that begins with it.
        positivity: how b is made, see `Equilibrium`; with injection="given" only "free" has an effect.
        injection: "inside" (b is made of the affine map of x), "pre" (of the input itself) or "given" (the input is b).
        bias: of the affine map.
        solver: default `Auto()`.
        gradient: see `Equilibrium`.
        device, dtype: of the parameters.

    Raises:
        ValueError: an unknown injection; "pre" or "given" where the input has other features than b.
        TypeError: an option that the layer does not have.
    """

    dims = 0
    cell: nn.Sequential
    input: Affine | None

    def __init__(
        self,
        maps: Maps,
        cell: Callable[[Affine], nn.Sequential],
        positivity: Injection,
        *,
        injection: InputMode = "inside",
        bias: bool = True,
        solver: Solver | None = None,
        gradient: Gradient | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **unknown: object,
    ) -> None:
        if unknown:
            options = [p.name for p in inspect.signature(type(self)).parameters.values() if p.kind is p.KEYWORD_ONLY]
            raise TypeError(f"{type(self).__name__} has no option {next(iter(unknown))!r}; it has {', '.join(options)}")
        if injection not in ("inside", "pre", "given"):
            raise ValueError(f"injection must be 'inside', 'pre' or 'given', got {injection!r}")
        if injection != "inside" and maps.in_features != maps.features:
            raise ValueError(
                f"with injection={injection!r} the input is the injection: in_features={maps.in_features} must equal "
                f"{maps.features}"
            )
        recurrent, affine = maps.build(bias=bias, device=device, dtype=dtype)
        given = injection == "given" and positivity != "free"
        super().__init__(cell(recurrent), injection="given" if given else positivity, solver=solver, gradient=gradient)
        self.in_features, self.features, self.mode = maps.in_features, maps.features, injection
        self.input = affine if injection == "inside" else None

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        if "__init__" in vars(cls):
            vars(cls)["__init__"].__signature__ = _with_options(cls)

    @property
    def recurrent(self) -> Affine:
        """The module of W."""
        return cast(Affine, self.cell[0])

    @property
    def weight(self) -> Tensor:
        """W, as the cell uses it."""
        return self.recurrent.weight

    @property
    def activation(self) -> Activation:
        return self._step(Activate).activation

    def _step(self, kind: type[Step]) -> Step:
        """The step of the cell of this class."""
        for step in self.cell:
            if isinstance(step, kind):
                return step
        raise AttributeError(f"the cell of this {type(self).__name__} has no {kind.__name__}")

    def reset_parameters(self) -> None:
        """Draw W anew as at construction, and the affine input map as torch does."""
        self._initialise_recurrent()
        if self.input is not None:
            self.input.reset_parameters()

    def _initialise_recurrent(self) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def _draw(self, radius: float, *, signed: bool) -> None:
        """W uniform, nonnegative or centred, with this mean absolute row sum.

        Raises:
            ValueError: it is negative or not finite.
        """
        if not 0 <= radius < float("inf"):
            raise ValueError(f"initial_radius must be finite and not negative, got {radius}")
        weight = self.weight
        largest = 2 * radius / max(weight[:1].numel(), 1)
        new = torch.empty_like(weight).uniform_(-largest if signed else 0, largest)
        if parametrize.is_parametrized(self.recurrent):
            self.recurrent.weight = new
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
        value: Tensor = self.input(x if dtype is None else x.to(dtype))
        return value

    def _describe(self) -> str:
        """What the layer adds to its representation."""
        return ""

    def extra_repr(self) -> str:
        own = f"activation={self.activation.name!r}{self._describe()}"
        return f"{self.in_features}, {self.features}, {own}, injection={self.mode!r}, solver={self.solver}"


def _with_options(cls: type[Recurrent]) -> inspect.Signature:
    """The signature of a constructor, with the options that it hands on to the next one by their names and defaults."""
    own = inspect.signature(vars(cls)["__init__"])
    *named, last = own.parameters.values()
    if last.kind is not last.VAR_KEYWORD:
        return own
    following = inspect.signature(super(cls, cls).__init__).parameters
    handed_on = [p for p in following.values() if p.kind is p.KEYWORD_ONLY and p.name not in own.parameters]
    return own.replace(parameters=[*named, *handed_on])
