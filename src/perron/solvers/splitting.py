"""Operator splitting for cells sigma(W z + b) with I - W strongly monotone.

Source: Winston, Kolter, "Monotone operator equilibrium networks", NeurIPS 2020 (arXiv 2006.08591), section 3. Peaceman and
Rachford's method with step 1, where the resolvent of the nonlinear part is sigma itself, serves every such activation;
it converges linearly for every positive margin. One factorisation of 2 I - W serves all steps and samples.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from perron.affine import DenseStep
from perron.cells import ActivationStep, Chain, InjectStep
from perron.solvers.base import FixedPointProblem

__all__ = ["Splitting"]


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
        self.activation = activation
        offset = problem.injection if affine.bias is None else problem.injection + affine.bias
        eye = torch.eye(len(affine.weight), dtype=offset.dtype, device=offset.device)
        factors, pivots, _ = torch.linalg.lu_factor_ex(2 * eye - affine.weight.detach())
        self.factors: tuple[Tensor, Tensor] = (factors, pivots)
        self.offset = offset
        self.auxiliary: Tensor | None = None

    def advance(self, z: Tensor, fz: Tensor) -> Tensor:
        # sigma(u) = z holds for this u at the fixed point, so it is a fair start.
        u = z if self.auxiliary is None else self.auxiliary
        half = 2 * z - u
        solved = torch.linalg.lu_solve(*self.factors, (half + self.offset).t()).t()
        self.auxiliary = 2 * solved - half
        return self.activation(self.auxiliary)

    def select(self, index: Tensor) -> Splitting:
        new = object.__new__(Splitting)
        new.activation, new.factors, new.offset = self.activation, self.factors, self.offset[index]
        new.auxiliary = None if self.auxiliary is None else self.auxiliary[index]
        return new

    def forget(self, mask: Tensor) -> None:
        pass
