import pytest
import torch
from torch import nn

from perron.nn import Activate, DiagonalLowRank, Equilibrium, Inject, PositiveConcaveConv2d
from perron.solvers import Auto, ConvergenceWarning, Picard
from problems import dense_layer, truth


@pytest.mark.parametrize(("scale", "limit"), [(1.8, 5), (0.15, 6), (0.019, 8)])
def test_at_most_half_of_picards_evaluations(scale: float, limit: int) -> None:
    """Dense maps at spectral radius 1; plain Picard takes about 10, 33 and 128 steps."""
    weight = torch.rand(128, 128)
    weight /= torch.linalg.eigvals(weight).abs().max()
    b = scale * nn.functional.softplus(torch.randn(16, 128), beta=5)
    layer = dense_layer(weight, "tanh", solver=Auto())
    solution = layer.solve(b)
    assert solution.converged.all()
    assert solution.certified
    assert solution.steps.double().mean() <= limit
    layer.solver = Picard(max_steps=400)
    assert solution.steps.double().mean() <= layer.solve(b).steps.double().mean() / 2


def test_what_aggregation_cannot_finish_goes_to_picard() -> None:
    # Two blocks that do not see each other: far from rank one, and slow.
    weight = torch.block_diag(torch.full((3, 3), 0.33), torch.full((3, 3), 0.1))
    layer = dense_layer(weight, "log1p", solver=Auto(tol=1e-8, max_steps=1000))
    b = torch.tensor([[1e-6, 1e-6, 1e-6, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    solution = layer.solve(b)
    exact = truth(layer, b)
    assert solution.certified
    assert ((solution.lower.double() <= exact) & (exact <= solution.upper.double())).all()


def test_failure_is_reported() -> None:
    layer = dense_layer(torch.full((3, 3), 0.33), "log1p", solver=Auto(tol=1e-12, max_steps=8))
    with pytest.warns(ConvergenceWarning, match="Auto"):
        solution = layer.solve(torch.full((2, 3), 1e-6))
    assert not solution.converged.all()


@pytest.mark.parametrize("bias", [False, True])
def test_other_cells(bias: bool) -> None:
    before = nn.Sequential(Inject(), nn.Linear(4, 4, bias=bias), nn.Tanh())
    composed = nn.Sequential(nn.Linear(4, 4, bias=bias), nn.Softsign(), nn.Linear(4, 4), Inject(), Activate("erf"))
    for cell in (before, composed, nn.Sequential(DiagonalLowRank(4, 2, bias=bias), Inject(), nn.Sigmoid())):
        with torch.no_grad():
            for p in cell.parameters():
                p.abs_()
        layer = Equilibrium(cell, solver=Auto())
        b = torch.rand(5, 4) + 0.01
        solution = layer.solve(b)
        exact = truth(layer, b)
        assert solution.certified
        assert solution.converged.all()
        assert ((solution.lower.double() <= exact) & (exact <= solution.upper.double())).all()


def test_convolutions_and_empty_batches() -> None:
    layer = PositiveConcaveConv2d(3, 4)
    solution = layer.solve(torch.randn(5, 3, 7, 6))
    assert solution.certified
    assert solution.converged.all()
    assert layer.solve(torch.randn(0, 3, 7, 6)).value.shape == (0, 4, 7, 6)


@pytest.mark.slow
def test_soundness_on_twenty_thousand() -> None:
    import soundness

    result = soundness.measure(20_000, seed=4, solver="auto")
    assert sum(result[wrong] for wrong in soundness.FALSE) == 0, result["findings"]
