"""Boxes: entrywise bounds, moved outwards by the rounding of their own computation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Interval", "centre_and_radius", "widened"]

_TINY = torch.finfo(torch.float64).tiny
_U = 2.0**-53


@dataclass(frozen=True)
class Interval:
    """A box, entrywise `lower <= value <= upper`, (batch, ...); where an end is NaN nothing is known of the value."""

    lower: Tensor
    upper: Tensor


def widened(low: Tensor, high: Tensor, relative: float) -> Interval:
    """The ends moved outwards by their rounding, which is that much of them but for underflow."""
    return Interval(low - relative * low.abs() - _TINY, high + relative * high.abs() + _TINY)


def centre_and_radius(box: Interval) -> tuple[Tensor, Tensor]:
    """c and r with |v - c| <= r for every v of the box: r is the exact distance of an end but for one rounding."""
    centre = box.lower / 2 + box.upper / 2
    radius = torch.maximum(box.upper - centre, centre - box.lower)
    return centre, radius * (1 + 4 * _U)
