"""Maps on which Picard's steps go astray, with what textbook Anderson acceleration takes for them."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from perron.cells import as_map
from perron.nn import Equilibrium
from perron.solvers import Anderson, Auto, FixedPointProblem, Solution, Solver
from problems import UNRULY, Counting


def solve(name: str, solver: Solver, dtype: torch.dtype = torch.float64, samples: int = 1) -> tuple[Solution, Counting]:
    function, entries, start, _ = UNRULY[name]
    cell = Counting(function)
    problem = FixedPointProblem(map=as_map(cell)[0], injection=torch.zeros(samples, entries, dtype=dtype))
    return solver.solve(problem, torch.full((samples, entries), start, dtype=dtype)), cell


@pytest.mark.parametrize("name", UNRULY)
@pytest.mark.parametrize("solver", [Anderson(), Anderson(damping=0.5), Auto()], ids=["anderson", "damped", "auto"])
def test_unruly_maps_are_solved(name: str, solver: Solver) -> None:
    solution, cell = solve(name, replace(solver, tol=1e-6))
    function, *_, textbook = UNRULY[name]
    assert solution.converged.all()
    assert cell.evaluations == int(solution.steps)
    if getattr(solver, "damping", 1.0) == 1:
        assert cell.evaluations <= 2 * textbook
    torch.testing.assert_close(function(solution.value), solution.value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", UNRULY)
@pytest.mark.parametrize("solver", [Anderson(tol=1e-5), Auto(tol=1e-5)], ids=["anderson", "auto"])
def test_unruly_maps_are_solved_in_float32(name: str, solver: Solver) -> None:
    solution, cell = solve(name, solver, torch.float32)
    assert solution.converged.all()
    assert cell.evaluations <= 2 * UNRULY[name][3]


def test_right_values() -> None:
    solver = Anderson(tol=1e-10)
    diagonal = solve("diagonal", solver)[0].value
    torch.testing.assert_close(diagonal, torch.tensor([[0.25, 1 / 3, 2.0]], dtype=torch.float64))
    assert float(solve("logarithms", solver)[0].value) == pytest.approx(1.3, abs=1e-4)
    density = solve("density, U = 4", solver)[0].value
    assert float(density.sum()) == pytest.approx(5.0, abs=1e-10)
    # Lambert's function: z e^{2 z} = 3.
    z = float(solve("exponential", solver)[0].value)
    assert z * math.exp(2 * z) == pytest.approx(3.0, rel=1e-8)


@pytest.mark.parametrize("solver", [Anderson(steps=20), Auto(steps=20)], ids=["anderson", "auto"])
@pytest.mark.parametrize("name", UNRULY)
def test_unruly_maps_in_fixed_steps(name: str, solver: Solver) -> None:
    solution, cell = solve(name, solver, torch.float64)
    assert cell.evaluations == 20
    assert solution.converged.all()


def test_gradients_of_expanding_maps() -> None:
    class Affine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slopes = nn.Parameter(torch.tensor([-3.0, -2.0, 0.5], dtype=torch.float64))

        def forward(self, z, x):
            return z * self.slopes + x

    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    Equilibrium(Affine(), solver=Anderson(tol=1e-8))(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[0.25, 1 / 3, 2.0]] * 2, dtype=torch.float64))


def test_damping_is_checked() -> None:
    for wrong in (0.0, -0.5, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"damping must be in \(0, 1\]"):
            Anderson(damping=wrong)
