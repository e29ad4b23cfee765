"""Vmapped dimensions folded into the batch, and what torch's transforms cannot do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["VmapInfo", "fold_vmap", "refuse_nested_forward_mode"]


class VmapInfo(Protocol):
    """What torch passes to the vmap rule of an autograd function."""

    batch_size: int


def fold_vmap(
    apply: Callable[..., Any],
    info: VmapInfo,
    in_dims: Sequence[int | None],
    arguments: Sequence[Tensor | None],
    *,
    shared: Sequence[int] = (),
) -> tuple[Any, Any]:
    """The vmap rule of a function of batches: the vmapped dimension joins the batch.

    Args:
        apply: takes the arguments; all but the `shared` ones have the batch first, and so have the tensor or the tensors
            that it returns.
        info: of the rule.
        in_dims: the vmapped dimension of each argument, or None.
        arguments: as `apply` takes them; None is passed on.
        shared: positions of arguments that serve the whole batch, as weights do. Where one of them is vmapped itself,
            the function is applied once for each of its values; a tensor (batch, 0) among the ones returned says that there
            is none for that value, and then there is none for any.
    """
    moved = [t if t is None or d is None else t.movedim(d, 0) for t, d in zip(arguments, in_dims, strict=True)]
    count = info.batch_size
    if any(in_dims[k] is not None for k in shared):
        parts = [
            apply(*(t if t is None or d is None else t[k] for t, d in zip(moved, in_dims, strict=True)))
            for k in range(count)
        ]
        if isinstance(parts[0], Tensor):
            return torch.stack(parts), 0
        return tuple(_stacked(same) for same in zip(*parts, strict=True)), (0,) * len(parts[0])
    folded = [
        t if t is None or k in shared else (t.flatten(0, 1) if d is not None else t.repeat(count, *[1] * (t.dim() - 1)))
        for k, (t, d) in enumerate(zip(moved, in_dims, strict=True))
    ]
    result = apply(*folded)
    if isinstance(result, Tensor):
        return result.unflatten(0, (count, -1)), 0
    return tuple(t.unflatten(0, (count, -1)) for t in result), (0,) * len(result)


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    if any(part.shape != parts[0].shape for part in parts):
        parts = [part.new_empty(len(part), 0) for part in parts]
    return torch.stack(tuple(parts))


def refuse_nested_forward_mode() -> None:
    """Raise where forward mode is nested in forward mode: there torch drops a part of the derivative.

    The jvp rule of an autograd function runs with forward mode off, so an outer forward-mode level sees constants in it
    (torch 2.13); a silent wrong second derivative would come out.

    Raises:
        NotImplementedError: torch.func.jvp or jacfwd is nested in another one.
    """
    levels = torch._C._functorch.get_interpreter_stack() or []
    if sum(level.key() == torch._C._functorch.TransformType.Jvp for level in levels) > 1:
        raise NotImplementedError(
            "forward mode nested in forward mode (jacfwd of jacfwd, jvp of jvp) is not supported by torch's autograd "
            "functions and would silently come out wrong; use torch.func.hessian, jacfwd of jacrev, or jacrev of either"
        )
