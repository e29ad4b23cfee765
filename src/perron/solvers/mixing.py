"""Anderson mixing, per sample, with an orthonormal window.

Each call takes z and a step d = g(z) - z of some fixed point iteration g, and returns z + d less the part that earlier
differences explain: the least-squares combination of Anderson (1965), in the form of generalised conjugate residuals
(differences of d kept orthonormal), which needs no normal equations. Differences that the window explains already, up
to a thousandth, are left out, which regularises the least-squares problem.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from perron.solvers.aggregation import Aggregation

__all__ = ["Mixed", "Mixing"]


class Mixing:
    """Anderson mixing of (batch, ...) iterates.

    Args:
        window: differences that are kept; when it is full, the oldest ones go together, all but the last.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self._states: list[Tensor] = []
        self._steps: list[Tensor] = []
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, z: Tensor, d: Tensor) -> Tensor:
        shape = z.shape
        z, d = z.flatten(1), d.flatten(1)
        if self._last is not None:
            self._remember(z - self._last[0], d - self._last[1])
        self._last = (z, d)
        for state, step in zip(self._states, self._steps, strict=True):
            part = (step * d).sum(1, keepdim=True)
            z, d = torch.addcmul(z, part, state, value=-1), torch.addcmul(d, part, step, value=-1)
        return (z + d).view(shape)

    def select(self, index: Tensor) -> Mixing:
        """The same for these samples only."""
        new = Mixing(self.window)
        new._states = [t[index] for t in self._states]
        new._steps = [t[index] for t in self._steps]
        new._last = None if self._last is None else (self._last[0][index], self._last[1][index])
        return new

    def forget(self, mask: Tensor) -> None:
        """Drop the window of the samples where `mask`, (batch,), holds."""
        keep = ~mask.unsqueeze(1)
        self._states = [torch.where(keep, t, 0.0) for t in self._states]
        self._steps = [torch.where(keep, t, 0.0) for t in self._steps]

    def _remember(self, state: Tensor, step: Tensor) -> None:
        size = step.norm(dim=1, keepdim=True)
        for old_state, old_step in zip(self._states, self._steps, strict=True):
            part = (old_step * step).sum(1, keepdim=True)
            state = torch.addcmul(state, part, old_state, value=-1)
            step = torch.addcmul(step, part, old_step, value=-1)
        left = step.norm(dim=1, keepdim=True)
        # What the window explains already up to rounding would only add noise.
        scale = torch.where((left > 1e-3 * size) & (left > torch.finfo(left.dtype).tiny), 1 / left, 0.0)
        if len(self._states) >= self.window:
            self._states, self._steps = self._states[-1:], self._steps[-1:]
        self._states.append(state * scale)
        self._steps.append(step * scale)


class Mixed:
    """The method z -> f(z), corrected by the rank-one model where there is one, and mixed."""

    products, trust = 0, 1.0

    def __init__(self, model: Aggregation | None, mixing: Mixing) -> None:
        self.model, self.mixing = model, mixing

    def advance(self, z: Tensor, fz: Tensor) -> Tensor:
        residual = fz - z
        return self.mixing(z, residual if self.model is None else self.model.correct(fz, residual))

    def select(self, index: Tensor) -> Mixed:
        return Mixed(self.model, self.mixing.select(index))

    def forget(self, mask: Tensor) -> None:
        self.mixing.forget(mask)
