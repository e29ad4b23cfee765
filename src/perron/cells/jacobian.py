"""The Jacobian of a cell as an operator: of a chain by its factors, of any other cell by automatic differentiation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from perron._numerics.batch import amax
from perron.cells.affine_map import AffineMap
from perron.cells.map import Map
from perron.cells.refusal import Refusal

__all__ = ["AutomaticLinearization", "Diagonal", "Factor", "Jacobian", "Product"]


class Factor(ABC):
    """One factor of a Jacobian, an operator on (batch, ...) tensors."""

    @abstractmethod
    def matvec(self, w: Tensor) -> Tensor: ...

    @abstractmethod
    def rmatvec(self, g: Tensor) -> Tensor: ...

    @abstractmethod
    def select(self, index: Tensor) -> Factor:
        """For these samples only."""

    @abstractmethod
    def vary(self, flat: Factor, w: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
        """One step of `Jacobian.variation`: this is the steep factor."""

    @abstractmethod
    def lose(self, lost: Tensor, dtype: torch.dtype, *, first: bool) -> Tensor:
        """One step of `Jacobian.underflow`; nothing was lost before the first factor."""

    def diagonal(self) -> Tensor:
        """The diagonal that it is.

        Raises:
            Refusal: it is none.
        """
        raise Refusal(f"a {type(self).__name__} is no diagonal")

    def matrix(self) -> Tensor | None:
        """A matrix (out, in) on the last dimension, where it is at hand as one."""
        return None


@dataclass(frozen=True)
class Diagonal(Factor):
    """The slopes of an elementwise step, (batch, ...)."""

    slope: Tensor

    def matvec(self, w: Tensor) -> Tensor:
        return self.slope * w

    def rmatvec(self, g: Tensor) -> Tensor:
        return self.slope * g

    def select(self, index: Tensor) -> Diagonal:
        return Diagonal(self.slope[index])

    def vary(self, flat: Factor, w: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
        most, least = self.slope, flat.diagonal()
        return most * w, most * change + (most - least) * w

    def lose(self, lost: Tensor, dtype: torch.dtype, *, first: bool) -> Tensor:
        return 2 * amax(self.slope) * lost + torch.finfo(dtype).tiny

    def diagonal(self) -> Tensor:
        return self.slope


@dataclass(frozen=True)
class Product(Factor):
    """The matrix A of an affine map that acts on tensors of `shape`."""

    map: AffineMap
    shape: torch.Size

    def matvec(self, w: Tensor) -> Tensor:
        return self.map.linear(w)

    def rmatvec(self, g: Tensor) -> Tensor:
        return self.map.transpose(g, self.shape)

    def select(self, index: Tensor) -> Product:
        return Product(self.map.select(index), self.shape)

    def vary(self, flat: Factor, w: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
        return self.map.linear(w), self.map.linear(change)

    def lose(self, lost: Tensor, dtype: torch.dtype, *, first: bool) -> Tensor:
        # Row sums cost a pass through the weights.
        passed = lost if first else 2 * self.map.row_sums() * lost
        return passed + self.map.underflow(dtype)

    def matrix(self) -> Tensor | None:
        return self.map.matrix()


@dataclass(frozen=True)
class Jacobian:
    """J = F_L ... F_1 of a chain at a point: of its affine and its elementwise steps, in their order.

    Or instead of J what bounds |J| from above or below, entry by entry (`perron.theory.contraction.sensitivity`).
    """

    factors: tuple[Factor, ...]

    def matvec(self, w: Tensor) -> Tensor:
        for factor in self.factors:
            w = factor.matvec(w)
        return w

    def rmatvec(self, g: Tensor) -> Tensor:
        for factor in reversed(self.factors):
            g = factor.rmatvec(g)
        return g

    def select(self, index: Tensor) -> Jacobian:
        """J of these samples only."""
        return replace(self, factors=tuple(f.select(index) for f in self.factors))

    @property
    def slope(self) -> Tensor:
        """The diagonal of the elementwise step at the end.

        Raises:
            Refusal: the cell ends otherwise.
        """
        return self.factors[-1].diagonal()

    def stages(self, w: Tensor) -> list[Tensor]:
        """w, and what each factor makes of it."""
        found = [w]
        for factor in self.factors:
            found.append(factor.matvec(found[-1]))
        return found

    def variation(self, flat: Jacobian, w: Tensor) -> Tensor:
        """At least |J(x) - J(y)| w for w >= 0 and any two J between `flat` and this one, but for rounding.

        With u = J_k(x) w and u' = J_k(y) w so far, |u| <= w and |u - u'| <= change, slopes d, d' in [least, most] give
        |d u - d' u'| <= d' |u - u'| + |d - d'| |u| <= most change + (most - least) w; attained by one step of slopes most,
        least. Matrices are the same at x and y.
        """
        change = torch.zeros_like(w)
        for steep, other in zip(self.factors, flat.factors, strict=True):
            w, change = steep.vary(other, w, change)
        return change

    def underflow(self, w: Tensor) -> Tensor:
        """(batch,) what it takes at most from an entry of J w, J >= 0: a number below the range may meet large weights later."""
        lost = w.new_zeros(len(w))
        for k, factor in enumerate(self.factors):
            lost = factor.lose(lost, w.dtype, first=k == 0)
        return lost


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
