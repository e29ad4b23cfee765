"""Imported only beside a compiler: see `perron._numerics.compilers`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["call"]


@torch.compiler.disable
def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), as it is."""
    return function(*arguments)
