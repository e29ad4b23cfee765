"""A diagonal plus a matrix of low rank, as a module and as a step."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from perron.cells import reading
from perron.cells.affine import AffineStep
from perron.cells.affine_map import AffineMap, largest
from perron.cells.refusal import Refusal
from perron.cells.step import known

__all__ = ["DiagonalLowRank", "DiagonalLowRankStep"]


class DiagonalLowRank(nn.Module):
    """y = x W^T (+ bias) with W = diag(diagonal) + left right^T.

    Args:
        features: size n of W.
        rank: columns of `left` and `right`.
        bias: whether to add one.

    Shape:
        input and output (batch, features); `diagonal` (features,), `left` and `right` (features, rank).

    Raises:
        ValueError: the rank is negative.

    >>> DiagonalLowRank(5, 2)(torch.ones(3, 5)).shape
    torch.Size([3, 5])
    """

    def __init__(
        self,
        features: int,
        rank: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rank < 0:
            raise ValueError(f"rank must not be negative, got {rank}")
        self.features, self.rank = features, rank
        self.diagonal = nn.Parameter(torch.empty(features, device=device, dtype=dtype))
        self.left = nn.Parameter(torch.empty(features, rank, device=device, dtype=dtype))
        self.right = nn.Parameter(torch.empty(features, rank, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Nonnegative, with row sums about 0.9, half of them on the diagonal."""
        scale = math.sqrt(4 * 0.45 / max(1, self.features * self.rank))
        with torch.no_grad():
            self.diagonal.copy_(torch.full_like(self.diagonal, 0.45))
            self.left.copy_(torch.empty_like(self.left).uniform_(0, scale))
            self.right.copy_(torch.empty_like(self.right).uniform_(0, scale))
            if self.bias is not None:
                self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.diagonal + (x @ self.right) @ self.left.t()
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{self.features}, rank={self.rank}, bias={self.bias is not None}"


@known
@dataclass(frozen=True, kw_only=True)
class DiagonalLowRankStep(AffineStep):
    """A = diag(d) + L R^T; `weights` is (d, L, R)."""

    @property
    def terms(self) -> int:
        features, rank = self.weights[1].shape
        return features + rank + 1

    def apply(self, v: Tensor, bias: Tensor | None) -> Tensor:
        diagonal, left, right = self.weights
        y = v * diagonal + (v @ right) @ left.t()
        return y if bias is None else y + bias

    def transpose(self, g: Tensor, shape: torch.Size) -> Tensor:
        diagonal, left, right = self.weights
        return g * diagonal + (g @ left) @ right.t()

    def sizes(self) -> dict[str, tuple[int, int]]:
        shapes = [tuple(w.shape) for w in self.weights]
        diagonal, left, right = self.weights
        if diagonal.dim() != 1 or left.dim() != 2 or left.shape[0] != len(diagonal) or left.shape != right.shape:
            raise Refusal(f"a diagonal, left and right factor of shapes {shapes} do not fit each other")
        self.check_bias(len(diagonal))
        return {"features": (len(diagonal), len(diagonal))}

    def signature(self) -> Hashable:
        return self.structure()

    def underflow(self, dtype: torch.dtype) -> Tensor | float:
        # What R^T v loses passes through L.
        left = self.weights[1].detach().double().abs()
        return super().underflow(dtype) * (1 + 2 * largest(left.sum(1)))

    def largest_row(self) -> Tensor:
        diagonal, left, right = self.weights
        return largest(diagonal + left @ right.sum(0)) + self.underflow(torch.float64)

    def channels(self) -> tuple[AffineMap, ...]:
        return (replace(self.exact(), bias=None),)

    def keeps_positive(self) -> bool:
        diagonal, left, right = self.exact().weights
        return bool(((diagonal > 0) | (left @ right.sum(0) > 0)).all())


@reading.reads(DiagonalLowRank)
def diagonal_low_rank_step(module: DiagonalLowRank, path: str) -> AffineStep:
    return DiagonalLowRankStep(weights=(module.diagonal, module.left, module.right), bias=module.bias)
