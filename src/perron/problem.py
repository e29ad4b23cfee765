"""What every solver is given."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from perron.cells.chain import Chain
from perron.cells.opaque import OneSystem, Opaque

__all__ = ["Cell", "FixedPointProblem", "Structure"]

Cell = Chain | Opaque | OneSystem

# What is proven of a cell: J >= 0, and J falls as z grows; or F contracts, with J of any sign.
Structure = Literal["concave", "contracting", "unknown"]


@dataclass(frozen=True)
class FixedPointProblem:
    """z = f(z; b) for a batch of injections b, starting at zero.

    Attributes:
        map: the cell.
        injection: (batch, ...) b; the state has the same shape.
        proven: the map is positive concave, and its certificate holds for every injection here that is finite.
        contracts: whether it contracts is to be seen on every sample (`perron.theory.contraction`).
    """

    map: Cell
    injection: Tensor
    proven: bool = False
    contracts: bool = False

    def __call__(self, z: Tensor) -> Tensor:
        value = self.map(z, self.injection)
        # A cell that differentiates inside may hand out its graph, which would grow with every step.
        return value.detach() if value.requires_grad else value

    def as_one_system(self) -> FixedPointProblem:
        """The same with the whole batch as one sample."""
        assert isinstance(self.map, Opaque)
        return replace(self, map=OneSystem(self.map), injection=self.injection.unsqueeze(0))

    @property
    def structure(self) -> Structure:
        if self.proven:
            return "concave"
        known = self.contracts and isinstance(self.map, Chain) and not self.map.normalizes
        return "contracting" if known else "unknown"

    def select(self, index: Tensor) -> FixedPointProblem:
        return replace(self, map=self.map.select(index), injection=self.injection[index])

    def to(self, dtype: torch.dtype) -> FixedPointProblem:
        if self.injection.dtype == dtype:
            return self
        assert isinstance(self.map, Chain)
        return replace(self, map=self.map.to(dtype), injection=self.injection.to(dtype))
