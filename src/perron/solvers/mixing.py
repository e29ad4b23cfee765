"""Anderson mixing, per sample, with an orthonormal window.

Each call takes z and a step d = g(z) - z of some fixed point iteration g, and returns z + d less the part that earlier
differences explain: the least-squares combination of Anderson (1965), in the form of generalised conjugate residuals
(differences of d kept orthonormal), which needs no normal equations and so no ridge.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Mixing"]


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

    def _remember(self, state: Tensor, step: Tensor) -> None:
        size = step.norm(dim=1, keepdim=True)
        for old_state, old_step in zip(self._states, self._steps, strict=True):
            part = (old_step * step).sum(1, keepdim=True)
            state = torch.addcmul(state, part, old_state, value=-1)
            step = torch.addcmul(step, part, old_step, value=-1)
        left = step.norm(dim=1, keepdim=True)
        # What the window explains already up to rounding would only add noise.
        scale = torch.where(left > 1e-3 * size, 1 / left, 0.0)
        if len(self._states) >= self.window:
            self._states, self._steps = self._states[-1:], self._steps[-1:]
        self._states.append(state * scale)
        self._steps.append(step * scale)
