"""Solving without an enclosure: until the residual is small."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from perron.problem import FixedPointProblem
from perron.solution import Solution
from perron.solvers.base import IterativeSolver
from perron.solvers.iteration import Found, Method, PicardSteps, Rule, iterate

__all__ = ["solve_by_residual"]


def solve_by_residual(
    solver: IterativeSolver, problem: FixedPointProblem, method: Method | None, z0: Tensor | None
) -> Solution:
    """Iterate from z0, or zero, until |f(z) - z| <= tol |f(z)| in the largest entry; without a method, Picard's steps."""
    b = problem.injection
    z = torch.zeros_like(b) if z0 is None else z0
    batch = len(b)
    fixed = solver.steps is not None
    if b.numel():
        rule = Rule(tol=solver.tol, slack=None, ahead=False, limit=solver.limit, fixed=fixed)
        found = iterate(problem, PicardSteps() if method is None else method, z, rule)
    else:
        none = b.new_zeros(batch)
        found = Found(
            z=z,
            value=problem(z),
            candidate=z,
            measure=none,
            rate=none,
            steps=torch.zeros(batch, dtype=torch.long, device=b.device),
        )
    unproven = torch.zeros(batch, dtype=torch.bool, device=b.device)
    return Solution(
        value=found.value,
        lower=None,
        upper=None,
        steps=found.steps,
        residual=found.measure,
        error_bound=torch.full_like(found.measure, math.inf),
        rate=found.rate,
        converged=found.measure <= solver.tol,
        proven=unproven,
        proof_dtype=None,
        stopping="residual",
    )
