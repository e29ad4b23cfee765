"""Reductions per sample, over every dimension but the first."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["all_finite", "all_true", "amax", "amin", "euclidean", "per_sample"]


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


def euclidean(t: Tensor) -> Tensor:
    """(batch,) Euclidean norm of every sample, scaled so that no square of an entry overflows or underflows to nothing.

    Its relative error is at most n + 4 units of roundoff for n entries, wherever the norm is a normal number.
    """
    flat = t.flatten(1)
    top = amax(flat.abs()).unsqueeze(1)
    # Squares below the range are then nothing beside 1. What is not finite comes out as inf or NaN.
    return (flat / top.clamp_min(torch.finfo(t.dtype).tiny)).norm(dim=1) * top.squeeze(1).clamp_min(
        torch.finfo(t.dtype).tiny
    )
