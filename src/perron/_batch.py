"""Reductions per sample: over every dimension but the first."""

from __future__ import annotations

from torch import Tensor

__all__ = ["all_finite", "all_true", "amax", "amin", "per_sample"]


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """Reshape (batch,) so that it broadcasts against (batch, ...)."""
    return value.reshape(-1, *[1] * (like.dim() - 1))


def amax(t: Tensor) -> Tensor:
    """Largest entry of every sample, (batch,); 0 for samples without entries."""
    flat = t.flatten(1)
    return flat.amax(1) if flat.shape[1] else flat.new_zeros(flat.shape[0])


def amin(t: Tensor) -> Tensor:
    return -amax(-t)


def all_true(mask: Tensor) -> Tensor:
    return mask.flatten(1).all(1)


def all_finite(t: Tensor) -> Tensor:
    return all_true(t.isfinite())
