"""Iterative aggregation: a rank-one model of the cell's matrix, cheap enough to solve for every sample.

A nonnegative matrix is often near the rank-one matrix r c^T / s of its row sums r = A 1, its column sums c = A^T 1 and
its total s. In that model the fixed point of sigma(A z + b) is a scalar equation per sample, and (I - D A)^{-1} has a
closed form (Sherman-Morrison). Both cost no product with A. After Chatelin & Miranker, "Acceleration by aggregation of
successive approximation methods" (1982).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perron.activations import Activation
from perron.cells.chain import Chain
from perron.solvers.mixing import TRUST, Mixing

__all__ = ["Aggregation", "ChannelAggregation", "Mixed"]

# Newton steps for the scalar equation: it is concave, and the error of the model is far larger than theirs.
_SCALAR_STEPS = 4
# Power steps that estimate what the model leaves out.
_POWER_STEPS = 4
# Steps for the single-channel equation of a convolution.
_FIELD_STEPS = 4


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
        return (
            chain.single
            and not chain.per_sample
            and activation is not None
            and activation.derivative_of_value is not None
        )

    def to(self, dtype: torch.dtype) -> Aggregation:
        return Aggregation(self.rows.to(dtype), self.columns.to(dtype), self.total.to(dtype), self.activation)

    @classmethod
    def of(cls, chain: Chain, state: Tensor) -> Aggregation | None:
        """The model for states shaped like `state`, or None where the chain has none."""
        if not cls.possible(chain):
            return None
        activation = chain.last_activation
        assert activation is not None
        if (channels := ChannelAggregation.of_convolution(chain, state, activation)) is not None:
            return channels
        ones = torch.ones_like(state[:1])
        image = chain.linear(ones)
        if image.shape != ones.shape:
            return None
        rows, columns = image.flatten(), ones
        for step in reversed(chain.affine):
            columns = step.transpose(columns, ones.shape)
        return cls(rows, columns.flatten(), rows.sum().clamp_min(torch.finfo(rows.dtype).tiny), activation)

    def mismatch(self, chain: Chain, state: Tensor) -> float:
        """About how much slower than the model's own mode the rest of A decays: |second| over first eigenvalue."""
        x = torch.ones_like(self.rows)
        x[::2] = -1
        growth = x.new_ones(())
        for _ in range(_POWER_STEPS):
            y = chain.linear(x.view_as(state[:1])).flatten() - self.rows * (self.columns @ x) / self.total
            growth = y.norm()
            x = y / growth.clamp_min(torch.finfo(y.dtype).tiny)
        own = (self.columns @ self.rows) / self.total
        return float(growth / own.clamp_min(torch.finfo(own.dtype).tiny))

    @property
    def _scalar_steps(self) -> int:
        return _SCALAR_STEPS

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
        for _ in range(self._scalar_steps):
            z = self.activation(torch.addcmul(flat, self.rows, t.unsqueeze(1)))
            t = t + (z @ weights - t) / (1 - self.slope(z) @ products).clamp_min(0.05)
            t = t.clamp_min(0)
        return self.activation(torch.addcmul(flat, self.rows, t.unsqueeze(1))).view_as(base)

    def correct(self, value: Tensor, residual: Tensor) -> Tensor:
        """(I - D A)^{-1} residual in the model, D taken at the value of the activation."""
        steep = self.slope(value.flatten(1)) * self.rows
        return _rank_one(steep, self.columns, self.total, residual, self.columns, steep)

    def correct_adjoint(self, slope: Tensor, residual: Tensor) -> Tensor:
        """(I - A^T D)^{-1} residual in the model."""
        steep = slope.flatten(1) * self.rows
        return _rank_one(steep, self.columns, self.total, residual, steep, self.columns)


def _rank_one(steep: Tensor, columns: Tensor, total: Tensor, residual: Tensor, onto: Tensor, along: Tensor) -> Tensor:
    """residual + along (onto . residual)/(total - steep . columns), per sample."""
    r = residual.flatten(1)
    projected = r @ onto if onto.dim() == 1 else torch.linalg.vecdot(r, onto)
    scale = projected / (total - steep @ columns).clamp_min(1e-3 * total)
    return torch.addcmul(r, along, scale.unsqueeze(1)).view_as(residual)


@dataclass(frozen=True)
class ChannelAggregation(Aggregation):
    """The model of a convolution: r[o] c[i] t[offset]/s for its kernel.

    Attributes:
        r, c: (channels,) sums of the kernel over inputs and offsets, and over outputs and offsets.
        taps: (1, 1, *kernel) sums over channels, divided by their total s.
        sum: s.
    """

    r: Tensor
    c: Tensor
    taps: Tensor
    sum: Tensor

    @property
    def _scalar_steps(self) -> int:
        # The scalar says little of a field: it is a beginning only.
        return 2

    @classmethod
    def of_convolution(cls, chain: Chain, state: Tensor, activation: Activation) -> ChannelAggregation | None:
        weight = chain.affine[0].kernel_of_same_shape() if len(chain.affine) == 1 else None
        if weight is None:
            return None
        flat = weight.flatten(2)
        total = flat.sum().clamp_min(torch.finfo(weight.dtype).tiny)
        taps = (flat.sum((0, 1)) / total).view(1, 1, *weight.shape[2:])
        r, c = flat.sum((1, 2)), flat.sum((0, 2))
        one = torch.ones_like(state[:1, :1])
        over, under = _convolve(one, taps, False), _convolve(one, taps, True)
        outer = [-1] + [1] * (state.dim() - 2)
        rows = (r.view(outer) * over[0]).flatten()
        columns = (c.view(outer) * under[0]).flatten()
        # The sum of all entries of A, those cut off at the border left out.
        return cls(rows, columns, total * over.sum(), activation, r, c, taps, total)

    def to(self, dtype: torch.dtype) -> ChannelAggregation:
        parts: dict[str, Any] = {k: v.to(dtype) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **parts)

    def correct(self, value: Tensor, residual: Tensor) -> Tensor:
        """(I - D A)^{-1} residual in the model."""
        steep = self._per_channel(self.r) * self.slope(value)
        return self._solve(steep, self._contract(self.c, residual), residual, self._contract(self.c, steep), False)

    def correct_adjoint(self, slope: Tensor, residual: Tensor) -> Tensor:
        """(I - A^T D)^{-1} residual in the model."""
        steep = self._per_channel(self.r) * slope
        onto = (steep * residual).sum(1, keepdim=True)
        along = self._per_channel(self.c)
        return self._solve(along, onto, residual, self._contract(self.c, steep), True)

    def _solve(self, along: Tensor, onto: Tensor, residual: Tensor, mass: Tensor, transposed: bool) -> Tensor:
        """residual + along T a/s, where a = onto + (mass/s) T a."""
        mass = mass / self.sum
        one = torch.ones_like(onto[:1])
        rows, columns = (_convolve(one, self.taps, t).flatten() for t in (transposed, not transposed))
        steep = mass.flatten(1) * rows
        mixing, a = Mixing(_FIELD_STEPS, linear=True), torch.zeros_like(onto)
        left = onto
        for k in range(_FIELD_STEPS):
            a = mixing(a, _rank_one(steep, columns, rows.sum(), left, columns, steep))
            image = _convolve(a, self.taps, transposed)
            if k + 1 < _FIELD_STEPS:
                left = torch.addcmul(onto, mass, image) - a
        return torch.addcmul(residual, along.expand_as(residual), image / self.sum)

    def _per_channel(self, t: Tensor) -> Tensor:
        return t.view(1, -1, *[1] * (self.taps.dim() - 2))

    @staticmethod
    def _contract(weights: Tensor, field: Tensor) -> Tensor:
        """Sum over channels: (batch, channels, ...) -> (batch, 1, ...)."""
        return (weights @ field.flatten(2)).view(len(field), 1, *field.shape[2:])


def _convolve(field: Tensor, taps: Tensor, transposed: bool) -> Tensor:
    """The taps, or their transpose, on a (batch, 1, ...) field, zero outside."""
    taps = taps.flip(list(range(2, taps.dim()))) if transposed else taps
    convolution: Any = (F.conv1d, F.conv2d, F.conv3d)[taps.dim() - 3]
    return convolution(field, taps, padding=[(k - 1) // 2 for k in taps.shape[2:]])


class Mixed:
    """The method z -> f(z), corrected by the rank-one model where there is one, and mixed."""

    products, trust = 0, TRUST

    def __init__(self, model: Aggregation | None, mixing: Mixing) -> None:
        self.model, self.mixing = model, mixing

    def advance(self, z: Tensor, fz: Tensor, room: int) -> Tensor:
        residual = fz - z
        return self.mixing(z, residual if self.model is None else self.model.correct(fz, residual))

    def select(self, index: Tensor) -> Mixed:
        return Mixed(self.model, self.mixing.select(index))
