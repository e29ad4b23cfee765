"""Cells f(z; b) as plain functions of tensors: read once from a module, then evaluated, cast, differentiated.

A cell whose structure is known becomes a `Chain` of steps: nonnegative affine maps, one `Inject` (adds the injection b)
and activations with declared facts. Any other module becomes an `Opaque` cell, which can be evaluated and
differentiated but about which nothing is proven.

Rounding. On nonnegative operands a sum of n products has relative error at most gamma_n = n u/(1 - n u) in whatever
order it is summed, and nonnegative concave activations do not amplify relative errors. So one number per chain,
`Rounding.relative`, bounds the relative error of every entry of f(z); `Rounding.absolute` accounts for underflow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor

from perron._numerics.rounding import Rounding, compound, gamma, unit_roundoff
from perron.activations import Activation
from perron.cells.activation import ActivationStep, is_known
from perron.cells.circular import MonotoneConvolutionStep
from perron.cells.convolution import ConvolutionStep
from perron.cells.dense import DenseStep
from perron.cells.dropout import MaskStep
from perron.cells.injection import InjectStep
from perron.cells.jacobian import AutomaticLinearization
from perron.cells.low_rank import DiagonalLowRankStep
from perron.cells.normalization import LEAST_NORMALIZED, NormalizeStep
from perron.cells.pooling import PoolStep
from perron.cells.sparse import SparseStep
from perron.cells.step import AffineStep, Linearization, Refusal, Side

__all__ = ["Chain", "ChainLinearization", "Step", "unknown_step"]


Step = AffineStep | InjectStep | ActivationStep | NormalizeStep
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
            elif isinstance(step, ActivationStep) and not is_known(step.activation):
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

    def with_kept(self, z: Tensor, injection: Tensor) -> Chain:
        """Itself: a chain holds all that it was read from."""
        return self

    def to(self, dtype: torch.dtype) -> Chain:
        return self.rebind([t.to(dtype) for t in self.tensors])

    def rigorous(self) -> Chain | None:
        """The same map with rigorous sums, to which `rounding` applies; None if that precision offers none here."""
        steps = [s.rigorous() if isinstance(s, AffineStep) else s for s in self.known]
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

    def behind_injection(self) -> tuple[int, Chain]:
        """The place of the injection, and what follows it."""
        place = [isinstance(s, InjectStep) for s in self.steps].index(True)
        return place, Chain(self.steps[place + 1 :])

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
        """Rounding error of one evaluation of this chain in `dtype`, with rigorous sums, on at most so many entries."""
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
