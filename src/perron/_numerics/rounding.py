"""Rounding error of floating-point sums (Higham, Accuracy and Stability of Numerical Algorithms, chapter 3)."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeAlias

import torch
from torch import Tensor

from perron._numerics.compilers import constant

__all__ = ["EXACT", "Number", "Rounding", "compound", "flushes_subnormals", "gamma", "product_above", "unit_roundoff"]


# A scalar of a proof: a float, a tensor, or a term of a solver that checks its formula for all real numbers.
Number: TypeAlias = Any


@dataclass(frozen=True)
class Rounding:
    """|computed f(z) - f(z)| <= relative * f(z) + absolute, entrywise.

    Attributes:
        relative: of every entry.
        absolute: what underflow adds; a scalar tensor, so that nothing waits for the device.
        exact: whether nothing was computed yet.
    """

    relative: float
    absolute: Tensor | float
    exact: bool = False


EXACT = Rounding(0.0, 0.0, exact=True)


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


@constant
def flushes_subnormals() -> bool:
    """Whether subnormal numbers count as zero (torch.set_flush_denormal), operands and weights among them.

    No bound here allows for that: a weight of 1e-310 may meet a state of 1e302. The mode is the thread's, Python's as well.
    """
    return sys.float_info.min / 2 == 0


def gamma(n: int, dtype: torch.dtype) -> float:
    """n u/(1 - n u): relative error of n roundings."""
    nu = n * unit_roundoff(dtype)
    return nu / (1 - nu) if nu < 0.5 else math.inf


def compound(first: float, second: float) -> float:
    """(1 + a)(1 + b) - 1 of relative errors, rounded up; not formed beside 1, where they would lose their digits."""
    return (first + second + first * second) * (1 + 2**-50)


def product_above(factors: Iterable[float]) -> float:
    """The product of nonnegative numbers, not below the exact one; inf where one of them is not finite.

    Multiplied exactly: 1e-200 * 1e-200 * 1e300 * 1e100 is 1, and no intermediate product may be lost.
    """
    exact = Fraction(1)
    for factor in factors:
        if not math.isfinite(factor):
            return math.inf
        exact *= Fraction(factor)
    try:
        near = float(exact)
    except OverflowError:
        return math.inf
    return near if near >= exact else math.nextafter(near, math.inf)
