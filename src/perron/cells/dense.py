"""Matrices: `nn.Linear` as a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perron._numerics.rounding import gamma
from perron.cells import reading
from perron.cells.affine import AffineStep
from perron.cells.affine_map import AffineMap, largest
from perron.cells.refusal import Refusal
from perron.cells.step import known

__all__ = ["DenseStep"]


@known
@dataclass(frozen=True, kw_only=True)
class DenseStep(AffineStep):
    """A is a matrix (out, in)."""

    @property
    def weight(self) -> Tensor:
        return self.weights[0]

    @property
    def terms(self) -> int:
        return max(self.weight.shape)

    def apply(self, v: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(v, self.weight, bias)

    def transpose(self, g: Tensor, shape: torch.Size) -> Tensor:
        return g @ self.weight

    def sizes(self) -> dict[str, tuple[int, int]]:
        if self.weight.dim() != 2:
            raise Refusal(f"a linear map needs a matrix, and its weight has shape {tuple(self.weight.shape)}")
        self.check_bias(self.weight.shape[0])
        return {"features": (self.weight.shape[1], self.weight.shape[0])}

    def largest_row(self) -> Tensor:
        return largest(self.weight.sum(1))

    def matrix(self) -> Tensor:
        return self.weight

    def signature(self) -> Hashable:
        return self.structure()

    def resolvent(self, state: Tensor, *, transposed: bool = False) -> Callable[[Tensor], Tensor]:
        weight = self.weight.t() if transposed else self.weight
        eye = torch.eye(len(weight), dtype=state.dtype, device=state.device)
        factors, pivots, _ = torch.linalg.lu_factor_ex(2 * eye - weight)

        def solve(r: Tensor) -> Tensor:
            return torch.linalg.lu_solve(factors, pivots, r.flatten(0, -2).t()).t().reshape(r.shape)

        return solve

    def margin(self) -> float:
        """From the eigenvalues of S = I - (W + W^T)/2 in float64; a Cholesky factorisation proves them.

        S is computed with an entrywise error of at most 2 u |S_ij|, since the diagonal of W + W^T is exact. A
        factorisation of T = S - t I that ends has T + E = R^T R with |E_ij| <= g/(1 - g) sqrt(T_ii T_jj), g =
        gamma(n + 1) (Higham 2002, theorem 10.3 and its proof), so T >= -g/(1 - g) tr(T), and t less that is a margin.
        """
        weight = self.weight.detach().double()
        n = len(weight)
        if weight.dim() != 2 or weight.shape[1] != n or n == 0 or not bool(torch.isfinite(weight).all()):
            return -math.inf
        eye = torch.eye(n, dtype=torch.float64, device=weight.device)
        symmetric = eye - (weight + weight.t()) / 2
        size = float(symmetric.norm())
        if not 0 < size < math.inf:
            return 0.0 if size == 0 else -math.inf
        t = float(torch.linalg.eigvalsh(symmetric)[0]) - (n * n + 16) * 2.0**-53 * size
        shifted = symmetric - t * eye
        if int(torch.linalg.cholesky_ex(shifted)[1]):
            return -math.inf
        # The subtraction of t rounds the diagonal once more; underflow is far below the last term.
        trace = float(shifted.diagonal().sum())
        return t - (2 * gamma(n + 4, torch.float64) * trace + 8 * 2.0**-53 * size + 1e-290)

    def norm(self) -> float:
        # Of Frobenius; squares that underflow add less than the last term.
        found = float(self.weight.detach().double().norm())
        return found * (1 + 2 * gamma(self.weight.numel() + 8, torch.float64)) + 1e-140

    def gradients(self, v: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        if v.dim() != 2:
            return super().gradients(v, y)
        return (y.t() @ v, *self._bias_gradient(y))

    def _bias_gradient(self, y: Tensor) -> tuple[Tensor, ...]:
        return () if self.bias is None else (y.flatten(0, -2).sum(0),)

    def channels(self) -> tuple[AffineMap, ...]:
        return (replace(self.exact(), bias=None),)

    def keeps_positive(self) -> bool:
        return bool((self.weight.amax(1) > 0).all()) if self.weight.numel() else False


@reading.reads(nn.Linear)
def linear_step(module: nn.Linear, path: str) -> AffineStep:
    return DenseStep(weights=(module.weight,), bias=module.bias)
