"""Compiled solves. The backend "eager" takes every step of the compiler but the code generation, which takes long."""

import copy
import logging
import pickle

import pytest
import torch
from torch import nn

from perron.nn import Activate, Equilibrium, Inject, PositiveConcaveConv2d, PositiveConcaveLinear
from perron.solvers import Auto, Compiled
from problems import dense_layer, truth


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def random_cells(activation: str, solver: Compiled, count: int):
    """Layers of one shape that share the solver, from easy to impossible in few steps."""
    for k in range(count):
        weight = torch.rand(20, 20) * (torch.rand(20, 20) < (0.2 if k % 3 == 0 else 1.0))
        weight = weight / weight.sum(1).max().clamp_min(1e-30) * 10 ** (4 * torch.rand(()) - 2)
        low = -8 * torch.rand(())
        yield dense_layer(weight, activation, solver=solver), 10 ** (low * torch.rand(16, 20))


def check_soundness(backend: str, cells: int) -> None:
    for activation in ("tanh", "sigmoid", "log1p", "one_minus_exp"):
        solver = Compiled(tol=1e-4, max_steps=2000, backend=backend)
        for layer, b in random_cells(activation, solver, cells):
            solution = layer.solve(b)
            exact = truth(layer, b)
            assert solution.certified
            assert (solution.lower.double() <= exact * (1 + 1e-12)).all()
            assert (exact * (1 - 1e-12) <= solution.upper.double()).all()
            error = ((solution.value.double() - exact).abs() / exact).amax(1)
            assert (error <= solution.error_bound + 1e-12).all()
            assert solution.converged.all()
        assert any(plan.compilations for plan in solver.plans.values())


def test_soundness() -> None:
    check_soundness("eager", 30)


@pytest.mark.slow
def test_soundness_of_generated_code() -> None:
    check_soundness("inductor", 300)


@pytest.mark.parametrize(
    "make", [lambda s: PositiveConcaveLinear(6, 8, solver=s), lambda s: PositiveConcaveConv2d(2, 3, solver=s)]
)
def test_values_and_gradients_are_those_of_auto(make) -> None:
    layer = make(Compiled(backend="eager"))
    plain = copy.deepcopy(layer)
    plain.solver = Auto()
    shape = (4, 6) if layer.dims == 0 else (4, 2, 5, 5)
    for _ in range(5):
        x = torch.randn(shape)
        results = []
        for model in (layer, plain):
            model.zero_grad()
            y = model(x)
            y.square().sum().backward()
            assert model.last_solution.certified
            assert model.last_solution.adjoint.certified
            assert model.last_solution.adjoint.converged.all()
            results.append((y.detach(), [p.grad for p in model.parameters()]))
        torch.testing.assert_close(results[0][0], results[1][0], rtol=2e-4, atol=0)
        for a, b in zip(results[0][1], results[1][1], strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-5)
    compiled = sum(plan.run is not None for plan in layer.solver.plans.values())
    assert compiled == (2 if layer.dims == 0 else 0)


def test_bad_samples_leave_their_neighbours_alone() -> None:
    layer = dense_layer(torch.rand(9, 9) / 9, "tanh", solver=Compiled(backend="eager", on_failure="ignore"))
    b = torch.rand(6, 9) + 0.1
    for _ in range(3):
        alone = layer.solve(b).value
    b[1], b[4] = torch.nan, torch.inf
    solution = layer.solve(b)
    good = [0, 2, 3, 5]
    torch.testing.assert_close(solution.value[good], alone[good], rtol=2e-4, atol=0)
    assert solution.proven.tolist() == [True, False, True, True, False, True]
    assert solution.value[1].isnan().all()


def test_the_weights_of_the_moment_count() -> None:
    layer = dense_layer(torch.rand(9, 9) / 9, "tanh", solver=Compiled(backend="eager"))
    b = torch.rand(6, 9) + 0.1
    for _ in range(4):
        with torch.no_grad():
            layer.cell[0].weight.mul_(1.3)
        solution = layer.solve(b)
        exact = truth(layer, b)
        assert ((solution.lower.double() <= exact) & (exact <= solution.upper.double())).all()


def test_a_failing_compiler_is_reported_and_does_no_harm(caplog) -> None:
    layer = dense_layer(torch.rand(9, 9) / 9, "tanh", solver=Compiled(backend=_broken))
    b = torch.rand(6, 9) + 0.1
    with caplog.at_level(logging.WARNING, "perron"):
        for _ in range(5):
            assert layer.solve(b).certified
    assert len(caplog.records) == 1
    assert "goes on uncompiled" in caplog.text


def _broken(graph, inputs):
    raise RuntimeError("no compiler here")


def _cancelling(graph: torch.fx.GraphModule, inputs):
    """A compiler that writes expm1 as torch's vectorised code does."""
    for node in graph.graph.nodes:
        if node.target is torch.expm1:
            node.target = lambda v: torch.exp(v) - 1
    graph.recompile()
    return graph


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_code_that_loses_the_digits_of_the_activation_proves_nothing(dtype, caplog) -> None:
    weight = torch.rand(9, 9, dtype=dtype) / 18
    layer = dense_layer(weight, "one_minus_exp", solver=Compiled(tol=1e-6, backend=_cancelling))
    b = (torch.rand(6, 9, dtype=dtype) + 0.1) * (1e-3 if dtype == torch.float32 else 1e-8)
    with caplog.at_level(logging.WARNING, "perron"):
        for _ in range(4):
            solution = layer.solve(b)
            exact = truth(layer, b)
            assert solution.certified
            assert ((solution.lower.double() <= exact) & (exact <= solution.upper.double())).all()
    assert [plan.refused for plan in layer.solver.plans.values()] == [True]
    assert "one_minus_exp loses digits" in caplog.text


def test_what_cannot_be_compiled_is_solved_all_the_same() -> None:
    composed = nn.Sequential(nn.Linear(4, 4), nn.Softsign(), nn.Linear(4, 4), Inject(), nn.Tanh())
    with torch.no_grad():
        for p in composed.parameters():
            p.abs_()
    for cell in (composed, nn.Sequential(nn.Linear(4, 4), Inject(), Activate("erf"))):
        layer = Equilibrium(cell, injection="softplus", solver=Compiled(backend="eager", on_failure="ignore"))
        for _ in range(4):
            layer(torch.randn(3, 4)).sum().backward()
        assert not layer.solver.plans


def test_copies_and_files() -> None:
    layer = dense_layer(torch.rand(9, 9) / 9, "tanh", solver=Compiled(backend="eager"))
    b = torch.rand(6, 9) + 0.1
    for _ in range(3):
        expected = layer.solve(b).value
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(other.solve(b).value, expected, rtol=2e-4, atol=0)
