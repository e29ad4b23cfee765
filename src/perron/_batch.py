"""Reductions per sample, over every dimension but the first; and vmapped dimensions folded into the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["VmapInfo", "all_finite", "all_true", "amax", "amin", "fold_vmap", "per_sample"]


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """Reshape (batch,) so that it broadcasts against (batch, ...)."""
    return value.reshape(-1, *[1] * (like.dim() - 1))


def amax(t: Tensor) -> Tensor:
    """Largest entry of every sample, (batch,); 0 for samples without entries."""
    flat = t.flatten(1)
    return flat.amax(1) if flat.shape[1] else flat.new_zeros(flat.shape[0])


def amin(t: Tensor) -> Tensor:
    """Smallest entry of every sample, (batch,); 0 for samples without entries."""
    flat = t.flatten(1)
    return flat.amin(1) if flat.shape[1] else flat.new_zeros(flat.shape[0])


def all_true(mask: Tensor) -> Tensor:
    return mask.flatten(1).all(1)


def all_finite(t: Tensor) -> Tensor:
    """(batch,) whether every entry of a sample is finite."""
    # inf - inf and NaN - NaN are NaN: one reduction instead of a mask of every entry.
    return (amax(t) - amin(t)).isfinite()


class VmapInfo(Protocol):
    """What torch passes to the vmap rule of an autograd function."""

    batch_size: int


def fold_vmap(
    apply: Callable[..., Tensor],
    info: VmapInfo,
    in_dims: Sequence[int | None],
    arguments: Sequence[Tensor],
    *,
    shared: Sequence[int] = (),
) -> tuple[Tensor, int]:
    """The vmap rule of a function of batches: the vmapped dimension joins the batch.

    Args:
        apply: takes the arguments; all but the `shared` ones have the batch first, and so has the result.
        info: of the rule.
        in_dims: the vmapped dimension of each argument, or None.
        arguments: as `apply` takes them.
        shared: positions of arguments that serve the whole batch, as weights do. Where one of them is vmapped itself,
            the function is applied once for each of its values.
    """
    moved = [t if d is None else t.movedim(d, 0) for t, d in zip(arguments, in_dims, strict=True)]
    count = info.batch_size
    if any(in_dims[k] is not None for k in shared):
        parts = [apply(*(t if d is None else t[k] for t, d in zip(moved, in_dims, strict=True))) for k in range(count)]
        return torch.stack(parts), 0
    batch = next(
        len(t[0]) if d is not None else len(t) for k, (t, d) in enumerate(zip(moved, in_dims)) if k not in shared
    )
    folded = [
        t
        if k in shared
        else (t.reshape(count * batch, *t.shape[2:]) if d is not None else t.repeat(count, *[1] * (t.dim() - 1)))
        for k, (t, d) in enumerate(zip(moved, in_dims, strict=True))
    ]
    result = apply(*folded)
    return result.reshape(count, batch, *result.shape[1:]), 0
