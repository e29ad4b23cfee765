"""What Anderson, Newton, Broyden and aggregation share: fast steps in the layer's precision, then a proof.

Samples that rounding keeps from a proof take their steps in the precision of the proof; where Picard's every step is a
proof, it gets what is left then.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from perron.problem import FixedPointProblem
from perron.solution import Solution
from perron.solvers.aggregation import Aggregation
from perron.solvers.base import IterativeSolver
from perron.solvers.iteration import Method
from perron.solvers.picard import Picard
from perron.solvers.proving import Proving
from perron.solvers.residual import solve_by_residual
from perron.theory.base import Origin

__all__ = ["Accelerated"]

# Evaluations with which this is worth beginning; and that the smallest enclosure takes.
_LEAST, _SMALLEST = 6, 3


@dataclass(frozen=True, kw_only=True)
class Accelerated(IterativeSolver):
    """A solver that takes the steps of `method` and proves what they found.

    Args:
        step_dtype: dtype of the steps before the proof, for instance torch.bfloat16; None for that of the layer.
    """

    step_dtype: torch.dtype | None = None

    @abstractmethod
    def method(
        self, problem: FixedPointProblem, origin: Origin | None, model: Aggregation | None
    ) -> tuple[Method | None, Tensor]: ...

    def dtype_of_steps(self, problem: FixedPointProblem) -> torch.dtype:
        rises = problem.theory is not None and problem.theory.rises
        return self.step_dtype if rises and self.step_dtype is not None else problem.injection.dtype

    def successor(self, evaluations: int, problem: FixedPointProblem) -> IterativeSolver:
        """Who solves the samples that are left, in so many evaluations."""
        return self._picard(evaluations)

    def _picard(self, evaluations: int, steps: int | None = None) -> Picard:
        return Picard(
            tol=self.tol,
            max_steps=evaluations,
            stop=self.stop,
            proof_dtype=self.proof_dtype,
            on_failure="ignore",
            steps=steps,
        )

    def _solve(self, problem: FixedPointProblem, z0: Tensor | None) -> Solution:
        if not self.encloses(problem):
            return self._observe(problem, z0)
        assert problem.theory is not None
        small = (self.steps is None and self.limit < _LEAST) or not problem.injection.numel()
        if problem.theory.rises and small:
            return self._picard(self.max_steps).solve(problem, z0)
        proving = Proving(self, problem, z0)
        found = proving.run()
        if self.steps is not None or not problem.theory.rises:
            return found
        left = (~found.converged).nonzero().flatten()
        budget = self.limit - int(found.steps[left].max()) if left.numel() else 0
        if budget < _SMALLEST:
            return found
        # What the steps have found may be good enough already for another proof.
        guess = proving.candidate[left].to(problem.injection)
        return found.merged(self.successor(budget, problem).solve(problem.select(left), guess), left)

    def _observe(self, problem: FixedPointProblem, z0: Tensor | None) -> Solution:
        """Without enclosure: stop by residual."""
        if not problem.injection.numel():
            return solve_by_residual(self, problem, None, z0)
        method, start = self.method(problem, None, None)
        return solve_by_residual(self, problem, method, start if z0 is None else z0)
