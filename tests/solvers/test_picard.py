import warnings

import pytest
import torch
from torch import nn

from perron.nn import Equilibrium, PositiveConcaveConv2d, PositiveConcaveLinear
from perron.solvers import ConvergenceError, ConvergenceWarning, Picard
from problems import dense_layer, truth


@pytest.mark.slow
def test_soundness_on_twenty_thousand() -> None:
    import soundness

    result = soundness.measure(20_000, seed=2, solver="picard")
    assert sum(result[wrong] for wrong in soundness.FALSE) == 0, result["findings"]


def test_closed_form() -> None:
    """z = w z + b has z* = b/(1 - w): the tight case of every bound."""
    layer = dense_layer(torch.tensor([[0.5]], dtype=torch.float64), "identity", solver=Picard(tol=1e-12))
    b = torch.tensor([[1.0], [1e-9], [1e3]], dtype=torch.float64)
    solution = layer.solve(b)
    torch.testing.assert_close(solution.value, 2 * b, rtol=1e-12, atol=0)
    assert (solution.steps <= 8).all(), "the extrapolation is exact on linear maps"


def test_samples_do_not_influence_each_other() -> None:
    layer = PositiveConcaveLinear(6, 9, solver=Picard(on_failure="ignore"))
    x = torch.randn(8, 6)
    alone = layer.solve(x).value
    bad = x.clone()
    bad[2], bad[5] = torch.nan, torch.inf
    solution = layer.solve(bad)
    good = torch.tensor([0, 1, 3, 4, 6, 7])
    torch.testing.assert_close(solution.value[good], alone[good], rtol=1e-4, atol=0)
    assert solution.converged[good].all()
    assert not solution.converged[[2, 5]].any()
    assert solution.error_bound[[2, 5]].isinf().all()
    assert solution.value[2].isnan().all()
    assert not solution.certified, "certified means every sample"
    assert (solution.steps[good] > 0).all()


def test_an_easy_sample_stops_early() -> None:
    layer = dense_layer(torch.full((4, 4), 0.2475), "identity")
    b = torch.tensor([[1.0] * 4, [1e-9, 1, 1, 1e3]])
    solution = layer.solve(b)
    assert solution.steps[0] < solution.steps[1]


def test_failure_is_never_silent() -> None:
    layer = dense_layer(torch.full((3, 3), 30.0), "tanh", solver=Picard(max_steps=2))
    b = torch.full((2, 3), 1e-9)
    with pytest.warns(ConvergenceWarning, match="2 of 2 samples") as caught:
        solution = layer.solve(b)
    assert len(caught) == 1
    assert not solution.converged.any()
    layer.solver = Picard(max_steps=2, on_failure="raise")
    with pytest.raises(ConvergenceError, match="max_steps"):
        layer(b)
    layer.solver = Picard(max_steps=2, on_failure="ignore")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(b)


def test_an_unfinished_solve_still_encloses() -> None:
    layer = dense_layer(torch.rand(8, 8), "tanh", solver=Picard(tol=1e-9, max_steps=6, on_failure="ignore"))
    b = torch.rand(4, 8) + 0.01
    solution = layer.solve(b)
    exact = truth(layer, b)
    assert not solution.converged.any()
    assert (solution.steps <= 6).all()
    assert ((solution.lower.double() <= exact) & (exact <= solution.upper.double())).all()


def test_divergence_is_reported() -> None:
    class Doubling(nn.Module):
        def forward(self, z, x):
            return 2 * z + x

    layer = Equilibrium(Doubling(), solver=Picard(max_steps=5000))
    with pytest.warns(ConvergenceWarning):
        solution = layer.solve(torch.ones(2, 2))
    assert not solution.converged.any()


@pytest.mark.parametrize("shape", [(0, 5), (1, 5)])
def test_small_batches(shape) -> None:
    layer = PositiveConcaveLinear(5, 7)
    solution = layer.solve(torch.randn(shape))
    assert solution.value.shape == (shape[0], 7)
    assert solution.converged.shape == (shape[0],)
    value = layer(torch.randn(shape, requires_grad=True))
    value.sum().backward()
    assert layer.input.weight.grad is not None


def test_without_proof_nothing_is_certified() -> None:
    for make in (lambda s: PositiveConcaveLinear(5, 7, solver=s), lambda s: PositiveConcaveConv2d(5, 3, solver=s)):
        layer = make(Picard(proof_dtype=None))
        x = torch.randn(2, 5) if layer.dims == 0 else torch.randn(2, 5, 6, 6)
        solution = layer.solve(x)
        assert solution.converged.all()
        assert not solution.certified
        assert solution.proof_dtype is None
        layer.solver = Picard()
        proven = layer.solve(x)
        assert proven.certified
        torch.testing.assert_close(solution.value, proven.value, rtol=3e-4, atol=0)


def test_float32_proof_on_request() -> None:
    layer = dense_layer(torch.rand(30, 30) / 20, "tanh", solver=Picard(proof_dtype=torch.float32, tol=1e-3))
    b = torch.rand(5, 30) + 0.1
    solution = layer.solve(b)
    assert solution.proof_dtype == torch.float32
    exact = truth(layer, b)
    assert ((solution.lower.double() <= exact) & (exact <= solution.upper.double())).all()


@pytest.mark.parametrize(
    "options",
    [
        {"tol": 0},
        {"tol": 1.5},
        {"max_steps": 0},
        {"stop": "soon"},
        {"proof_dtype": torch.float16},
        {"on_failure": "shrug"},
    ],
)
def test_options_are_checked(options) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Picard(**options)
    with pytest.raises(TypeError):
        Picard(damping=0.5)  # type: ignore[call-arg]


def test_a_cell_that_changes_the_shape() -> None:
    with pytest.raises(ValueError, match="shape"):
        Equilibrium(nn.Bilinear(3, 3, 4))(torch.rand(2, 3))
