"""Cells f(z; b) as plain functions of tensors: read once from a module, then evaluated, cast, differentiated.

A cell whose structure is known becomes a `Chain` of steps: nonnegative affine maps, one `Inject` (adds the injection b)
and activations with declared facts. Any other module becomes an `Opaque` cell, which can be evaluated and
differentiated but about which nothing is proven.

Rounding. On nonnegative operands a sum of n products has relative error at most gamma_n = n u/(1 - n u) in whatever
order it is summed, and nonnegative concave activations do not amplify relative errors. So one number per chain,
`Rounding.relative`, bounds the relative error of every entry of f(z); `Rounding.absolute` accounts for underflow.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from perron import reading
from perron.activations import ACTIVATIONS, Activation, get_activation
from perron.affine import (
    AFFINE_MODULES,
    AffineStep,
    ConvolutionStep,
    DenseStep,
    DiagonalLowRankStep,
    MaskStep,
    MonotoneConvolutionStep,
    PoolStep,
    Refusal,
    SparseStep,
    affine_step,
)
from perron.rounding import Rounding, compound, gamma, unit_roundoff

__all__ = [
    "Activate",
    "Chain",
    "Inject",
    "Linearization",
    "Map",
    "Normalize",
    "OneSystem",
    "Opaque",
    "VariationalDropout",
    "as_cell",
    "as_map",
    "check_independent",
    "trace",
    "unknown_step",
]

Side = Literal["upper", "lower"]


# The injection of the cell that is being evaluated.
_INJECTION: ContextVar[Tensor | None] = ContextVar("injection", default=None)


class Inject(nn.Module):
    """Marks where a cell adds its injection: inside `nn.Sequential(Linear, Inject(), Activation)`, v -> v + b."""

    def forward(self, v: Tensor) -> Tensor:
        injection = _INJECTION.get()
        if injection is None:
            raise RuntimeError("Inject() only has a meaning inside the cell of an equilibrium layer")
        return v + injection


class Activate(nn.Module):
    """An activation of `perron.activations` as a module, for use in a cell.

    >>> Activate("erf")(torch.zeros(1))
    tensor([0.])
    """

    def __init__(self, activation: str | Activation) -> None:
        super().__init__()
        self.activation = get_activation(activation)

    def forward(self, v: Tensor) -> Tensor:
        return self.activation(v)

    def extra_repr(self) -> str:
        return repr(self.activation.name)

    def __reduce__(self) -> Any:
        # Activations hold functions that cannot be pickled; the name says it all.
        if _is_known(self.activation):
            return _rebuild_activate, (self.activation.name, self.training)
        return super().__reduce__()


class Normalize(nn.Module):
    """v -> v / ||v||_p per sample, over every dimension but the batch or over one of them.

    Args:
        p: of the norm, at least 1; inf for the largest absolute value.
        dim: None, or the dimension that the norm sums over, for instance 1 for channels.

    Raises:
        ValueError: p is below 1, or dim is the batch.

    >>> Normalize()(torch.tensor([[1.0, 4.0]]))
    tensor([[0.2500, 1.0000]])
    """

    def __init__(self, p: float = math.inf, dim: int | None = None) -> None:
        super().__init__()
        if not p >= 1:
            raise ValueError(f"p must be at least 1, got {p}")
        if dim is not None and dim < 1:
            raise ValueError(f"dim must be at least 1 (0 is the batch), got {dim}")
        self.p, self.dim = float(p), dim

    def forward(self, v: Tensor) -> Tensor:
        return NormalizeStep(self.p, self.dim)(v)

    def extra_repr(self) -> str:
        return f"p={self.p}, dim={self.dim}"


class VariationalDropout(nn.Module):
    """Dropout inside a cell: one mask per sample and solve, the same in every evaluation of f.

    In training each entry of the state is zeroed with probability p and scaled by 1/(1 - p) otherwise; in evaluation
    nothing happens. The mask is a nonnegative diagonal matrix, so that a cell keeps its structure, and what is proven of
    it, under every mask. The layer around the cell draws the masks, shaped like its state.

    Source: Gal, Ghahramani, "A theoretically grounded application of dropout in recurrent neural networks", NeurIPS 2016.

    Args:
        p: probability of a zero, in [0, 1).

    Raises:
        ValueError: p is out of range; or, in training, the state here has another shape than the injection.

    >>> from perron.constraints import nonnegative
    >>> from perron.nn import Equilibrium
    >>> linear = nonnegative(nn.Linear(3, 3, bias=False))
    >>> layer = Equilibrium(nn.Sequential(VariationalDropout(0.5), linear, Inject(), Activate("tanh")), injection="softplus")
    >>> layer.solve(torch.randn(4, 3)).certified
    True
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"p must be in [0, 1), got {p}")
        self.p = p
        self.mask: Tensor | None = None

    @property
    def active(self) -> bool:
        return self.training and self.p > 0

    @torch.no_grad()
    def draw(self, like: Tensor) -> None:
        """New masks, shaped like a batch of states."""
        self.mask = torch.empty_like(like).bernoulli_(1 - self.p).div_(1 - self.p)

    def step(self) -> MaskStep:
        """The last masks; without entries before the first batch.

        Raises:
            Refusal: p was assigned out of range.
        """
        if not 0 <= self.p < 1:
            raise Refusal(f"no mask of a dropout with p = {self.p} is known; p must be in [0, 1)")
        mask = torch.empty(0) if self.mask is None else self.mask
        # A little more than 1/(1 - p), which float32 may have rounded up.
        return MaskStep((mask,), None, (1 + 2**-20) / (1 - self.p))

    def forward(self, v: Tensor) -> Tensor:
        return self.step()(v) if self.active else v

    def extra_repr(self) -> str:
        return f"p={self.p}"

    def __getstate__(self) -> dict[str, Any]:
        # A mask belongs to a batch, not to the model.
        return {**self.__dict__, "mask": None}


def _is_known(activation: Activation) -> bool:
    """Whether its facts are the tested ones, rather than somebody's word."""
    try:
        # Equal, with the same functions: copies of a layer copy the record.
        return get_activation(activation.name) == activation
    except ValueError:
        return False


def _rebuild_activate(name: str, training: bool) -> Activate:
    return Activate(name).train(training)


# ---------------------------------------------------------------------------------------------------------------- steps


@dataclass(frozen=True)
class InjectStep:
    """v -> v + b."""

    def __call__(self, v: Tensor, injection: Tensor) -> Tensor:
        if v.shape != injection.shape:
            # Broadcasting would make a map whose Jacobian is not the one of these steps.
            raise ValueError(
                f"the injection has shape {tuple(injection.shape)}, but where the cell adds it the state has {tuple(v.shape)}"
            )
        return v + injection


@dataclass(frozen=True)
class ActivationStep:
    activation: Activation

    def __call__(self, v: Tensor) -> Tensor:
        return self.activation(v)


@dataclass(frozen=True)
class NormalizeStep:
    """v -> v / ||v||_p: not monotone, so no step of a positive concave cell."""

    p: float
    dim: int | None

    def roundings(self, entries: int) -> int:
        """Of the quotient, with a norm of at most so many entries."""
        return 8 if math.isinf(self.p) else entries + 64

    def __call__(self, v: Tensor) -> Tensor:
        return v / self.norm(v)

    def norm(self, v: Tensor) -> Tensor:
        """The norm, shaped to broadcast; scaled, so that its powers neither overflow nor underflow."""
        dims = tuple(range(1, v.dim())) if self.dim is None else (self.dim,)
        top = v.abs().amax(dims, keepdim=True)
        if math.isinf(self.p):
            return top
        scale = top.detach().clamp_min(torch.finfo(v.dtype).tiny)
        return scale * torch.linalg.vector_norm(v / scale, self.p, dims, keepdim=True)


Step = AffineStep | InjectStep | ActivationStep | NormalizeStep
# Entries below this are not divided by a norm in anything that is proven.
LEAST_NORMALIZED = 1e-100
# Not their subclasses, which may compute anything.
_STEPS = frozenset(
    {
        DenseStep,
        SparseStep,
        DiagonalLowRankStep,
        ConvolutionStep,
        MonotoneConvolutionStep,
        MaskStep,
        PoolStep,
        InjectStep,
        ActivationStep,
        NormalizeStep,
    }
)


def unknown_step(step: NoReturn) -> Refusal:
    """What ends every ladder over the classes of steps: the type says to mypy that none was forgotten."""
    return Refusal(f"nothing is known of steps of class {type(step).__name__}")


class Linearization(Protocol):
    """The Jacobian J of a cell at a point, as an operator on (batch, ...) tensors."""

    def matvec(self, w: Tensor) -> Tensor:
        """J w."""

    def rmatvec(self, g: Tensor) -> Tensor:
        """J^T g."""


class Map(Protocol):
    """f(z; b), a function of the tensors it was read with."""

    @property
    def tensors(self) -> tuple[Tensor, ...]: ...

    def rebind(self, tensors: Sequence[Tensor]) -> Map: ...

    def __call__(self, z: Tensor, injection: Tensor) -> Tensor: ...

    def linearize(self, z: Tensor, injection: Tensor) -> Linearization: ...


# ---------------------------------------------------------------------------------------------------------------- chain


@dataclass(frozen=True)
class Chain:
    """A cell of known structure: steps applied from left to right."""

    steps: tuple[Step, ...]

    def __call__(self, z: Tensor, injection: Tensor) -> Tensor:
        for step in self.steps:
            z = step(z, injection) if isinstance(step, InjectStep) else step(z)
        return z

    @property
    def affine(self) -> tuple[AffineStep, ...]:
        return tuple(s for s in self.steps if isinstance(s, AffineStep))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for s in self.affine for t in s.tensors)

    @property
    def known(self) -> tuple[Step, ...]:
        """The steps, for whoever proves or differentiates something.

        Raises:
            Refusal: a step is not of one of the classes of this package, an activation has facts that are somebody's word,
                or a weight is no tensor of real floating-point numbers.
        """
        if torch.compiler.is_compiling():
            # Asked of the same steps before they were compiled.
            return self.steps
        for step in self.steps:
            if type(step) not in _STEPS:
                raise unknown_step(step)  # type: ignore[arg-type]
            if isinstance(step, AffineStep):
                step.check_tensors()
            elif isinstance(step, ActivationStep) and not _is_known(step.activation):
                raise Refusal(f"the facts of activation {step.activation.name!r} are not among the tested ones")
        return self.steps

    def sizes(self) -> dict[str, int]:
        """The sizes of a state that the steps fix: see `AffineStep.sizes`.

        Raises:
            Refusal: see `known`; or this is no map of a space into itself, whatever the size of an image is.
        """
        precisions = {t.dtype for s in self.known for t in _weights(s)}
        if len(precisions) > 1:
            raise Refusal(f"the weights of the cell are of several precisions, {sorted(map(str, precisions))}")
        if sum(isinstance(s, InjectStep) for s in self.steps) != 1:
            raise Refusal("a cell adds its injection exactly once")
        state: dict[str, int] = {}
        now: dict[str, int] = {}
        grown: tuple[int, ...] = ()
        for step in self.steps:
            if isinstance(step, InjectStep | MaskStep) and (now != state or any(grown)):
                what, where = ("injection", "adds it") if isinstance(step, InjectStep) else ("mask", "drops entries")
                raise Refusal(
                    f"the {what} has the shape of the state, {_shape(state)}, but where the cell {where} "
                    f"the state has become {_moved(now, grown)}"
                )
            if not isinstance(step, AffineStep):
                continue
            for name, (before, after) in step.sizes().items():
                # What no step fixed before is as in the state.
                state.setdefault(name, before)
                if now.setdefault(name, before) != before:
                    raise Refusal(f"a step takes {before} {name}, but is given {now[name]}")
                now[name] = after
            growth = step.growth()
            grown = tuple(a + b for a, b in zip(grown or (0,) * len(growth), growth, strict=True)) if growth else grown
            if "features" in now and any(grown):
                raise Refusal("a linear map acts on the last side of an image whose size is changed by another step")
        if now != state or any(grown):
            raise Refusal(
                f"the cell is no map of a space into itself: it makes {_moved(now, grown)} of {_shape(state)}"
            )
        return state

    def rebind(self, tensors: Sequence[Tensor]) -> Chain:
        rest = iter(tensors)
        return Chain(
            tuple(s.rebind([next(rest) for _ in s.tensors]) if isinstance(s, AffineStep) else s for s in self.steps)
        )

    def to(self, dtype: torch.dtype) -> Chain:
        return self.rebind([t.to(dtype) for t in self.tensors])

    def plainly(self) -> Chain | None:
        """The same map with plain sums, to which `rounding` applies; None if that precision offers none here."""
        steps = [s.plainly() if isinstance(s, AffineStep) else s for s in self.known]
        return None if any(s is None for s in steps) else Chain(tuple(s for s in steps if s is not None))

    def at_zero(self, injection: Tensor) -> Tensor:
        """f(0; b), without the products with zero."""
        z: Tensor | None = None
        for step in self.known:
            if z is not None:
                z = step(z, injection) if isinstance(step, InjectStep) else step(z)
            elif isinstance(step, InjectStep):
                z = injection
            elif not isinstance(step, AffineStep) or step.bias is not None:
                # Not a plain zero any more: no shortcut.
                return self(torch.zeros_like(injection), injection)
        assert z is not None
        return z

    @property
    def zero_costs(self) -> bool:
        """Whether `at_zero` takes products."""
        free = [isinstance(s, AffineStep) and s.bias is None for s in self.steps]
        at = next(k for k, s in enumerate(self.steps) if isinstance(s, InjectStep))
        return not all(free[:at]) or any(isinstance(s, AffineStep) for s in self.steps[at:])

    @property
    def is_affine(self) -> bool:
        """Whether f is affine in z."""
        linear = (AffineStep, InjectStep)
        return all(
            isinstance(s, linear) or (isinstance(s, ActivationStep) and s.activation.name == "identity")
            for s in self.steps
        )

    @property
    def per_sample(self) -> bool:
        """Whether the matrices differ from sample to sample."""
        return any(s.per_sample for s in self.affine)

    def select(self, index: Tensor) -> Chain:
        """The map of these samples."""
        return Chain(_selected(self.steps, index)) if self.per_sample else self

    @property
    def normalizes(self) -> bool:
        """Whether some step divides by a norm: then J is no product of diagonals and matrices."""
        return any(isinstance(s, NormalizeStep) for s in self.steps)

    @property
    def single(self) -> bool:
        """f = sigma(A z + ...): one activation, at the end, so that J = diag(sigma') A."""
        if self.normalizes:
            return False
        kinds = [isinstance(s, ActivationStep) for s in self.known]
        return len(kinds) > 1 and kinds[-1] and sum(kinds) == 1

    def linear(self, v: Tensor) -> Tensor:
        """A v, all affine steps without bias, injection and activation."""
        for step in self.known:
            v = step.linear(v) if isinstance(step, AffineStep) else v
        return v

    def preactivation(self, z: Tensor, injection: Tensor) -> Tensor:
        """What the last activation of a `single` chain is given."""
        for step in self.steps[:-1]:
            z = step(z, injection) if isinstance(step, InjectStep) else step(z)
        return z

    @property
    def last_activation(self) -> Activation | None:
        last = self.steps[-1]
        return last.activation if isinstance(last, ActivationStep) else None

    @property
    def supremum(self) -> float:
        """A constant super-solution, f(supremum) <= supremum; inf when the chain gives none."""
        return math.inf if self.last_activation is None else self.last_activation.supremum

    def rounding(self, dtype: torch.dtype, entries: int = 2**24) -> Rounding:
        """Rounding error of one evaluation of this chain in `dtype`, with plain sums, on at most so many entries."""
        relative, absolute, tiny = 0.0, torch.zeros((), dtype=torch.float64), torch.finfo(dtype).tiny
        for k, step in enumerate(self.known):
            if isinstance(step, AffineStep):
                relative = compound(relative, gamma(step.terms + 2, dtype))
                # Of the argument nothing is lost yet where the step is the first one.
                passed = 2 * step.row_sums() * absolute if k else absolute
                absolute = passed + step.underflow(dtype)
            elif isinstance(step, ActivationStep):
                relative = compound(relative, gamma(step.activation.ulps, dtype))
                absolute = 2 * max(step.activation.slope_at_zero, 1.0) * absolute + tiny
            elif isinstance(step, NormalizeStep):
                # Of the norm and of what it divides. What underflowed before is relative to the least entry of that.
                relative = compound(relative, 2 * float(absolute) / LEAST_NORMALIZED)
                relative = compound(compound(relative, relative), gamma(step.roundings(entries), dtype))
                absolute = torch.full_like(absolute, tiny)
            elif isinstance(step, InjectStep):
                relative = compound(relative, gamma(1, dtype))
                absolute = 2 * absolute + tiny
            else:
                raise unknown_step(step)
        return Rounding(relative, absolute)

    def linearize_at_fixed_point(self, value: Tensor, side: Side | None = None) -> ChainLinearization | None:
        """J at a fixed point, from its value without evaluating f: where f = sigma(A z + ...) with one affine step.

        Its entries are accurate in comparison with sigma'(0), not each by itself. With `side` the diagonal is an upper
        or lower bound of the one at every fixed point above or below `value`.
        """
        activation = self.last_activation
        if not self.single or len(self.affine) != 1 or activation is None or activation.derivative_of_value is None:
            return None
        if not activation.smooth:
            return None
        # A bound, or the middle of two, may lie out of the range of sigma, where the slope is no function of the value.
        value = value.clamp(activation.at_zero, activation.supremum)
        diagonal = activation.derivative_of_value(value)
        if side is not None:
            error = activation.ulps * unit_roundoff(value.dtype) * activation.slope_at_zero
            diagonal = (diagonal + error if side == "upper" else diagonal - error).clamp_min(0)
        rest = len(self.steps) - 1
        return ChainLinearization(self.steps, (value.shape,) * (rest + 1), (*[None] * rest, diagonal))

    def pullback(
        self, z: Tensor, injection: Tensor, g: Tensor, needed: Sequence[bool] | None = None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of <g, f(z; b)> for b and `tensors`, where needed; differentiable."""
        steps = self.known
        needed = [True] * (1 + len(self.tensors)) if needed is None else needed
        if self.normalizes:
            found = torch.func.vjp(lambda b, *t: self.rebind(t)(z, b), injection, *self.tensors)[1](g)
            return tuple(t if n else None for t, n in zip(found, needed, strict=True))
        inputs = [z]
        for step in steps[:-1]:
            inputs.append(step(inputs[-1], injection) if isinstance(step, InjectStep) else step(inputs[-1]))
        of_tensors: list[Tensor | None] = []
        of_injection: Tensor | None = None
        for k in range(len(steps) - 1, -1, -1):
            step = steps[k]
            if isinstance(step, ActivationStep):
                # From the argument, not from the value: where sigma saturates only that has any digits.
                g = g * step.activation.derivative(inputs[k])
            elif isinstance(step, InjectStep):
                of_injection = g if needed[0] else None
            elif isinstance(step, AffineStep):
                wanted = needed[1 + len(self.tensors) - len(of_tensors) - len(step.tensors) :][: len(step.tensors)]
                found = step.gradients(inputs[k], g) if any(wanted) else [None] * len(wanted)
                of_tensors = [*(t if n else None for t, n in zip(found, wanted, strict=True)), *of_tensors]
                if not any(isinstance(s, AffineStep | InjectStep) for s in steps[:k]):
                    break
                g = step.transpose(g, inputs[k].shape)
            elif isinstance(step, NormalizeStep):
                raise Refusal("a chain that normalises has no Jacobian of diagonals and matrices")
            else:
                raise unknown_step(step)
        return (of_injection, *of_tensors)

    def linearize(self, z: Tensor, injection: Tensor) -> Linearization:
        """J at z."""
        if self.normalizes:
            return AutomaticLinearization.of(self, z, injection)
        return self.linearize_steps(z, injection)

    def linearize_steps(self, z: Tensor, injection: Tensor, side: Side | None = None) -> ChainLinearization:
        """J at z. With `side` the diagonal factors are rigorous upper or lower bounds, rounding included.

        For positive concave chains at z >= 0; without `side` for all that do not normalise.
        """
        dtype = z.dtype
        # Of the argument here and of the one at the point that is compared with.
        slack = 0.0 if side is None else 2 * self.rounding(dtype).relative
        shapes: list[torch.Size] = []
        diagonals: list[Tensor | None] = []
        v = z
        for step in self.known:
            shapes.append(v.shape)
            diagonal = None
            if isinstance(step, ActivationStep):
                a = step.activation
                if side is None:
                    diagonal = a.derivative(v)
                else:
                    error = a.ulps * unit_roundoff(dtype) * a.slope_at_zero
                    # Concave: the slope falls with v, so an upper bound is taken a little to the left.
                    sign = 1 if side == "upper" else -1
                    diagonal = (a.derivative(v * (1 - sign * slack)) + sign * error).clamp_min(0)
            diagonals.append(diagonal)
            v = step(v, injection) if isinstance(step, InjectStep) else step(v)
        return ChainLinearization(self.steps, tuple(shapes), tuple(diagonals))


def _weights(step: Step) -> tuple[Tensor, ...]:
    # A mask is drawn for the state, in its precision.
    return step.tensors if isinstance(step, AffineStep) and not isinstance(step, MaskStep) else ()


def _shape(sizes: dict[str, int]) -> str:
    return " and ".join(f"{size} {name}" for name, size in sizes.items()) or "any size"


def _moved(sizes: dict[str, int], grown: tuple[int, ...]) -> str:
    return _shape(sizes) + (f" with the sides of every image {grown} longer" if any(grown) else "")


def _selected(steps: tuple[Step, ...], index: Tensor) -> tuple[Step, ...]:
    return tuple(s.select(index) if isinstance(s, AffineStep) else s for s in steps)


@dataclass(frozen=True)
class ChainLinearization:
    """J = D_L A_L ... D_1 A_1 of a chain at a point.

    Raises:
        Refusal: a step is not known.
    """

    steps: tuple[Step, ...]
    shapes: tuple[torch.Size, ...]
    diagonals: tuple[Tensor | None, ...]

    def __post_init__(self) -> None:
        for step, diagonal in zip(Chain(self.steps).known, self.diagonals, strict=True):
            # What is neither a matrix nor a diagonal would count as the identity, which only an injection is.
            if isinstance(step, NormalizeStep) or (isinstance(step, ActivationStep) and diagonal is None):
                raise Refusal(f"the Jacobian of a {type(step).__name__} is not given")

    def select(self, index: Tensor) -> ChainLinearization:
        """J of these samples only."""
        diagonals = tuple(None if d is None else d[index] for d in self.diagonals)
        return replace(self, steps=_selected(self.steps, index), diagonals=diagonals)

    @property
    def slope(self) -> Tensor:
        """The diagonal of the activation at the end."""
        assert self.diagonals[-1] is not None
        return self.diagonals[-1]

    def matvec(self, w: Tensor) -> Tensor:
        for step, diagonal in zip(self.steps, self.diagonals, strict=True):
            if isinstance(step, AffineStep):
                w = step.linear(w)
            elif diagonal is not None:
                w = diagonal * w
        return w

    def rmatvec(self, g: Tensor) -> Tensor:
        for step, shape, diagonal in zip(
            reversed(self.steps), reversed(self.shapes), reversed(self.diagonals), strict=True
        ):
            if isinstance(step, AffineStep):
                g = step.transpose(g, shape)
            elif diagonal is not None:
                g = diagonal * g
        return g


# --------------------------------------------------------------------------------------------------------------- opaque


@dataclass(frozen=True)
class Opaque:
    """A cell of unknown structure, called as `module(z, x)` with its tensors passed in.

    Attributes:
        module: the cell.
        names, tensors: its parameters, and what else of it needs a gradient (`with_kept`).
        buffers: the others.
        independent: whether its samples are declared not to influence each other; else the batch is one system
            (`OneSystem`).
    """

    module: nn.Module
    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    buffers: dict[str, Tensor]
    independent: bool = False

    @classmethod
    def of(cls, module: nn.Module, *, independent: bool = False) -> Opaque:
        parameters = dict(module.named_parameters())
        return cls(module, tuple(parameters), tuple(parameters.values()), dict(module.named_buffers()), independent)

    def rebind(self, tensors: Sequence[Tensor]) -> Opaque:
        return replace(self, tensors=tuple(tensors))

    def to(self, dtype: torch.dtype) -> Opaque:
        buffers = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.buffers.items()}
        return replace(self, tensors=tuple(t.to(dtype) for t in self.tensors), buffers=buffers)

    def select(self, index: Tensor) -> Opaque:
        return self

    def state(self) -> dict[str, Tensor]:
        """Tensors and buffers to call the module with."""
        # Clones: a solve must not count as many batches in a running average as it takes steps.
        return {**dict(zip(self.names, self.tensors, strict=True)), **{k: v.clone() for k, v in self.buffers.items()}}

    def __call__(self, z: Tensor, injection: Tensor) -> Tensor:
        arguments = (z,) if _is_sequential(self.module) else (z, injection)
        token = _INJECTION.set(injection)
        try:
            value = torch.func.functional_call(self.module, self.state(), arguments)
        finally:
            _INJECTION.reset(token)
        if not isinstance(value, Tensor):
            raise TypeError(f"the cell must return one tensor, the new state, and returned a {type(value).__name__}")
        if value.shape != z.shape:
            raise ValueError(
                f"the cell maps shape {tuple(z.shape)} to {tuple(value.shape)}; a fixed point needs equal shapes"
            )
        return value

    def linearize(self, z: Tensor, injection: Tensor) -> AutomaticLinearization:
        return AutomaticLinearization.of(self, z, injection)

    def with_kept(self, z: Tensor, injection: Tensor) -> Opaque:
        """The same map, whose `tensors` are all that f needs a gradient for: attributes and buffers of its modules, too.

        Raises:
            ValueError: f depends on another tensor that requires a gradient, which would be lost.
        """
        value, hidden = self._hidden(z, injection)
        if not hidden:
            return self
        kept = {k: t for k, t in _kept_tensors(self.module).items() if k not in self.names and t.requires_grad}
        used = torch.autograd.grad(value.sum(), tuple(kept.values()), allow_unused=True) if kept else ()
        kept = {k: t for (k, t), g in zip(kept.items(), used, strict=True) if g is not None}
        whole = replace(
            self,
            names=(*self.names, *kept),
            tensors=(*self.tensors, *kept.values()),
            buffers={k: v for k, v in self.buffers.items() if k not in kept},
        )
        if kept:
            _, hidden = whole._hidden(z, injection)
        if hidden:
            raise ValueError(
                f"the cell depends on a tensor of shape {tuple(hidden[0].shape)} that requires a gradient and is neither a "
                "parameter, a buffer nor an attribute of its modules (it stands in a closure, a list, or a module that is "
                "not registered): its gradient would be lost. Register it, hand it in through x, or detach it"
            )
        return whole

    def _hidden(self, z: Tensor, injection: Tensor) -> tuple[Tensor, list[Tensor]]:
        """f, and the leaves with a gradient that it depends on beyond z, b and `tensors`."""
        frozen = self.rebind([t.detach() for t in self.tensors])
        with torch.enable_grad():
            value = frozen(z.detach(), injection.detach())
            leaves = _leaves(value)
            # A leaf that the cell makes anew in each evaluation, to differentiate an energy, is its own business.
            again = _leaves(frozen(z.detach(), injection.detach())) if leaves else {}
        return value, [t for k, t in leaves.items() if k in again]


def _kept_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Buffers, and tensors that are plain attributes of the modules, by path."""
    found = dict(module.named_buffers())
    for path, part in module.named_modules():
        prefix = f"{path}." if path else ""
        found |= {prefix + k: v for k, v in vars(part).items() if isinstance(v, Tensor)}
    return found


def _leaves(value: Tensor) -> dict[int, Tensor]:
    """The tensors that a value's graph ends in, by identity."""
    if value.grad_fn is None:
        return {id(value): value} if value.requires_grad else {}
    found: dict[int, Tensor] = {}
    seen, stack = set(), [value.grad_fn]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad":
            found[id(node.variable)] = node.variable  # type: ignore[attr-defined]
        stack += [n for n, _ in node.next_functions if n is not None]
    return found


@dataclass(frozen=True)
class OneSystem:
    """A cell whose samples may influence each other: the whole batch is one sample, (systems, batch, ...).

    So nothing that is done per sample can part them. There is one system, or under `torch.func.vmap` one for each of its
    values.

    Attributes:
        map: the cell.
        scale: (systems, batch, 1, ...) powers of two or None: the state is that of the cell divided by it.
    """

    map: Opaque
    scale: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.map.tensors

    def rebind(self, tensors: Sequence[Tensor]) -> OneSystem:
        return replace(self, map=self.map.rebind(tensors))

    def select(self, index: Tensor) -> OneSystem:
        return self if self.scale is None else replace(self, scale=self.scale[index])

    def __call__(self, z: Tensor, injection: Tensor) -> Tensor:
        z = z if self.scale is None else z * self.scale
        value = torch.stack([self.map(s, b) for s, b in zip(z, injection, strict=True)]) if len(z) else z
        return value if self.scale is None else value / self.scale

    def linearize(self, z: Tensor, injection: Tensor) -> AutomaticLinearization:
        return AutomaticLinearization.of(self, z, injection)


def check_independent(map: Opaque, z: Tensor, injection: Tensor) -> None:
    """Compare f of single samples with what it is in their batch.

    Args:
        map: the cell.
        z, injection: (batch, ...) where to compare: at f(z), a little different in every sample.

    Raises:
        ValueError: they differ by more than rounding, or f cannot be evaluated on a single sample.
    """
    y = map(z, injection)
    y = torch.where(y.isfinite() & (y != 0), y, 1.0)
    y = y * (1 + torch.linspace(0, 0.1, len(y), dtype=y.dtype, device=y.device).view(-1, *[1] * (y.dim() - 1)))
    whole = map(y, injection)
    if not torch.equal(torch.nan_to_num(map(y, injection)), torch.nan_to_num(whole)):
        raise ValueError("independent=True: the cell has two values at one point; it is random, or keeps a state")
    for k in sorted({0, len(y) // 2, len(y) - 1}):
        try:
            alone = map(y[k : k + 1], injection[k : k + 1])
        except (RuntimeError, ValueError, IndexError) as error:
            raise ValueError(f"independent=True: the cell cannot be evaluated on sample {k} alone: {error}") from error
        near = torch.isclose(alone[0], whole[k], rtol=0, atol=_allowed(whole[k]), equal_nan=True)
        if not bool(near.all()):
            raise ValueError(
                f"independent=True: f of sample {k} alone differs by {float((alone[0] - whole[k]).abs().max()):.3g} from "
                "what it is in its batch; samples of this cell influence each other"
            )


def _allowed(value: Tensor) -> float:
    """What rounding may change in sums that are taken in another order."""
    size = torch.nan_to_num(value, posinf=0.0, neginf=0.0).abs().max() if value.numel() else 0.0
    return math.sqrt(torch.finfo(value.dtype).eps) * float(size)


@dataclass(frozen=True)
class AutomaticLinearization:
    """J by automatic differentiation of one evaluation."""

    z: Tensor
    y: Tensor

    @classmethod
    def of(cls, map: Map, z: Tensor, injection: Tensor) -> AutomaticLinearization:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            y = map.rebind([t.detach() for t in map.tensors])(z, injection.detach())
        return cls(z, y)

    def rmatvec(self, g: Tensor) -> Tensor:
        return torch.autograd.grad(self.y, self.z, g, retain_graph=True)[0]

    def matvec(self, w: Tensor) -> Tensor:
        with torch.enable_grad():
            g = torch.zeros_like(self.y, requires_grad=True)
            (v,) = torch.autograd.grad(self.y, self.z, g, retain_graph=True, create_graph=True)
        return torch.autograd.grad(v, g, w, retain_graph=True)[0]


# ---------------------------------------------------------------------------------------------------------------- trace


_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
ACTIVATION_MODULES: dict[type[nn.Module], str] = {
    nn.Tanh: "tanh",
    nn.Softsign: "softsign",
    nn.ReLU6: "relu6",
    nn.Sigmoid: "sigmoid",
    nn.ReLU: "relu",
    nn.Identity: "identity",
}


def activation_of(module: nn.Module, kind: type[nn.Module], path: str) -> Activation | None:
    """The activation that a module of that class applies to every entry; None where it is another module.

    Raises:
        Refusal: it is not one of `perron.activations`.
    """
    if kind is Activate:
        assert isinstance(module, Activate)
        if not _is_known(module.activation):
            raise Refusal(f"the facts of activation {module.activation.name!r} are not among the tested ones")
        return module.activation
    if kind is nn.ReLU6 and (module.min_val, module.max_val) != (0, 6):
        raise Refusal(f"{path} is a ReLU6 from {module.min_val} to {module.max_val}; use limits of 0 and 6")
    return ACTIVATIONS[ACTIVATION_MODULES[kind]] if kind in ACTIVATION_MODULES else None


def does_nothing(module: nn.Module, kind: type[nn.Module], path: str) -> bool:
    """Whether a module of that class is a dropout in evaluation mode.

    Raises:
        Refusal: it is a dropout of torch's in training mode.
    """
    if kind is VariationalDropout:
        assert isinstance(module, VariationalDropout)
        return not module.active
    if kind in _DROPOUTS and module.training:
        raise Refusal(f"{path} is a {kind.__name__}, another map at every evaluation; use perron.nn.VariationalDropout")
    return kind in _DROPOUTS


def _steps(module: nn.Module, path: str) -> list[Step]:
    kind = reading.kind(module, path)
    if kind in reading.CONTAINERS:
        return [s for where, child in reading.children(module, path) for s in _steps(child, where)]
    if does_nothing(module, kind, path):
        return []
    if kind is Inject:
        return [InjectStep()]
    if kind is Normalize:
        assert isinstance(module, Normalize)
        return [NormalizeStep(module.p, module.dim)]
    if kind is VariationalDropout:
        assert isinstance(module, VariationalDropout)
        return [module.step()]
    if (activation := activation_of(module, kind, path)) is not None:
        return [ActivationStep(activation)]
    if kind in AFFINE_MODULES:
        return [affine_step(module)]
    raise reading.unknown(kind, path, "nonnegative, nondecreasing and concave")


def trace(cell: nn.Module, path: str | None = None) -> Chain:
    """Read a cell into a `Chain`; the tensors stay attached to the parameters.

    Args:
        cell: the module.
        path: what the paths of a refusal begin with; default the name of the cell's class.

    Raises:
        Refusal: a step is unknown, or there is not exactly one `Inject`.
    """
    steps = _steps(cell, path or reading.name_of(cell))
    if sum(isinstance(s, InjectStep) for s in steps) != 1:
        raise Refusal("the cell must contain exactly one Inject()")
    if not any(isinstance(s, ActivationStep) for s in steps):
        # With the identity at the end it has the form sigma(A z + b) that solvers and proofs know.
        steps.append(ActivationStep(ACTIVATIONS["identity"]))
    return Chain(tuple(steps))


def as_map(cell: nn.Module, *, independent: bool = False) -> tuple[Chain | Opaque, str | None]:
    """The cell as a function of tensors, and the reason where its structure could not be read."""
    try:
        return trace(cell), None
    except Refusal as refusal:
        return Opaque.of(cell, independent=independent), str(refusal)


def as_cell(cell: nn.Module | Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    """A module that can be the cell of a layer; functions are wrapped.

    Raises:
        TypeError: it is neither a module nor a function, or cannot be called with (z, x).
        ValueError: a Sequential without `Inject`.
    """
    if isinstance(cell, type) or not callable(cell):
        raise TypeError(f"the cell must be a module or a function f(z, x), got {cell!r}")
    if _is_sequential(cell):
        if not any(isinstance(m, Inject) for m in cell.modules()):
            raise ValueError(
                "the cell is a Sequential without Inject(): nothing says where the injection enters. Put perron.nn.Inject() "
                "where b is added, or give a module that is called as cell(z, x)"
            )
        return cell
    try:
        inspect.signature(cell.forward if isinstance(cell, nn.Module) else cell).bind(None, None)
    except TypeError as error:
        raise TypeError(f"the cell is called as cell(z, x), with two tensors: {error}, in {cell!r}") from error
    except ValueError:
        # Builtin functions and compiled modules do not tell their arguments.
        pass
    return cell if isinstance(cell, nn.Module) else Function(cell)


class Function(nn.Module):
    """A plain function f(z, x) as a cell; tensors that it closes over are constants to it."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.function(z, x)

    def extra_repr(self) -> str:
        return getattr(self.function, "__qualname__", repr(self.function))


def _is_sequential(cell: object) -> TypeGuard[nn.Sequential]:
    """Whether it runs its children one after another, on the state alone, and `Inject` adds b."""
    return isinstance(cell, nn.Sequential) and type(cell).forward is nn.Sequential.forward
