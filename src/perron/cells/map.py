"""What every cell is, whether its structure was read or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

__all__ = ["Linearization", "Map"]


class Linearization(Protocol):
    """The Jacobian J of a cell at a point, as an operator on (batch, ...) tensors."""

    def matvec(self, w: Tensor) -> Tensor:
        """J w."""

    def rmatvec(self, g: Tensor) -> Tensor:
        """J^T g."""


class Map(Protocol):
    """f(z; b), a function of the tensors it was read with."""

    @property
    def tensors(self) -> tuple[Tensor, ...]: ...

    def rebind(self, tensors: Sequence[Tensor]) -> Map: ...

    def with_kept(self, z: Tensor, injection: Tensor) -> Map:
        """The same map, whose `tensors` are all that f needs a gradient for.

        Raises:
            ValueError: f depends on another tensor that requires a gradient, which would be lost.
        """

    def __call__(self, z: Tensor, injection: Tensor) -> Tensor: ...

    def linearize(self, z: Tensor, injection: Tensor) -> Linearization: ...
