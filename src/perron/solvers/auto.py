"""The default: aggregation with Anderson mixing where the cell allows it, and what serves best elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from perron.cells.chain import Chain
from perron.problem import FixedPointProblem
from perron.solution import Solution
from perron.solvers.accelerated import Accelerated
from perron.solvers.aggregation import Aggregation, Mixed
from perron.solvers.base import IterativeSolver
from perron.solvers.iteration import Method
from perron.solvers.mixing import Mixing
from perron.solvers.newton import Newton
from perron.solvers.residual import solve_by_residual
from perron.solvers.splitting import Splitting
from perron.theory.base import Origin

__all__ = ["Auto"]

# Aggregated steps before Newton's method takes over.
_STEPS = 14
# Multiplications of a product below which the model is judged first; and the mismatch beyond which it is not used.
_SMALL, _POOR = 10_000_000, 0.4
# Differences that are mixed where there is no model.
_WINDOW = 10


@dataclass(frozen=True, kw_only=True)
class Auto(Accelerated):
    """Chooses the method from the structure of the cell and the residual ratio it sees.

    Certified cells with one activation, at their end, take aggregation steps mixed after Anderson, which reach the fixed
    point in a few evaluations however hard the map is for Picard; where the cell is far from rank one, or affine,
    `Newton`.
    Cells that contract by operator splitting take its steps, and all others `Anderson` steps.

    Args:
        tol, max_steps, stop, proof_dtype, on_failure, steps, step_dtype: as in every solver.
        window: of the mixing of aggregated steps.
    """

    window: int = 3

    def patience(self, evaluations: int, model: Aggregation | None) -> int:
        return evaluations if model is None else min(evaluations, _STEPS)

    def successor(self, evaluations: int, problem: FixedPointProblem) -> IterativeSolver:
        # Without a model each of Newton's steps takes products.
        modelled = isinstance(problem.map, Chain) and Aggregation.possible(problem.map)
        return self._newton(evaluations) if modelled else super().successor(evaluations, problem)

    def _newton(self, evaluations: int) -> Newton:
        return Newton(
            tol=self.tol,
            max_steps=evaluations,
            stop=self.stop,
            proof_dtype=self.proof_dtype,
            on_failure="ignore",
            step_dtype=self.step_dtype,
        )

    def method(
        self, problem: FixedPointProblem, origin: Origin | None, model: Aggregation | None
    ) -> tuple[Method | None, Tensor]:
        if origin is None:
            converges = problem.theory is None or problem.theory.picard_converges
            return _mixed(problem) if converges else None, torch.zeros_like(problem.injection)
        if model is None:
            method = _mixed(problem)
            return method, method.advance(origin.p, origin.at_p, 0)
        return Mixed(model, Mixing(self.window)), model.start(origin.base)

    def _solve(self, problem: FixedPointProblem, z0: Tensor | None) -> Solution:
        chain = problem.map
        if self.encloses(problem) and problem.theory.rises:  # type: ignore[union-attr]
            assert isinstance(chain, Chain)
            if self.steps is None and _newton_pays(problem):
                return self._newton(self.max_steps).solve(problem, z0)
            if self.steps is not None and not Aggregation.possible(chain):
                # In steps counted beforehand there is one proof only, and each of Picard's iterates is one.
                return self._picard(self.max_steps, self.steps).solve(problem, z0)
        return super()._solve(problem, z0)

    def _observe(self, problem: FixedPointProblem, z0: Tensor | None) -> Solution:
        if not problem.injection.numel():
            return super()._observe(problem, z0)
        splits = problem.theory is not None and problem.theory.splits
        return solve_by_residual(self, problem, Splitting(problem) if splits else _mixed(problem), z0)


def _mixed(problem: FixedPointProblem) -> Mixed:
    """Mixing without a model."""
    linear = isinstance(problem.map, Chain) and problem.map.is_affine
    return Mixed(None, Mixing(_WINDOW, linear=linear))


def _newton_pays(problem: FixedPointProblem) -> bool:
    """Whether the cell is affine, or far from rank one as far as that is cheap to know."""
    chain, injection = problem.map, problem.injection
    assert isinstance(chain, Chain)
    if chain.is_affine and Aggregation.possible(chain):
        return True
    work = injection.numel() * sum(step.terms for step in chain.affine)
    if not 0 < work < _SMALL:
        return False
    model = Aggregation.of(chain, injection)
    return model is not None and model.mismatch(chain, injection) > _POOR
