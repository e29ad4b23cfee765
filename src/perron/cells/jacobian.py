"""The Jacobian of a cell as an operator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perron.cells.step import Map

__all__ = ["AutomaticLinearization"]


@dataclass(frozen=True)
class AutomaticLinearization:
    """J by automatic differentiation of one evaluation."""

    z: Tensor
    y: Tensor

    @classmethod
    def of(cls, map: Map, z: Tensor, injection: Tensor) -> AutomaticLinearization:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            y = map.rebind([t.detach() for t in map.tensors])(z, injection.detach())
        return cls(z, y)

    def rmatvec(self, g: Tensor) -> Tensor:
        return torch.autograd.grad(self.y, self.z, g, retain_graph=True)[0]

    def matvec(self, w: Tensor) -> Tensor:
        with torch.enable_grad():
            g = torch.zeros_like(self.y, requires_grad=True)
            (v,) = torch.autograd.grad(self.y, self.z, g, retain_graph=True, create_graph=True)
        return torch.autograd.grad(v, g, w, retain_graph=True)[0]
