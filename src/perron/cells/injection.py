"""Where a cell adds its injection."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["INJECTION", "Inject", "InjectStep"]


# The injection of the cell that is being evaluated.
INJECTION: ContextVar[Tensor | None] = ContextVar("injection", default=None)


class Inject(nn.Module):
    """Marks where a cell adds its injection: inside `nn.Sequential(Linear, Inject(), Activation)`, v -> v + b."""

    def forward(self, v: Tensor) -> Tensor:
        injection = INJECTION.get()
        if injection is None:
            raise RuntimeError("Inject() only has a meaning inside the cell of an equilibrium layer")
        return v + injection


@dataclass(frozen=True)
class InjectStep:
    """v -> v + b."""

    def __call__(self, v: Tensor, injection: Tensor) -> Tensor:
        if v.shape != injection.shape:
            # Broadcasting would make a map whose Jacobian is not the one of these steps.
            raise ValueError(
                f"the injection has shape {tuple(injection.shape)}, but where the cell adds it the state has {tuple(v.shape)}"
            )
        return v + injection
