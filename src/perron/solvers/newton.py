"""Newton's method on z - f(z), which is convex with a nonnegative inverse Jacobian for positive concave cells.

So from its first step on, exact Newton steps lie above the fixed point and decrease to it (Ortega & Rheinboldt 1970,
theorem 13.3.4, the monotone Newton theorem).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from perron.cells.chain import Chain
from perron.problem import FixedPointProblem
from perron.solvers.accelerated import Accelerated
from perron.solvers.aggregation import Aggregation, Mixed
from perron.solvers.iteration import Method
from perron.solvers.mixing import TRUST, Mixing
from perron.theory.base import Origin

__all__ = ["Newton"]

LinearSolve = Literal["auto", "batched", "chord", "krylov"]

# Entries of a state up to which every sample has its own factorisation, and up to which the batch shares one.
_BATCHED, _CHORD = 32, 1024
# Krylov steps within a Newton step: at most so many, or until the linear residual has fallen by this factor.
_INNER, _FORCING = 6, 0.05
# Differences that are kept for maps which are affine.
_LINEAR_WINDOW = 50


@dataclass(frozen=True, kw_only=True)
class Newton(Accelerated):
    """Newton's method; (I - J) s = f(z) - z is solved by factorisation or by Krylov steps.

    Args:
        tol, max_steps, stop, proof_dtype, on_failure, steps, step_dtype: as in every solver. Krylov's products with J count
            as evaluations, and it asks the device after each.
        linear: "batched" factorises I - D A for every sample, "chord" once for the batch with the mean of D, mixed after
            Anderson, "krylov" takes generalised conjugate residuals; "auto" chooses by the size of the state: up to 32,
            up to 1,024, and beyond or in half precision. Cells whose Jacobian is not D A take Krylov steps.

    Raises:
        ValueError: an option is out of range.

    >>> from perron.nn import PositiveConcaveLinear
    >>> layer = PositiveConcaveLinear(4, 8, solver=Newton())
    >>> solution = layer.solve(torch.randn(16, 4))
    >>> solution.certified, bool(solution.steps.max() <= 6)
    (True, True)
    """

    linear: LinearSolve = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.linear not in ("auto", "batched", "chord", "krylov"):
            raise ValueError(f"linear must be 'auto', 'batched', 'chord' or 'krylov', got {self.linear!r}")

    def method(
        self, problem: FixedPointProblem, origin: Origin | None, model: Aggregation | None
    ) -> tuple[Method, Tensor]:
        start = self._start(problem, origin, model)
        size = math.prod(problem.injection.shape[1:])
        linear = self.linear
        if linear == "auto":
            factorises = start.dtype in (torch.float32, torch.float64) and size <= _CHORD
            linear = "krylov" if not factorises else "batched" if size <= _BATCHED else "chord"
        if linear == "krylov" and isinstance(problem.map, Chain) and problem.map.is_affine:
            # Of an affine map these are Newton's equations themselves.
            return Mixed(model, Mixing(_LINEAR_WINDOW, linear=True)), start
        if model is None or linear == "krylov":
            return _Krylov(problem, model), start
        assert isinstance(problem.map, Chain)
        matrix = problem.map.matrix(start)
        return (_Batched(matrix, model) if linear == "batched" else _Chord(matrix, model)), start

    def _start(self, problem: FixedPointProblem, origin: Origin | None, model: Aggregation | None) -> Tensor:
        """Near the fixed point, or above it, where the Jacobian is small enough for the first step to be safe."""
        if origin is None:
            return torch.zeros_like(problem.injection)
        assert isinstance(problem.map, Chain)
        if model is not None:
            return model.start(origin.base)
        top = problem.map.supremum
        return origin.at_p.to(origin.p.dtype) if math.isinf(top) else torch.full_like(origin.p, top)


def _factorable(t: Tensor) -> Tensor:
    """In a precision that LAPACK has."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


class _Batched:
    """(I - D A)^{-1} for every sample."""

    products, trust = 0, TRUST

    def __init__(self, matrix: Tensor, model: Aggregation) -> None:
        self.matrix, self.model = matrix, model

    def advance(self, z: Tensor, fz: Tensor, room: int) -> Tensor:
        slope = self.model.slope(fz).flatten(1)
        system = torch.eye(len(self.matrix), dtype=z.dtype, device=z.device) - slope.unsqueeze(2) * self.matrix
        step, _ = torch.linalg.solve_ex(_factorable(system), _factorable((fz - z).flatten(1)))
        return z + step.view_as(z).to(z.dtype)

    def select(self, index: Tensor) -> _Batched:
        return self


class _Chord:
    """One factorisation for the batch, at the mean of D in the first step; mixing makes up for the difference."""

    products, trust = 0, TRUST

    def __init__(self, matrix: Tensor, model: Aggregation) -> None:
        self.matrix, self.model, self.mixing = matrix, model, Mixing(3)
        self.factors: tuple[Tensor, Tensor] | None = None

    def advance(self, z: Tensor, fz: Tensor, room: int) -> Tensor:
        if self.factors is None:
            slope = torch.nan_to_num(self.model.slope(fz).flatten(1)).mean(0).unsqueeze(1)
            system = torch.eye(len(self.matrix), dtype=z.dtype, device=z.device) - slope * self.matrix
            factors, pivots, _ = torch.linalg.lu_factor_ex(_factorable(system))
            self.factors = (factors, pivots)
        step = torch.linalg.lu_solve(*self.factors, _factorable((fz - z).flatten(1)).t()).t()
        return self.mixing(z, step.reshape(z.shape).to(z.dtype))

    def select(self, index: Tensor) -> _Chord:
        new = _Chord(self.matrix, self.model)
        new.factors, new.mixing = self.factors, self.mixing.select(index)
        return new


class _Krylov:
    """Generalised conjugate residuals (mixing of a linear iteration is just that), preconditioned by the rank-one model."""

    trust = TRUST

    def __init__(self, problem: FixedPointProblem, model: Aggregation | None) -> None:
        self.problem, self.model = problem, model
        self.products = 0

    def advance(self, z: Tensor, fz: Tensor, room: int) -> Tensor:
        right, self.products = fz - z, 0
        # Without a model the Jacobian takes one evaluation more.
        limit = min(_INNER, room) if self.model is not None else min(_INNER + 1, room)
        jacobian = self._jacobian(z, fz) if limit else None
        goal = _FORCING * right.flatten(1).norm(dim=1)
        mixing, step, residual = Mixing(_INNER, linear=True), torch.zeros_like(z), right
        while True:
            step = mixing(step, residual if self.model is None else self.model.correct(fz, residual))
            if jacobian is None or self.products == limit:
                return z + step
            residual = right + jacobian(step) - step
            self.products += 1
            if not bool((residual.flatten(1).norm(dim=1) > goal).any()):
                return z + step

    def _jacobian(self, z: Tensor, fz: Tensor) -> Callable[[Tensor], Tensor]:
        if self.model is None:
            self.products += 1
            return self.problem.map.linearize(z, self.problem.injection).matvec
        assert isinstance(self.problem.map, Chain)
        chain, slope = self.problem.map, self.model.slope(fz)
        return lambda w: slope * chain.linear(w)

    def select(self, index: Tensor) -> _Krylov:
        return _Krylov(self.problem.select(index), self.model)
