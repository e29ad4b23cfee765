"""What all solvers share: their options, and that failure is never silent."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from perron._numerics.batch import amax
from perron._numerics.rounding import flushes_subnormals
from perron.cells.chain import Chain
from perron.cells.opaque import OneSystem, Opaque
from perron.problem import FixedPointProblem
from perron.solution import Solution
from perron.solvers.aggregation import Aggregation
from perron.solvers.iteration import Method
from perron.theory.base import Origin

__all__ = ["ConvergenceError", "ConvergenceWarning", "IterativeSolver", "OnFailure", "Solver", "report_failure"]


OnFailure = Literal["warn", "raise", "ignore"]

# Further solves of a system whose returned value misses the tolerance, each stricter by this factor.
_ROUNDS, _STRICTER = 3, 0.25
_ADVICE = "raise max_steps, loosen tol, or look at these inputs"
# Evaluations within which f must come back from near a start that it leaves where it is.
_RETURN = 20


class ConvergenceWarning(UserWarning):
    """Some samples did not reach the tolerance."""


class ConvergenceError(RuntimeError):
    """Some samples did not reach the tolerance, and the solver was told to raise."""


class Solver(Protocol):
    """Anything that solves a problem. `tol` is the tolerance on the relative error, also of the adjoint.

    Layers pose cells that nobody has read, unless declared independent, as `OneSystem`: one sample, (1, batch, ...).

    A solver with a method `solve_adjoint(map, z, injection, v, bounds, theory)` solves the adjoint itself; for the others
    `perron.solvers.adjoint.solve_adjoint` does.
    """

    @property
    def tol(self) -> float: ...

    @property
    def max_steps(self) -> int: ...

    @property
    def on_failure(self) -> OnFailure: ...

    def solve(self, problem: FixedPointProblem, z0: Tensor | None = None) -> Solution:
        """Solve for the whole batch; the samples of the problem do not influence each other.

        Args:
            problem: f and the injections.
            z0: a first guess, shaped like the injection; it may change the cost but not what is proven.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class IterativeSolver(ABC):
    """What all solvers of this package share: their options, and that failure is never silent.

    Args:
        tol: tolerance on the entrywise relative error; certified where the cell is, else on the relative residual.
        max_steps: at most this many evaluations of f and products with its Jacobian per sample, proofs included; an
            enclosure takes at least three. Where samples may influence each other, the last one measures the residual of
            what is returned.
        stop: "auto" stops by certified error where the cell has a certificate and by residual elsewhere;
            "residual" always by residual, without extrapolation.
        proof_dtype: precision of the proof, float64 (default) or float32 (only where its sums can be bounded, else float64);
            None solves in the precision of the layer, and nothing is certified.
        on_failure: "warn" (ConvergenceWarning), "raise" (ConvergenceError) or "ignore".
        steps: None, or exactly so many evaluations of f, at least 5 (6 where samples may influence each other), proof
            included: nothing in the solve then waits for the device (with on_failure="ignore"), and `error_bound` says what
            was reached.

    Raises:
        ValueError: an option is out of range.
    """

    tol: float = 1e-4
    max_steps: int = 200
    stop: str = "auto"
    proof_dtype: torch.dtype | None = torch.float64
    on_failure: OnFailure = "warn"
    steps: int | None = None

    def __post_init__(self) -> None:
        if not (0 < self.tol < 1):
            raise ValueError(f"tol must be in (0, 1), got {self.tol}")
        if self.max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {self.max_steps}")
        if self.stop not in ("auto", "residual"):
            raise ValueError(f"stop must be 'auto' or 'residual', got {self.stop!r}")
        if self.proof_dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"proof_dtype must be torch.float64, torch.float32 or None, got {self.proof_dtype}")
        if self.on_failure not in ("warn", "raise", "ignore"):
            raise ValueError(f"on_failure must be 'warn', 'raise' or 'ignore', got {self.on_failure!r}")
        if self.steps is not None and self.steps < 5:
            raise ValueError(f"steps must be at least 5 (the proof takes some of them), got {self.steps}")

    @torch.no_grad()
    def solve(self, problem: FixedPointProblem, z0: Tensor | None = None) -> Solution:
        """Solve for the whole batch. Unless the cell is known to act per sample, the batch is one system: nobody leaves it,
        and the residual is that of all of it.

        Args:
            problem: f and the injections.
            z0: a first guess, shaped like the injection; it may change the cost but not what is proven.

        Raises:
            ValueError: z0 or f(z) has another shape than the injection.
            ConvergenceError: some sample did not reach the tolerance and `on_failure` is "raise".
        """
        if z0 is not None:
            if z0.shape != problem.injection.shape:
                raise ValueError(f"z0 has shape {tuple(z0.shape)}, the injection {tuple(problem.injection.shape)}")
            z0 = z0.detach().to(problem.injection)
        if isinstance(problem.map, Opaque) and not problem.map.independent:
            system = self.solve(problem.as_one_system(), None if z0 is None else z0.unsqueeze(0))
            return system.of_samples(len(problem.injection))
        # Autocast would compute the products of a proof in a coarser precision than it accounts for.
        with torch.autocast(problem.injection.device.type, enabled=False):
            return self._solve_and_report(problem, z0)

    def _solve_and_report(self, problem: FixedPointProblem, z0: Tensor | None) -> Solution:
        system, hint = isinstance(problem.map, OneSystem), _ADVICE
        solution = self._solve_system(problem, z0) if system else self._solve(problem, z0)
        if not isinstance(problem.map, Chain) and self.steps is None:
            start = torch.zeros_like(problem.injection) if z0 is None else z0
            stuck, taken = _stuck(problem, start, solution)
            solution = replace(solution, converged=solution.converged & ~stuck, steps=solution.steps + taken)
            if self.on_failure != "ignore" and not bool(solution.converged.all()):
                hint = _explain(problem, start, solution, stuck)
        measure = solution.error_bound if solution.stopping == "enclosure" else solution.residual
        report_failure(
            type(self).__name__,
            solution.converged,
            measure,
            self.tol,
            self.limit,
            self.on_failure,
            unit="batches" if system else "samples",
            hint=hint,
        )
        return solution

    def _solve_system(self, problem: FixedPointProblem, z0: Tensor | None) -> Solution:
        """Solve, and measure what comes out; again, from there and stricter, where only the solver's own measure is met.

        Its last point is not the returned one, and a large sample hides a small one in it: the next solve has all samples
        scaled to the same size.
        """
        assert isinstance(problem.map, OneSystem)
        if self.steps is not None:
            return self._measured(problem, replace(self, steps=max(self.steps - 1, 5))._solve(problem, z0))
        found = replace(self, max_steps=max(self.max_steps - 1, 1))._solve(problem, z0)
        claimed, found = found.converged, self._measured(problem, found)
        for k in range(1, _ROUNDS + 1):
            left = (claimed & ~found.converged & found.residual.isfinite()).nonzero().flatten()
            budget = self.max_steps - 1 - int(found.steps.max()) if left.numel() else 0
            if budget < 1:
                break
            rest, value = problem.select(left), found.value[left]
            scale = _powers_of_two(value)
            scaled = replace(rest, map=OneSystem(problem.map.map, scale))
            solver = replace(self, max_steps=budget, tol=self.tol * _STRICTER**k)
            again = solver._solve(scaled, value / scale)
            again = self._measured(rest, replace(again, value=again.value * scale))
            claimed = claimed.index_copy(0, left, again.residual.isfinite())
            found = found.merged(again, left)
        return found

    def _measured(self, problem: FixedPointProblem, found: Solution) -> Solution:
        """The solution with the residual of its value: one more evaluation."""
        y = found.value
        image = problem(y)
        size = amax(image.abs().flatten(0, 1)).clamp_min(torch.finfo(image.dtype).tiny)
        residual = amax((amax((image - y).abs().flatten(0, 1)) / size).view(y.shape[:2]))
        return replace(found, steps=found.steps + 1, residual=residual, converged=residual <= self.tol)

    @abstractmethod
    def _solve(self, problem: FixedPointProblem, z0: Tensor | None) -> Solution: ...

    @property
    def limit(self) -> int:
        """Evaluations of f that a sample may take."""
        return self.max_steps if self.steps is None else self.steps

    def encloses(self, problem: FixedPointProblem) -> bool:
        """Whether this solve is to end with an enclosure; without a precision for proofs with one that is only observed."""
        if problem.theory is None or self.stop != "auto":
            return False
        return problem.theory.rises if self.proof_dtype is None else not flushes_subnormals()

    def dtype_of_proof(self, problem: FixedPointProblem) -> torch.dtype:
        """The precision of the enclosure: never coarser than the layer, and one whose sums can be bounded."""
        assert isinstance(problem.map, Chain)
        assert problem.theory is not None
        dtype = problem.injection.dtype
        if self.proof_dtype is None or dtype == torch.float64:
            return dtype
        if not problem.theory.rises:
            return torch.float64
        return self.proof_dtype if problem.map.to(self.proof_dtype).rigorous() is not None else torch.float64

    def exact_problem(self, problem: FixedPointProblem) -> FixedPointProblem:
        """The problem in the precision of the proof; of rigorous sums if something is to be proven."""
        exact = problem.to(self.dtype_of_proof(problem))
        if self.proof_dtype is None:
            return exact
        rigorous = exact.map.rigorous()  # type: ignore[union-attr]
        assert rigorous is not None, "the precision was chosen for its rigorous sums"
        return replace(exact, map=rigorous)

    def dtype_of_steps(self, problem: FixedPointProblem) -> torch.dtype:
        """The precision of the steps before the proof."""
        return problem.injection.dtype

    def method(
        self, problem: FixedPointProblem, origin: Origin | None, model: Aggregation | None
    ) -> tuple[Method | None, Tensor]:
        """A method for this problem, or None for the one that is sure to converge, and where it starts.

        Args:
            problem: f and the injections.
            origin: None where nothing is known of f.
            model: of f, if it has one.
        """
        return None, torch.zeros_like(problem.injection)

    def patience(self, evaluations: int, model: Aggregation | None) -> int:
        """Evaluations that a method may take before the proof, of so many that are left."""
        return evaluations


def _powers_of_two(value: Tensor) -> Tensor:
    """(systems, batch, 1, ...) sizes of samples, so that dividing by them is exact."""
    size = amax(value.abs().flatten(0, 1)).view(*value.shape[:2], *[1] * (value.dim() - 2))
    exponent = torch.where((size > 0) & size.isfinite(), size, 1.0).log2().floor()
    return exponent.clamp(-100, 100).exp2()


def _stuck(problem: FixedPointProblem, start: Tensor, solution: Solution) -> tuple[Tensor, int]:
    """(batch,) whether some sample only stayed at its start, where f leads away, and the evaluations it took to see that.

    From a little above the start f must come back, or at least nearer with every evaluation.
    """
    none, lead = torch.zeros_like(solution.converged), 2 if isinstance(problem.map, OneSystem) else 1
    if not start.numel():
        return none, 0
    dims = tuple(range(lead, start.dim()))
    still = (solution.value == start).flatten(lead).all(lead).view(*start.shape[:lead], *[1] * len(dims))
    if not bool(still.any()):
        return none, 0
    z = solution.value + torch.finfo(start.dtype).eps ** 0.5 * start.abs().clamp_min(1) * still
    near = away = (z - start).abs().amax(dims, keepdim=True)
    for k in range(1, _RETURN + 1):
        z = torch.where(still, problem(z), solution.value)
        before, away = away, (z - start).abs().amax(dims, keepdim=True)
        if bool((~still | (away < 0.5 * near)).all()):
            return none, k
    # NaN compares false: such a start is held to be one.
    back = (away < 0.5 * near) | (away < 0.99 * before)
    return (still & ~back).flatten(1).any(1), _RETURN


def _explain(problem: FixedPointProblem, start: Tensor, solution: Solution, stuck: Tensor) -> str:
    """What can be said of why an unread cell was not solved."""
    found = []
    if not bool(problem.injection.isfinite().all()):
        found.append("some injections are not finite")
    elif bool(stuck.any()):
        found.append(
            "some samples only stayed where they started, a fixed point from near which f leads away: a trivial one. "
            "Start elsewhere, with z0="
        )
    elif not bool(problem(start).isfinite().all()):
        found.append("f is not finite where the solve starts; start elsewhere, with z0=")
    elif not torch.equal(*(torch.nan_to_num(problem(solution.value)) for _ in range(2))):
        found.append(
            "the cell has two values at one point: it is random, as dropout is in training, or keeps a state, and so has no "
            "fixed point. Use perron.nn.VariationalDropout in a cell whose steps are known, or evaluate"
        )
    else:
        found.append(_ADVICE)
    if isinstance(problem.map, OneSystem):
        found.append(
            f"the batch of {problem.injection.shape[1]} is one system, since the cell is not known to act per sample; "
            "independent=True at the layer declares it"
        )
    return "; ".join(found)


def report_failure(
    what: str,
    converged: Tensor,
    measure: Tensor,
    tol: float,
    max_steps: int,
    on_failure: OnFailure,
    *,
    unit: str = "samples",
    hint: str = _ADVICE,
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
        f"{what}: {len(failed)} of {len(converged)} {unit} did not reach tol={tol:g} in at most {max_steps} steps "
        f"(first: number {int(failed[0])}, worst error measure {worst_value:.3g}); {hint}"
    )
    if on_failure == "raise":
        raise ConvergenceError(message)
    warnings.warn(message, ConvergenceWarning, stacklevel=3)
