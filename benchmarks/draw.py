"""Random numbers for the generators of the benchmarks, all from torch's global generator: seed it once per problem."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def power(low: float, high: float) -> float:
    """Ten to an exponent between these."""
    return 10 ** uniform(low, high)


def chance(probability: float) -> bool:
    return float(torch.rand(())) < probability


def integer(low: int, high: int) -> int:
    """Between these, both included."""
    return int(torch.randint(low, high + 1, ()))


def pick(options: Sequence[T]) -> T:
    return options[integer(0, len(options) - 1)]


def rand(*shape: int) -> Tensor:
    """Uniform in [0, 1), float64."""
    return torch.rand(shape, dtype=torch.float64)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def powers(low: float, high: float, *shape: int) -> Tensor:
    return 10 ** (low + (high - low) * rand(*shape))
