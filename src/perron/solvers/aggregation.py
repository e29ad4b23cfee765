"""Iterative aggregation: a rank-one model of the cell's matrix, cheap enough to solve for every sample.

A nonnegative matrix is often near the rank-one matrix r c^T / s of its row sums r = A 1, its column sums c = A^T 1 and
its total s. In that model the fixed point of sigma(A z + b) is a scalar equation per sample, and (I - D A)^{-1} has a
closed form (Sherman-Morrison). Both cost no product with A. After Chatelin & Miranker, "Acceleration by aggregation of
successive approximation methods" (1982).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perron.activations import Activation
from perron.cells import Chain

__all__ = ["Aggregation"]

# Newton steps for the scalar equation: it is concave, and the error of the model is far larger than theirs.
_SCALAR_STEPS = 4


@dataclass(frozen=True)
class Aggregation:
    """The rank-one model of a `single` chain sigma(A z + ...), with A's row and column sums, (entries,) each."""

    rows: Tensor
    columns: Tensor
    total: Tensor
    activation: Activation

    @staticmethod
    def possible(chain: Chain) -> bool:
        """Whether a chain has such a model, if it keeps the shape of its state."""
        activation = chain.last_activation
        return chain.single and activation is not None and activation.derivative_of_value is not None

    def to(self, dtype: torch.dtype) -> Aggregation:
        return Aggregation(self.rows.to(dtype), self.columns.to(dtype), self.total.to(dtype), self.activation)

    @classmethod
    def of(cls, chain: Chain, state: Tensor) -> Aggregation | None:
        """The model for states shaped like `state`, or None where the chain has none."""
        if not cls.possible(chain):
            return None
        activation = chain.last_activation
        assert activation is not None
        ones = torch.ones_like(state[:1])
        image = chain.linear(ones)
        if image.shape != ones.shape:
            return None
        rows, columns = image.flatten(), ones
        for step in reversed(chain.affine):
            columns = step.transpose(columns, ones.shape)
        return cls(rows, columns.flatten(), rows.sum().clamp_min(torch.finfo(rows.dtype).tiny), activation)

    def slope(self, value: Tensor) -> Tensor:
        """D, the derivative of the activation where its value is `value`."""
        assert self.activation.derivative_of_value is not None
        return self.activation.derivative_of_value(value)

    def start(self, base: Tensor) -> Tensor:
        """The model's fixed point sigma(base + r t), with t = c . z / s by Newton's method; base is A 0 + b."""
        flat = base.flatten(1)
        weights, products = self.columns / self.total, self.columns * self.rows / self.total
        top = self.activation.supremum if self.activation.bounded else 1.0
        t = (weights.sum() * top).expand(len(flat))
        for _ in range(_SCALAR_STEPS):
            z = self.activation(torch.addcmul(flat, self.rows, t.unsqueeze(1)))
            t = t + (z @ weights - t) / (1 - self.slope(z) @ products).clamp_min(0.05)
            t = t.clamp_min(0)
        return self.activation(torch.addcmul(flat, self.rows, t.unsqueeze(1))).view_as(base)

    def correct(self, value: Tensor, residual: Tensor) -> Tensor:
        """(I - D A)^{-1} residual in the model, D taken at the value of the activation."""
        r = residual.flatten(1)
        steep = self.slope(value.flatten(1)) * self.rows
        scale = (r @ self.columns) / (self.total - steep @ self.columns).clamp_min(1e-3 * self.total)
        return torch.addcmul(r, steep, scale.unsqueeze(1)).view_as(residual)

    def correct_adjoint(self, slope: Tensor, residual: Tensor) -> Tensor:
        """(I - A^T D)^{-1} residual in the model."""
        r = residual.flatten(1)
        steep = slope.flatten(1) * self.rows
        scale = (r * steep).sum(1) / (self.total - steep @ self.columns).clamp_min(1e-3 * self.total)
        return torch.addcmul(r, self.columns, scale.unsqueeze(1)).view_as(residual)
