"""Cells of unknown structure: evaluated and differentiated, and nothing is proven of them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

import torch
from torch import Tensor, nn

from perron.cells.injection import INJECTION, Inject
from perron.cells.jacobian import AutomaticLinearization

__all__ = ["Function", "OneSystem", "Opaque", "as_cell", "check_independent", "is_sequential"]


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
        arguments = (z,) if is_sequential(self.module) else (z, injection)
        token = INJECTION.set(injection)
        try:
            value = torch.func.functional_call(self.module, self.state(), arguments)
        finally:
            INJECTION.reset(token)
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

    def with_kept(self, z: Tensor, injection: Tensor) -> OneSystem:
        return replace(self, map=self.map.with_kept(z[0], injection[0]))

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


def as_cell(cell: nn.Module | Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    """A module that can be the cell of a layer; functions are wrapped.

    Raises:
        TypeError: it is neither a module nor a function, or cannot be called with (z, x).
        ValueError: a Sequential without `Inject`.
    """
    if isinstance(cell, type) or not callable(cell):
        raise TypeError(f"the cell must be a module or a function f(z, x), got {cell!r}")
    if is_sequential(cell):
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


def is_sequential(cell: object) -> TypeGuard[nn.Sequential]:
    """Whether it runs its children one after another, on the state alone, and `Inject` adds b."""
    return isinstance(cell, nn.Sequential) and type(cell).forward is nn.Sequential.forward
