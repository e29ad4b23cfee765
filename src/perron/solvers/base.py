"""What every solver is given and what it returns."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from perron.cells import Chain, Opaque

__all__ = [
    "AdjointSolution",
    "ConvergenceError",
    "ConvergenceWarning",
    "FixedPointProblem",
    "OnFailure",
    "Solution",
    "Solver",
]

OnFailure = Literal["warn", "raise", "ignore"]


class ConvergenceWarning(UserWarning):
    """Some samples did not reach the tolerance."""


class ConvergenceError(RuntimeError):
    """Some samples did not reach the tolerance, and the solver was told to raise."""


@dataclass(frozen=True)
class AdjointSolution:
    """How the adjoint equation g = J^T g + v was solved in the last backward pass, per sample.

    Attributes:
        steps: (batch,) products with J^T.
        residual: (batch,) weighted norm of the residual, relative to that of g.
        error_bound: (batch,) bound on the weighted norm of the error of g against the adjoint at the exact fixed point,
            relative to that of g; inf where nothing is proven.
        converged: (batch,) whether the tolerance was reached.
        certified: whether every error bound is proven, rounding included.
    """

    steps: Tensor
    residual: Tensor
    error_bound: Tensor
    converged: Tensor
    certified: bool


@dataclass(frozen=True)
class Solution:
    """A fixed point, what is proven of it, and what it cost. Everything but `certified` and `precision` is per sample.

    Attributes:
        value: (batch, ...) the returned point.
        lower, upper: (batch, ...) entrywise bounds of the fixed point; None for cells without verified structure.
        steps: (batch,) evaluations of f, those of the verification included.
        residual: (batch,) max_i |f(y) - y|_i / f(y)_i at the last point y where f was evaluated.
        error_bound: (batch,) bound on max_i |value - z*|_i / z*_i; inf where there is none.
        rate: (batch,) the last residual ratio, an estimate (no proof) of the spectral radius of the Jacobian.
        converged: (batch,) whether the tolerance was reached.
        certified: every sample has an enclosure proven with rounding accounted for.
        precision: dtype of the arithmetic that proved it, or None.
        stopping: "enclosure" (certified error) or "residual".
        adjoint: filled in by the backward pass.
    """

    value: Tensor
    lower: Tensor | None
    upper: Tensor | None
    steps: Tensor
    residual: Tensor
    error_bound: Tensor
    rate: Tensor
    converged: Tensor
    certified: bool
    precision: torch.dtype | None
    stopping: Literal["enclosure", "residual"]
    adjoint: AdjointSolution | None = None

    def detach(self) -> Solution:
        return replace(self, value=self.value.detach())


@dataclass(frozen=True)
class FixedPointProblem:
    """z = f(z; b) for a batch of injections b, starting at zero.

    Attributes:
        map: the cell.
        injection: (batch, ...) b; the state has the same shape.
        proven: a certificate of existence and uniqueness holds for this map and every injection here that is finite.
    """

    map: Chain | Opaque
    injection: Tensor
    proven: bool = False

    def __call__(self, z: Tensor) -> Tensor:
        return self.map(z, self.injection)

    def select(self, index: Tensor) -> FixedPointProblem:
        return replace(self, injection=self.injection[index])

    def to(self, dtype: torch.dtype) -> FixedPointProblem:
        if self.injection.dtype == dtype:
            return self
        assert isinstance(self.map, Chain)
        return replace(self, map=self.map.to(dtype), injection=self.injection.to(dtype))


class Solver(Protocol):
    """Anything that solves a problem. `tol` is the tolerance on the relative error, also of the adjoint."""

    @property
    def tol(self) -> float: ...

    @property
    def max_steps(self) -> int: ...

    @property
    def on_failure(self) -> OnFailure: ...

    def solve(self, problem: FixedPointProblem) -> Solution: ...


def report_failure(
    what: str, converged: Tensor, measure: Tensor, tol: float, max_steps: int, on_failure: OnFailure
) -> None:
    """Warn or raise, once, with the numbers, if some samples have not converged.

    Raises:
        ConvergenceError: `on_failure` is "raise".
    """
    if on_failure == "ignore" or bool(converged.all()):
        return
    failed = (~converged).nonzero().flatten()
    worst = measure[failed]
    worst_value = float("nan") if bool(worst.isnan().any()) else float(worst.max())
    message = (
        f"{what}: {len(failed)} of {len(converged)} samples did not reach tol={tol:g} in at most {max_steps} steps "
        f"(first: sample {int(failed[0])}, worst error measure {worst_value:.3g}); "
        "raise max_steps, loosen tol, or look at these inputs"
    )
    if on_failure == "raise":
        raise ConvergenceError(message)
    warnings.warn(message, ConvergenceWarning, stacklevel=3)
