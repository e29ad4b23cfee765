"""What compilers of whole models are told: what they may take for constant, and what they leave as it is.

`torch.compiler.assume_constant_result` and `torch.compiler.disable` say so as well, but to mention either imports the
compiler, which takes as long as torch itself. `import perron` shall not, nor whoever compiles nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["Call", "constant", "outside_compilers"]

Function = TypeVar("Function", bound=Callable[..., Any])
Call = Callable[..., Any]


def constant(function: Function) -> Function:
    """Declares that compilers may take the result for a constant. A decorator; `torch.compiler.assume_constant_result`."""
    # This mark is all that torch's own decorator does.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def outside_compilers() -> Call:
    """What calls a function, given with its arguments, such that compilers leave it and all that it calls as they are.

    Not a decorator: its frame would be compiled around the call. Where no compiler was imported, none is at work.
    """
    if torch.compiler.is_compiling() or "torch._dynamo" in sys.modules:
        from perron._numerics.uncompiled import call

        return call
    return _call


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)
