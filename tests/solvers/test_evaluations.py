"""What a solve costs: `steps` is what was really evaluated, and never more than `max_steps`."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from perron.cells import Activate, AutomaticLinearization, Chain, Clamp, DenseStep, Inject, as_map, trace
from perron.nn import MonotoneLinear
from perron.solvers import (
    Anderson,
    Auto,
    Broyden,
    FixedPointProblem,
    Newton,
    OperatorSplitting,
    Picard,
    Solver,
)
from perron.theory import PositiveConcave, Sign, pose
from problems import Counting

SOLVERS: dict[str, Solver] = {
    "auto": Auto(),
    "picard": Picard(),
    "anderson": Anderson(),
    "broyden": Broyden(),
    "newton": Newton(),
    "chord": Newton(linear="chord"),
    "krylov": Newton(linear="krylov"),
}
# The smallest enclosure of a concave cell takes 3 evaluations, that of another 2.
SMALLEST = 3
# Not the number of entries, so that products which set a method up are told from evaluations.
SAMPLES, ENTRIES = 7, 5


class Counter:
    """Rows that went through a matrix, in batches; alike samples leave together."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, rows: int) -> None:
        if rows % SAMPLES == 0:
            self.count += rows // SAMPLES


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    found = Counter()
    apply, matvec = DenseStep.apply, AutomaticLinearization.matvec

    def counted(step: DenseStep, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        found(len(v))
        return apply(step, v, bias)

    def counted_product(jacobian: AutomaticLinearization, w: torch.Tensor) -> torch.Tensor:
        found.count += 1
        return matvec(jacobian, w)

    monkeypatch.setattr(DenseStep, "apply", counted)
    monkeypatch.setattr(AutomaticLinearization, "matvec", counted_product)
    return found


def linear(weight: torch.Tensor, bias: bool = False) -> nn.Linear:
    module = nn.Linear(ENTRIES, ENTRIES, bias=bias)
    with torch.no_grad():
        module.weight.copy_(weight)
        if bias:
            module.bias.fill_(0.1)
    return module


def slow(radius: float = 1.0) -> torch.Tensor:
    return radius * torch.diag(torch.linspace(0.5, 1.0, ENTRIES)) + 1e-3


CELLS: dict[str, Callable[[], nn.Module]] = {
    "inside": lambda: nn.Sequential(linear(slow()), Inject(), Activate("tanh")),
    "outside": lambda: nn.Sequential(linear(slow()), Activate("tanh"), Inject()),
    "bias": lambda: nn.Sequential(linear(slow(), True), Inject(), Activate("tanh")),
    "before": lambda: nn.Sequential(Inject(), linear(slow()), Activate("tanh")),
    "affine": lambda: nn.Sequential(linear(slow(0.9)), Inject()),
    "clamp": lambda: nn.Sequential(linear(slow(0.98)), Inject(), Clamp(0.0, 0.5)),
    "relu": lambda: nn.Sequential(linear(slow(0.98)), Inject(), nn.ReLU()),
}


@pytest.mark.parametrize("max_steps", [1, 2, 3, 4, 5, 6, 7, 9, 12, 20, 60])
@pytest.mark.parametrize("name", SOLVERS)
def test_certified_cells(name: str, max_steps: int, counter: Counter) -> None:
    solver = replace(SOLVERS[name], max_steps=max_steps, tol=1e-6, on_failure="ignore")
    guess = torch.full((SAMPLES, ENTRIES), 0.3)
    for place, make in CELLS.items():
        problem = FixedPointProblem(
            map=trace(make()), injection=torch.full((SAMPLES, ENTRIES), 1e-3), theory=PositiveConcave()
        )
        for z0 in (None, guess):
            counter.count = 0
            solution = solver.solve(problem, z0)
            assert solution.steps.tolist() == [counter.count] * SAMPLES, place
            assert counter.count <= max(max_steps, SMALLEST), place


@pytest.mark.parametrize("max_steps", [1, 2, 3, 5, 8, 30])
@pytest.mark.parametrize("kind", ["contracting", "monotone"])
def test_cells_that_contract_or_are_monotone(kind: str, max_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations of f; what is seen of the cell beforehand, from |W|, are none."""
    counter, call = Counter(), Chain.__call__

    def counted(chain: Chain, z: torch.Tensor, injection: torch.Tensor) -> torch.Tensor:
        counter(len(z))
        return call(chain, z, injection)

    monkeypatch.setattr(Chain, "__call__", counted)
    weight = 0.9 * torch.linalg.qr(torch.randn(ENTRIES, ENTRIES))[0] / ENTRIES**0.5
    cell = nn.Sequential(linear(weight), Inject(), Activate("tanh"))
    splitting: dict[str, Solver] = {
        "splitting": OperatorSplitting(),
        "forward": OperatorSplitting(scheme="forward_backward"),
    }
    if kind == "monotone operator":
        layer = MonotoneLinear(ENTRIES, ENTRIES, activation="relu")
        with torch.no_grad():
            cell = nn.Sequential(linear(3 * layer.cell[0].weight - 2 * torch.eye(ENTRIES)), Inject(), nn.ReLU())
    problem = FixedPointProblem(
        map=trace(cell), injection=torch.full((SAMPLES, ENTRIES), 0.3), theory=pose(trace(cell), (Sign.ANY,))[0]
    )
    for name, solver in ({**SOLVERS, **splitting} if kind == "monotone operator" else SOLVERS).items():
        counter.count = 0
        solution = replace(solver, max_steps=max_steps, tol=1e-6, on_failure="ignore").solve(problem)
        # Splitting takes products with W besides.
        assert counter.count <= int(solution.steps.max()) <= max(max_steps, 2), name
        if kind == "contracting" and not isinstance(solver, Newton):
            assert solution.steps.tolist() == [counter.count] * SAMPLES, name


@pytest.mark.parametrize("max_steps", [1, 2, 3, 7, 50, 300])
@pytest.mark.parametrize("name", SOLVERS)
def test_cells_of_unknown_structure(name: str, max_steps: int, counter: Counter) -> None:
    """One that has no fixed point, and one that rotates."""
    for function in (lambda z: z.square() + z.roll(1, 1).abs() + 1, lambda z: 0.98 * z.roll(1, 1) + 1 + 0.01 * z.sin()):
        cell = Counting(function)
        problem = FixedPointProblem(map=as_map(cell)[0], injection=torch.zeros(1, ENTRIES))
        counter.count = 0
        solution = replace(SOLVERS[name], max_steps=max_steps, tol=1e-7, on_failure="ignore").solve(problem)
        assert int(solution.steps) == cell.evaluations + counter.count
        # One evaluation more looks whether the start is a fixed point already.
        assert int(solution.steps) <= max(max_steps, 2)


@pytest.mark.parametrize("name", SOLVERS)
def test_fixed_steps_are_exact(name: str, counter: Counter) -> None:
    for steps in (5, 6, 9, 20):
        solver = replace(SOLVERS[name], steps=steps, on_failure="ignore")
        for make in CELLS.values():
            counter.count = 0
            solution = solver.solve(
                FixedPointProblem(
                    map=trace(make()), injection=torch.full((SAMPLES, ENTRIES), 0.1), theory=PositiveConcave()
                )
            )
            assert solution.steps.tolist() == [counter.count] * SAMPLES == [steps] * SAMPLES
        if steps == 5:
            continue
        cell = Counting(lambda z: 0.9 * z.roll(1, 1) + 1)
        counter.count = 0
        solution = solver.solve(FixedPointProblem(map=as_map(cell)[0], injection=torch.zeros(1, 4)))
        assert int(solution.steps) == steps == cell.evaluations + counter.count
