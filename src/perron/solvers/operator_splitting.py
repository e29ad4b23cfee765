"""Operator splitting, chosen by hand: what `Auto` does on monotone cells, and forward-backward steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from perron.problem import FixedPointProblem
from perron.solution import Solution
from perron.solvers.aggregation import Aggregation
from perron.solvers.base import IterativeSolver
from perron.solvers.iteration import Method
from perron.solvers.proving import Proving
from perron.solvers.residual import solve_by_residual
from perron.solvers.splitting import forward_backward_for, splitting_for
from perron.theory.base import Origin, Sign
from perron.theory.certify import pose

__all__ = ["OperatorSplitting"]

Scheme = Literal["peaceman_rachford", "forward_backward"]


@dataclass(frozen=True, kw_only=True)
class OperatorSplitting(IterativeSolver):
    """Operator splitting for cells sigma(W z + b) with I - W strongly monotone, mixed after Anderson.

    Source: Winston, Kolter, "Monotone operator equilibrium networks", NeurIPS 2020 (arXiv 2006.08591), section 3.

    Args:
        tol, max_steps, stop, proof_dtype, on_failure, steps: as in every solver.
        scheme: "peaceman_rachford" (one factorisation, few steps; every activation) or "forward_backward" (no
            factorisation, many steps; relu, relu6, identity and `Clamp` only). Half of `max_steps` are forward-backward ones, if
            need be; what they have not solved by then gets the others.
        size: of a forward-backward step; None for m/|I - W|^2.

    Raises:
        ValueError: an option is out of range; or, in a solve, the cell is of another kind.

    >>> from perron.nn import MonotoneLinear
    >>> layer = MonotoneLinear(4, 8, margin=1.0, solver=OperatorSplitting(scheme="forward_backward"))
    >>> import torch
    >>> layer.solve(torch.randn(16, 4)).certified
    True
    """

    scheme: Scheme = "peaceman_rachford"
    size: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scheme not in ("peaceman_rachford", "forward_backward"):
            raise ValueError(f"scheme must be 'peaceman_rachford' or 'forward_backward', got {self.scheme!r}")
        if self.size is not None and not 0 < self.size < math.inf:
            raise ValueError(f"size must be positive and finite, got {self.size}")

    def method(
        self, problem: FixedPointProblem, origin: Origin | None, model: Aggregation | None
    ) -> tuple[Method, Tensor]:
        found: Method | None = splitting_for(problem)
        if found is None:
            raise ValueError(
                "OperatorSplitting needs a cell sigma(W z + b) with I - W strongly monotone, such as that of MonotoneLinear"
            )
        if self.scheme == "forward_backward":
            found = forward_backward_for(problem, self.size)
            if found is None:
                raise ValueError(
                    "forward-backward steps need relu, relu6, identity or Clamp; use scheme='peaceman_rachford'"
                )
        return found, torch.zeros_like(problem.injection)

    def _solve(self, problem: FixedPointProblem, z0: Tensor | None) -> Solution:
        if not problem.injection.numel():
            return solve_by_residual(self, problem, None, z0)
        method, _ = self.method(problem, None, None)
        # A positive concave cell may be monotone, too.
        problem = replace(problem, theory=pose(problem.map, (Sign.ANY,))[0])  # type: ignore[arg-type]
        if self.encloses(problem):
            return Proving(self, problem, z0).run()
        return solve_by_residual(self, problem, method, z0)
