from dataclasses import replace

import pytest
import torch
from torch import nn

from perron.cells import SparseLinear
from perron.nn import Activate, DiagonalLowRank, Equilibrium, Inject, PositiveConcaveConv2d
from perron.solvers import Anderson, Auto, Broyden, ConvergenceWarning, Newton, Picard
from problems import dense_layer, truth


@pytest.mark.parametrize(("scale", "limit"), [(1.8, 5), (0.15, 6), (0.019, 8)])
def test_about_half_of_picards_evaluations_or_less(scale: float, limit: int) -> None:
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
    assert solution.steps.double().mean() <= 0.51 * layer.solve(b).steps.double().mean()


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


def _cell(weight: torch.Tensor, place: str) -> Equilibrium:
    linear = nn.Linear(*weight.shape, bias=False, dtype=weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
    steps = {
        "inside": (linear, Inject(), nn.Tanh()),
        "outside": (linear, nn.Tanh(), Inject()),
        "affine": (linear, Inject()),
    }
    return Equilibrium(nn.Sequential(*steps[place]))


def _random(radius: float) -> torch.Tensor:
    weight = torch.rand(20, 20, generator=torch.Generator().manual_seed(1))
    return weight * radius / torch.linalg.eigvals(weight).abs().max()


def _walk(length: int) -> torch.Tensor:
    """A random walk on a path, damped by 0.99: PageRank."""
    links = torch.diag(torch.ones(length - 1, dtype=torch.float64), 1)
    links = links + links.t()
    return 0.99 * links / links.sum(0)


SHAPES = {
    "0.99 I": (0.99 * torch.eye(20), "outside", 30),
    "random, outside": (_random(0.99), "outside", 24),
    "random, inside": (_random(0.99), "inside", 14),
    "diagonal, outside": (torch.diag(torch.linspace(0.5, 0.99, 20)), "outside", 80),
    "diagonal, inside": (torch.diag(torch.linspace(0.5, 0.99, 20)), "inside", 20),
    "power control": (_random(0.99), "affine", 12),
    "walk on a path": (_walk(150), "affine", 12),
}


@pytest.mark.parametrize("name", SHAPES)
def test_at_most_twice_the_evaluations_of_the_best_solver(name: str) -> None:
    """Where Picard's iteration takes hundreds of steps, and the cell is far from rank one or has no rank-one model."""
    weight, place, limit = SHAPES[name]
    layer = _cell(weight, place)
    b = torch.full((2, len(weight)), 1.3e-3, dtype=weight.dtype)
    counts = {}
    for solver in (Auto(), Anderson(), Broyden(), Newton()):
        layer.solver = replace(solver, max_steps=300, on_failure="ignore")
        solution = layer.solve(b)
        if solution.converged.all():
            counts[type(solver).__name__] = int(solution.steps.max())
    assert counts["Auto"] <= min(2 * min(counts.values()), limit)


def test_sparse_graphs_take_krylov_steps() -> None:
    """PageRank on a grid of more nodes than are factorised; Picard's steps would be some 1,500."""
    side = 36
    index = torch.arange(side * side).view(side, side)
    pairs = [
        torch.stack([index[:-1].flatten(), index[1:].flatten()]),
        torch.stack([index[:, :-1].flatten(), index[:, 1:].flatten()]),
    ]
    edges = torch.cat([torch.cat(pairs, 1), torch.cat(pairs, 1).flip(0)], 1)
    linear = SparseLinear(edges, side * side).double()
    degree = torch.bincount(edges[1], minlength=side * side).double()
    pattern = linear.pattern.matrix(torch.ones_like(linear.weight))
    with torch.no_grad():
        linear.weight.copy_(0.99 / degree[pattern.col_indices()])
    layer = Equilibrium(nn.Sequential(linear, Inject()), solver=Auto(tol=1e-8, max_steps=300))
    b = torch.zeros(1, side * side, dtype=torch.float64) + 1e-6
    b[0, 0] = 0.01
    solution = layer.solve(b)
    assert solution.converged.all()
    assert solution.certified
    assert solution.steps.max() <= 170


def test_mazes() -> None:
    """Values fall by a factor of four from cell to cell; what is injected elsewhere is far below all of them."""
    n = 60
    weight = 0.2499 * (torch.diag(torch.ones(n - 1), 1) + torch.diag(torch.ones(n - 1), -1)).double()
    b = torch.full((1, n), 1e-250, dtype=torch.float64)
    b[0, 0] = 1.0
    exact = torch.linalg.solve(torch.eye(n, dtype=torch.float64) - weight, b[0]).unsqueeze(0)
    for solver in (Auto(max_steps=400), Picard(max_steps=400), Newton(max_steps=400), Anderson(max_steps=400)):
        layer = _cell(weight, "affine")
        layer.solver = solver
        cold, warm = layer.solve(b), layer.solve(b, z0=exact)
        for solution in (cold, warm):
            assert solution.certified
            assert solution.converged.all()
            torch.testing.assert_close(solution.value, exact, rtol=1e-8, atol=0)
        assert warm.steps.max() <= 12
        if isinstance(solver, Auto | Newton):
            assert cold.steps.max() <= 20
