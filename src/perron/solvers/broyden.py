"""Broyden's method with limited memory, per sample, for maps without structure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perron.problem import FixedPointProblem
from perron.solvers.accelerated import Accelerated
from perron.solvers.aggregation import Aggregation
from perron.solvers.iteration import Method
from perron.theory.base import Origin

__all__ = ["Broyden"]


@dataclass(frozen=True, kw_only=True)
class Broyden(Accelerated):
    """Broyden's first ("good") method (Broyden 1965), safeguarded against residuals that grow tenfold.

    Args:
        tol, max_steps, stop, proof_dtype, on_failure, steps, step_dtype: as in every solver.
        memory: rank-one updates that are kept; when it is full, the method starts anew.

    Raises:
        ValueError: an option is out of range.
    """

    memory: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory < 1:
            raise ValueError(f"memory must be at least 1, got {self.memory}")

    def method(
        self, problem: FixedPointProblem, origin: Origin | None, model: Aggregation | None
    ) -> tuple[Method, Tensor]:
        rule = _InverseJacobian(self.memory)
        if origin is None:
            return rule, torch.zeros_like(problem.injection)
        return rule, rule.advance(origin.p, origin.at_p.to(origin.p.dtype), 0)


class _InverseJacobian:
    """H = I + sum_k u_k v_k^T, near (I - J)^{-1}; the step is H (f(z) - z)."""

    # Broyden's residuals rise before they fall: 2 n steps solve a linear system of n equations, not fewer.
    products, trust = 0, 10.0

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self._left: list[Tensor] = []
        self._right: list[Tensor] = []
        self._last: tuple[Tensor, Tensor] | None = None

    def advance(self, z: Tensor, fz: Tensor, room: int) -> Tensor:
        shape = z.shape
        z, d = z.flatten(1), (fz - z).flatten(1)
        if self._last is not None:
            self._update(z - self._last[0], self._last[1] - d)
        self._last = (z, d)
        return (z + self._apply(d, self._left, self._right)).view(shape)

    @staticmethod
    def _apply(x: Tensor, left: list[Tensor], right: list[Tensor]) -> Tensor:
        y = x
        for u, v in zip(left, right, strict=True):
            y = torch.addcmul(y, u, (v * x).sum(1, keepdim=True))
        return y

    def _update(self, moved: Tensor, fallen: Tensor) -> None:
        """Make H fallen = moved, and H equal to the old one on what is orthogonal to H^T moved."""
        if len(self._left) >= self.memory:
            self._left, self._right = [], []
        image = self._apply(fallen, self._left, self._right)
        dual = self._apply(moved, self._right, self._left)
        scale = (moved * image).sum(1, keepdim=True)
        usable = scale.abs() > 1e-8 * moved.norm(dim=1, keepdim=True) * image.norm(dim=1, keepdim=True)
        self._left.append((moved - image) * torch.where(usable, 1 / scale, 0.0))
        self._right.append(dual)

    def select(self, index: Tensor) -> _InverseJacobian:
        new = _InverseJacobian(self.memory)
        new._left = [t[index] for t in self._left]
        new._right = [t[index] for t in self._right]
        new._last = None if self._last is None else (self._last[0][index], self._last[1][index])
        return new
