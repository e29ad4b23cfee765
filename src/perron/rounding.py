"""Rounding error of floating-point sums (Higham, Accuracy and Stability of Numerical Algorithms, chapter 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = ["Number", "Rounding", "gamma", "unit_roundoff"]


# A scalar of a proof: a float, a tensor, or a term of a solver that checks its formula for all real numbers.
Number: TypeAlias = Any


@dataclass(frozen=True)
class Rounding:
    """|computed f(z) - f(z)| <= relative * f(z) + absolute, entrywise.

    Attributes:
        relative: of every entry.
        absolute: what underflow adds; a scalar tensor, so that nothing waits for the device.
    """

    relative: float
    absolute: Tensor | float


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def gamma(n: int, dtype: torch.dtype) -> float:
    """n u/(1 - n u): relative error of n roundings."""
    nu = n * unit_roundoff(dtype)
    return nu / (1 - nu) if nu < 0.5 else math.inf
