"""Operator splitting for cells sigma(W z + b) with I - W strongly monotone, and for the linear equations at their fixed points.

Source: Winston, Kolter, "Monotone operator equilibrium networks", NeurIPS 2020 (arXiv 2006.08591), section 3. Peaceman and
Rachford's method with step 1, where the resolvent of the nonlinear part is sigma itself, serves every such activation;
it converges linearly for every positive margin. One factorisation of 2 I - W serves all steps and samples: of the matrix,
or of what a circular convolution does to each Fourier mode. The auxiliary variable u, whose image sigma(u) is z, is mixed
after Anderson; where its residual grows instead, the unmixed step from the best one so far is taken, which does not.

Forward-backward steps z <- sigma((1 - a) z + a (W z + b)) need no factorisation; they converge for 0 < a < 2 m/|I - W|^2,
slowly, where sigma is a projection, whose scaled resolvents are all the same.

With D = diag(sigma') at the fixed point, 0 <= D <= 1, the linear equations have the same form. The adjoint g = W^T D g + v
is u of the map y = D (W^T y + v); the tangent w = D W w + v is y + v with y = D (W y + W v).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy

import torch
from torch import Tensor

from perron._numerics.batch import per_sample
from perron.cells.chain import Chain
from perron.cells.jacobian import Jacobian
from perron.problem import FixedPointProblem
from perron.solvers.mixing import Mixing
from perron.theory.monotone_operator import margin

__all__ = [
    "ForwardBackward",
    "LinearSplitting",
    "Splitting",
    "forward_backward_for",
    "splitting_for",
]

# Of the mixing; and how far the residual may grow over the least one.
_WINDOW, _TRUST = 5, 1.0


class _Mixed(ABC):
    """Steps of a splitting, mixed after Anderson, as a method of `perron.solvers.iteration`.

    Args:
        offset: (batch, ...) what W z is added to.
    """

    trust = math.inf
    # Products with W that `begin` and `next_auxiliary` take.
    beginning, each = 0, 0

    def __init__(self, offset: Tensor) -> None:
        self.offset = offset
        self.products = 0
        self.mixing = Mixing(_WINDOW)
        # u; and per sample the best one so far, the unmixed step from there, and how far that went.
        self.auxiliary: Tensor | None = None
        self.best = offset, offset
        self.least = offset.new_full((len(offset),), math.inf)

    @abstractmethod
    def begin(self, z: Tensor) -> Tensor:
        """u for an iterate z, exact at the fixed point."""

    @abstractmethod
    def next_auxiliary(self, u: Tensor) -> Tensor:
        """One step of the splitting."""

    @abstractmethod
    def iterate(self, u: Tensor) -> Tensor:
        """The iterate for a u."""

    def advance(self, z: Tensor, fz: Tensor, room: int) -> Tensor:
        self.products = self.each + (self.beginning if self.auxiliary is None else 0)
        if self.products > room:
            self.products = 0
            return z
        u = self.begin(z) if self.auxiliary is None else self.auxiliary
        new = self.next_auxiliary(u)
        size = (new - u).flatten(1).norm(dim=1)
        # NaN compares false, and is taken back.
        grown = per_sample(~(size <= _TRUST * self.least), u)
        u, new = torch.where(grown, self.best[0], u), torch.where(grown, self.best[1], new)
        mixed = self.mixing(u, new - u)
        self.best, self.least = (u, new), torch.fmin(self.least, size)
        self.auxiliary = torch.where(grown, new, mixed)
        return self.iterate(self.auxiliary)

    def select(self, index: Tensor) -> _Mixed:
        new = copy(self)
        new.offset, new.least = self.offset[index], self.least[index]
        new.best = self.best[0][index], self.best[1][index]
        new.auxiliary = None if self.auxiliary is None else self.auxiliary[index]
        new.mixing = self.mixing.select(index)
        return new


class _PeacemanRachford(_Mixed):
    """u <- 2 (2 I - W)^{-1} (2 z - u + b) - (2 z - u), z the image of u: a contraction in u.

    Args:
        offset: b.
        resolvent: r -> (2 I - W)^{-1} r.
    """

    def __init__(self, offset: Tensor, resolvent: Callable[[Tensor], Tensor]) -> None:
        super().__init__(offset)
        self.resolvent = resolvent

    @abstractmethod
    def image(self, u: Tensor) -> Tensor:
        """The resolvent of the other part: sigma(u), or D u."""

    def iterate(self, u: Tensor) -> Tensor:
        return self.image(u)

    def next_auxiliary(self, u: Tensor) -> Tensor:
        half = 2 * self.image(u) - u
        return 2 * self.resolvent(half + self.offset) - half


class Splitting(_PeacemanRachford):
    """For z = sigma(W z + b).

    Args:
        problem: its map is a chain sigma(W z + b), W dense or a monotone convolution.
    """

    beginning = 1

    def __init__(self, problem: FixedPointProblem) -> None:
        chain = problem.map
        assert isinstance(chain, Chain)
        (affine,) = chain.affine
        self.sigma = chain.steps[-1]
        self.step = affine.rebind([t.detach() for t in affine.tensors])
        offset = problem.injection if affine.bias is None else problem.injection + affine.bias
        super().__init__(offset, self.step.resolvent(offset))

    def image(self, u: Tensor) -> Tensor:
        return self.sigma(u, self.offset)

    def begin(self, z: Tensor) -> Tensor:
        return self.step.linear(z) + self.offset


class ForwardBackward(_Mixed):
    """For z = sigma(W z + b), sigma a projection.

    Args:
        problem: its map is a chain sigma(W z + b).
        size: a of the steps; None for m/|I - W|^2, which is best for what is known of W.
    """

    each = 1

    def __init__(self, problem: FixedPointProblem, size: float | None) -> None:
        chain = problem.map
        assert isinstance(chain, Chain)
        self.map = chain.rebind([t.detach() for t in chain.tensors])
        affine = chain.affine[0]
        self.size = margin(chain) / (1 + affine.norm()) ** 2 if size is None else size
        super().__init__(problem.injection)

    def begin(self, z: Tensor) -> Tensor:
        return z

    def next_auxiliary(self, u: Tensor) -> Tensor:
        return self.map.steps[-1](torch.lerp(u, self.map.preactivation(u, self.offset), self.size), self.offset)

    def iterate(self, u: Tensor) -> Tensor:
        return u


class LinearSplitting(_PeacemanRachford):
    """For g = W^T D g + v or w = D W w + v.

    Args:
        chain: the cell.
        jacobian: D W at a fixed point of such a chain.
        v: (batch, ...) the right-hand side.
        transposed: whether the first equation is meant.
    """

    def __init__(self, chain: Chain, jacobian: Jacobian, v: Tensor, transposed: bool) -> None:
        (step,) = chain.affine
        self.step, self.slope, self.v, self.transposed = step, jacobian.slope, v, transposed
        super().__init__(v if transposed else step.linear(v), step.resolvent(v, transposed=transposed))

    def image(self, u: Tensor) -> Tensor:
        return self.slope * u

    def begin(self, z: Tensor) -> Tensor:
        return z if self.transposed else self.step.linear(z)

    def iterate(self, u: Tensor) -> Tensor:
        return u if self.transposed else self.slope * u + self.v

    def select(self, index: Tensor) -> _Mixed:
        new = super().select(index)
        assert isinstance(new, LinearSplitting)
        new.slope, new.v = self.slope[index], self.v[index]
        return new


def _monotone(problem: FixedPointProblem) -> bool:
    chain = problem.map
    return isinstance(chain, Chain) and problem.injection.numel() > 0 and margin(chain) > 0


def splitting_for(problem: FixedPointProblem) -> Splitting | None:
    """The method where the cell of the problem is monotone, else None."""
    return Splitting(problem) if _monotone(problem) else None


def forward_backward_for(problem: FixedPointProblem, size: float | None) -> ForwardBackward | None:
    """Forward-backward steps where the cell is monotone and its activation a projection, else None."""
    if not _monotone(problem):
        return None
    assert isinstance(problem.map, Chain)
    return ForwardBackward(problem, size) if problem.map.steps[-1].projects else None
