"""What every solver is given."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from perron.cells.chain import Chain
from perron.cells.opaque import OneSystem, Opaque
from perron.theory.base import Theory

__all__ = ["Cell", "FixedPointProblem"]

Cell = Chain | Opaque | OneSystem


@dataclass(frozen=True, kw_only=True)
class FixedPointProblem:
    """z = f(z; b) for a batch of injections b, starting at zero.

    Attributes:
        map: the cell.
        injection: (batch, ...) b; the state has the same shape.
        theory: what is proven of the cell for these injections, or None. `perron.theory.pose` finds it.
    """

    map: Cell
    injection: Tensor
    theory: Theory | None = None

    def __call__(self, z: Tensor) -> Tensor:
        value = self.map(z, self.injection)
        # A cell that differentiates inside may hand out its graph, which would grow with every step.
        return value.detach() if value.requires_grad else value

    def as_one_system(self) -> FixedPointProblem:
        """The same with the whole batch as one sample."""
        assert isinstance(self.map, Opaque)
        return replace(self, map=OneSystem(self.map), injection=self.injection.unsqueeze(0))

    def select(self, index: Tensor) -> FixedPointProblem:
        return replace(self, map=self.map.select(index), injection=self.injection[index])

    def to(self, dtype: torch.dtype) -> FixedPointProblem:
        if self.injection.dtype == dtype:
            return self
        assert isinstance(self.map, Chain)
        return replace(self, map=self.map.to(dtype), injection=self.injection.to(dtype))
