"""Anderson mixing, per sample, on an orthogonal window.

Each call takes z and a step d = g(z) - z of some fixed point iteration g, and returns the mixed point z + beta d, less the
part of z and d that earlier differences explain: the least-squares combination of Anderson (1965). The differences are made
orthogonal from the newest to the oldest (Gram and Schmidt), which needs no normal equations; older ones that newer ones
explain already, up to a tenth, are left out, so that what is kept is never stale.

Differences of a linear map do not go stale. There the basis is kept and the newest difference made orthogonal to it, which
is the method of generalised conjugate residuals.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["TRUST", "Mixing"]

# Mixed residuals may rise before they fall: a step with |J| > 1 is explored at its cost.
TRUST = 10.0
# Part of a difference, in norm, that must be new for it to count; of linear maps, what rounding leaves.
_NEW, _NEW_LINEAR = 0.1, 1e-3


class Mixing:
    """Anderson mixing of (batch, ...) iterates.

    Args:
        window: differences that are kept; beyond it the oldest is dropped.
        damping: beta.
        linear: whether g is affine.
    """

    def __init__(self, window: int, damping: float = 1.0, *, linear: bool = False) -> None:
        self.window, self.damping, self.linear = window, damping, linear
        # Steps and states side by side: (batch, 2 entries), newest first, and for linear maps their orthogonal basis.
        self._last: Tensor | None = None
        self._differences: list[Tensor] = []
        self._basis: list[tuple[Tensor, Tensor]] = []

    def __call__(self, z: Tensor, d: Tensor) -> Tensor:
        shape = z.shape
        pair = torch.cat([d.flatten(1), z.flatten(1)], 1)
        if self._last is not None:
            self._remember(pair - self._last)
        self._last = pair
        for vector, weight in self._basis:
            pair = _reduce(pair, vector, weight)
        step, state = pair.chunk(2, 1)
        return torch.add(state, step, alpha=self.damping).view(shape)

    def _remember(self, difference: Tensor) -> None:
        if self.linear:
            self._basis = self._basis[-self.window + 1 :] if self.window > 1 else []
            self._basis.append(_orthogonal(difference, self._basis, _NEW_LINEAR))
            return
        self._differences = [difference, *self._differences[: self.window - 1]]
        self._basis = []
        for old in self._differences:
            self._basis.append(_orthogonal(old, self._basis, _NEW))

    def select(self, index: Tensor) -> Mixing:
        """The same for these samples only."""
        new = Mixing(self.window, self.damping, linear=self.linear)
        new._last = None if self._last is None else self._last[index]
        new._differences = [t[index] for t in self._differences]
        new._basis = [(t[index], weight[index]) for t, weight in self._basis]
        return new


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """(batch, 1) inner products of the steps of two pairs."""
    entries = a.shape[1] // 2
    return (a[:, :entries] * b[:, :entries]).sum(1, keepdim=True)


def _reduce(pair: Tensor, vector: Tensor, weight: Tensor) -> Tensor:
    return torch.addcmul(pair, _dot(vector, pair) * weight, vector, value=-1)


def _orthogonal(pair: Tensor, basis: list[tuple[Tensor, Tensor]], new: float) -> tuple[Tensor, Tensor]:
    """What the basis does not explain of a pair, and one over its square; 0 where that is too little to count."""
    size = _dot(pair, pair)
    for vector, weight in basis:
        pair = _reduce(pair, vector, weight)
    left = _dot(pair, pair) if basis else size
    enough = (new**2 * size).clamp_min(torch.finfo(left.dtype).tiny)
    return pair, torch.where(left > enough, 1 / left, 0.0)
