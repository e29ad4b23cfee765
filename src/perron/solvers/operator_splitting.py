"""Operator splitting, chosen by hand: what `Auto` does on monotone cells, and forward-backward steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from perron.problem import FixedPointProblem
from perron.solution import Solution
from perron.solvers.base import IterativeSolver
from perron.solvers.contracting import solve_by_contraction
from perron.solvers.iteration import Method, solve_by_residual
from perron.solvers.splitting import forward_backward_for, splitting_for

__all__ = ["OperatorSplitting"]

Scheme = Literal["peaceman_rachford", "forward_backward"]


@dataclass(frozen=True, kw_only=True)
class OperatorSplitting(IterativeSolver):
    """Operator splitting for cells sigma(W z + b) with I - W strongly monotone, mixed after Anderson.

    Source: Winston, Kolter, "Monotone operator equilibrium networks", NeurIPS 2020 (arXiv 2006.08591), section 3.

    Args:
        tol, max_steps, stop, proof_dtype, on_failure, steps: as in every solver.
        scheme: "peaceman_rachford" (one factorisation, few steps; every activation) or "forward_backward" (no
            factorisation, many steps; relu, relu6 and identity only). Half of `max_steps` are forward-backward ones, if
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

    def _solve(self, problem: FixedPointProblem, z0: Tensor | None) -> Solution:
        # A positive concave cell may be monotone, too.
        problem = replace(problem, proven=False, contracts=True)
        if not problem.injection.numel():
            return solve_by_residual(self, problem, None, z0)
        method: Method | None = splitting_for(problem)
        if method is None:
            raise ValueError(
                "OperatorSplitting needs a cell sigma(W z + b) with I - W strongly monotone, such as that of MonotoneLinear"
            )
        if self.scheme == "forward_backward":
            method = forward_backward_for(problem, self.size)
            if method is None:
                raise ValueError("forward-backward steps need relu, relu6 or identity; use scheme='peaceman_rachford'")
        return (solve_by_contraction if self.contracts(problem) else solve_by_residual)(self, problem, method, z0)
