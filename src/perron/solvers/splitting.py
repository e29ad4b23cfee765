"""Operator splitting for cells sigma(W z + b) with I - W strongly monotone.

Source: Winston, Kolter, "Monotone operator equilibrium networks", NeurIPS 2020 (arXiv 2006.08591), section 3. Peaceman and
Rachford's method with step 1, where the resolvent of the nonlinear part is sigma itself, serves every such activation;
it converges linearly for every positive margin. One factorisation of 2 I - W serves all steps and samples. The auxiliary
variable u, whose image sigma(u) is z, is mixed after Anderson; where its residual grows instead, a plain step is taken.
"""

from __future__ import annotations

import math
from copy import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from perron._batch import per_sample
from perron.affine import DenseStep
from perron.cells import ActivationStep, Chain, InjectStep
from perron.monotone import margin
from perron.solvers.base import FixedPointProblem
from perron.solvers.mixing import Mixing

__all__ = ["Splitting", "splitting_for"]

# Of the mixing; and how far the residual may grow over the least one.
_WINDOW, _TRUST = 5, 1.0


class Splitting:
    """Peaceman and Rachford's steps as a method of `perron.solvers.iteration`.

    Args:
        problem: its map is a chain sigma(W z + b), W dense.
    """

    products, trust = 0, math.inf

    def __init__(self, problem: FixedPointProblem) -> None:
        chain = problem.map
        assert isinstance(chain, Chain)
        affine, inject, activation = chain.steps
        assert isinstance(affine, DenseStep)
        assert isinstance(inject, InjectStep)
        assert isinstance(activation, ActivationStep)
        self.activation, self.weight = activation, affine.weight.detach()
        offset = problem.injection if affine.bias is None else problem.injection + affine.bias
        eye = torch.eye(len(affine.weight), dtype=offset.dtype, device=offset.device)
        factors, pivots, _ = torch.linalg.lu_factor_ex(2 * eye - affine.weight.detach())
        self.factors: tuple[Tensor, Tensor] = (factors, pivots)
        self.offset = offset
        self.mixing = Mixing(_WINDOW)
        # u, and per sample the best plain step so far with its residual.
        self.auxiliary: Tensor | None = None
        self.best, self.least = offset, offset.new_full((len(offset),), math.inf)

    def _plain(self, u: Tensor) -> Tensor:
        """One step of the method, a contraction in u."""
        half = 2 * self.activation(u) - u
        rows = (half + self.offset).flatten(0, -2)
        solved = torch.linalg.lu_solve(*self.factors, rows.t()).t()
        return 2 * solved.reshape(half.shape) - half

    def advance(self, z: Tensor, fz: Tensor) -> Tensor:
        # At the fixed point u = W z + b.
        u = (F.linear(z, self.weight) + self.offset) if self.auxiliary is None else self.auxiliary
        new = self._plain(u)
        size = (new - u).flatten(1).norm(dim=1)
        grown = size > _TRUST * self.least
        better = size < self.least
        self.best = torch.where(per_sample(better, u), new, self.best)
        self.least = torch.minimum(self.least, size)
        mixed = self.mixing(u, new - u)
        self.mixing.forget(grown)
        self.auxiliary = torch.where(per_sample(grown, u), self.best, mixed)
        return self.activation(self.auxiliary)

    def select(self, index: Tensor) -> Splitting:
        new = copy(self)
        new.offset, new.best, new.least = self.offset[index], self.best[index], self.least[index]
        new.auxiliary = None if self.auxiliary is None else self.auxiliary[index]
        new.mixing = self.mixing.select(index)
        return new

    def forget(self, mask: Tensor) -> None:
        pass


def splitting_for(problem: FixedPointProblem) -> Splitting | None:
    """The method where the cell of the problem is monotone, else None."""
    chain = problem.map
    if problem.contracts and isinstance(chain, Chain) and problem.injection.numel() and margin(chain) > 0:
        return Splitting(problem)
    return None
