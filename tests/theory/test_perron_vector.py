"""Weighted sup norms in which a whole layer contracts, from Perron vectors: closed forms, exact arithmetic, refusals."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from perron import certify
from perron.cells import Activate, Inject, trace
from perron.nn import Equilibrium
from perron.solvers import Auto, Picard
from perron.theory import gain
from perron.theory.contraction import _ball, norm_of_gain, shift
from perron.verify import Interval, propagate
from problems import long_picard


def layer(weight: torch.Tensor, activation: str = "tanh", **options: object) -> Equilibrium:
    linear = nn.Linear(*weight.shape, bias=False, dtype=weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
    cell = nn.Sequential(linear, Inject(), Activate(activation))
    return Equilibrium(cell, injection="free", solver=Auto(tol=1e-8), **options)


def matrix(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# Row sums of 4, and |W| has the spectral radius sqrt(0.8).
SKEWED = matrix([0.0, -4.0], [0.2, 0.0])


def test_row_sums_of_four_and_a_spectral_radius_below_one() -> None:
    certificate = certify(layer(SKEWED))
    assert certificate
    assert certificate.kind == "bounded gain"
    assert certificate.metric == "weighted sup norm"
    assert 0.8**0.5 <= certificate.rate <= 0.8**0.5 + 0.1 * (1 - 0.8**0.5)
    assert "Perron vector" in str(certificate)
    assert gain(trace(layer(SKEWED).cell)) == pytest.approx(4)


@pytest.mark.parametrize("activation", ["tanh", "identity", "relu", "arctan"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_samples_of_such_layers_are_proven(activation: str, scale: float) -> None:
    cell = layer(SKEWED, activation)
    b = scale * torch.randn(16, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = long_picard(trace(cell.cell), b)
    for solver in (Auto(tol=1e-8), Picard(tol=1e-8, max_steps=2000)):
        cell.solver = solver
        solution = cell.solve(b)
        assert solution.certified
        assert solution.converged.all()
        assert ((solution.lower <= exact) & (exact <= solution.upper)).all()


def test_gradients_of_such_layers_are_bounded() -> None:
    cell = layer(SKEWED, "arctan")
    b = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    cell(b).sum().backward()
    assert cell.last_solution.adjoint.certified


@given(st.integers(0, 10_000))
def test_the_inequality_holds_exactly(seed: int) -> None:
    """|W| w <= kappa w in rational numbers, with entries over many decades and some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(1, 7, (), generator=generator))
    weight = torch.randn(n, n, generator=generator, dtype=torch.float64)
    weight = weight * 10.0 ** torch.randint(-6, 6, (n, n), generator=generator)
    weight = weight * (torch.rand(n, n, generator=generator) < 0.6)
    radius = float(torch.linalg.eigvals(weight.abs()).abs().max())
    aimed = float(torch.rand((), generator=generator)) * 1.1
    weight = weight * (aimed / radius if radius > 1e-9 else 1.0)
    norm = norm_of_gain(trace(layer(weight, "identity").cell))
    if norm.factor < 1 and norm.weights is not None:
        w, rows = [Fraction(x) for x in norm.weights.tolist()], weight.abs().tolist()
        for k, row in enumerate(rows):
            image = sum((Fraction(a) * x for a, x in zip(row, w, strict=True)), Fraction(0))
            assert image <= Fraction(norm.factor) * w[k]


@pytest.mark.parametrize("weight", [0.5, 0.9, 1 - 2.0**-20])
def test_the_factor_is_attained(weight: float) -> None:
    """For W = w [[0, 10], [0.1, 0]] the best factor is w; it is one of a positive multiple of the swap."""
    norm = norm_of_gain(trace(layer(weight * matrix([0.0, 10.0], [0.1, 0.0]), "identity").cell))
    assert weight <= norm.factor <= weight + 0.1 * (1 - weight) + 1e-14


@pytest.mark.parametrize("radius", [1.0, 1 + 2.0**-40, 3.0])
def test_a_spectral_radius_of_one_or_more_is_refused(radius: float) -> None:
    certificate = certify(layer(radius * matrix([0.0, -10.0], [0.1, 0.0]), "identity"))
    assert certificate.kind != "bounded gain"
    assert not norm_of_gain(trace(layer(radius * matrix([0.0, 10.0], [0.1, 0.0]), "identity").cell)).factor < 1


def test_reducible_and_extreme_matrices() -> None:
    """Triangular, with a diagonal below 1: the spectral radius is that of the diagonal, however large the rest is."""
    triangular = matrix([0.5, 1e6], [0.0, 0.25])
    certificate = certify(layer(triangular, "identity"))
    assert certificate
    cell = layer(triangular, "identity")
    b = matrix([1.0, -1.0])
    solution = cell.solve(b)
    exact = torch.linalg.solve(torch.eye(2, dtype=torch.float64) - triangular, b.t()).t()
    assert not solution.proven.any() or ((solution.lower <= exact) & (exact <= solution.upper)).all()
    assert not certify(layer(matrix([0.5, torch.inf], [0.0, 0.25])))
    assert not certify(layer(matrix([0.5, torch.nan], [0.0, 0.25])))


def test_channels_of_convolutions() -> None:
    """Two channels that feed each other, 4 one way and 0.2 the other: for every size of the image, border included."""
    convolution = nn.Conv1d(2, 2, 3, padding=1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        convolution.weight.zero_()
        convolution.weight[0, 1] = torch.tensor([1.0, -2.0, 1.0])
        convolution.weight[1, 0] = torch.tensor([-0.05, 0.1, 0.05])
    cell = Equilibrium(nn.Sequential(convolution, Inject(), Activate("identity")), injection="free")
    certificate = certify(cell)
    assert certificate.metric == "weighted sup norm"
    assert certificate.rate >= 0.8**0.5
    for size in (1, 2, 9):
        b = torch.randn(3, 2, size, dtype=torch.float64)
        unit = torch.eye(2 * size, dtype=torch.float64).view(-1, 2, size)
        dense = convolution(unit).flatten(1).t().detach()
        exact = torch.linalg.solve(torch.eye(2 * size, dtype=torch.float64) - dense, b.flatten(1).t()).t().view_as(b)
        solution = cell.solve(b)
        assert solution.certified
        assert ((solution.lower <= exact + 1e-13) & (exact - 1e-13 <= solution.upper)).all()


def test_boxes_move_as_far_as_the_norm_allows() -> None:
    """db along the Perron vector of W = [[0, 4], [0.2, 0]], w = (sqrt 20, 1): dz = db/(1 - sqrt 0.8)."""
    weight = SKEWED.abs()
    cell = layer(weight, "identity")
    radius = 0.1 * matrix([20.0**0.5, 1.0])
    exact = radius / (1 - 0.8**0.5)
    moved = shift(trace(cell.cell), radius)
    assert (moved >= exact * (1 - 1e-14)).all()
    # The factor may be a tenth of what is left to 1 above the best.
    assert (moved <= exact * 1.2).all()
    b = matrix([1.0, -1.0])
    box = propagate(cell, Interval(b - radius, b + radius))
    middle = torch.linalg.solve(torch.eye(2, dtype=torch.float64) - weight, b.t()).t()
    assert (box.lower <= middle - exact * (1 - 1e-12)).all()
    assert (middle + exact * (1 - 1e-12) <= box.upper).all()


@given(st.integers(0, 10_000))
def test_corners_of_boxes_stay_inside(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 3, generator=generator, dtype=torch.float64) * matrix([1, 6, 6], [0.1, 1, 6], [0.1, 0.1, 1])
    weight = weight * (0.9 / float(torch.linalg.eigvals(weight.abs()).abs().max()))
    cell = layer(weight, "identity")
    b, radius = (torch.rand(1, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    box = propagate(cell, Interval(b - radius, b + radius))
    signs = torch.tensor([[a, c, d] for a in (-1, 1) for c in (-1, 1) for d in (-1, 1)], dtype=torch.float64)
    corners = torch.linalg.solve(torch.eye(3, dtype=torch.float64) - weight, (b + signs * radius).t()).t()
    assert (corners >= box.lower - 1e-12).all()
    assert (corners <= box.upper + 1e-12).all()


@pytest.mark.parametrize("scale", [1e-250, 1.0, 1e250])
def test_the_ball_of_fixed_points_is_the_one_of_the_norm(scale: float) -> None:
    """|z| <= w max_i |b_i|/w_i / (1 - kappa) in rational numbers, and hardly more."""
    chain = trace(layer(SKEWED, "identity").cell)
    norm, b = norm_of_gain(chain), scale * matrix([1.0, -0.125])
    lower, upper = _ball(chain, b)
    w = [Fraction(x) for x in norm.weights.tolist()]
    radius = max(abs(Fraction(x)) / y for x, y in zip(b[0].tolist(), w, strict=True)) / (1 - Fraction(norm.factor))
    for k, y in enumerate(w):
        assert Fraction(float(upper[0, k])) >= radius * y
        assert float(Fraction(float(upper[0, k])) / (radius * y)) <= 1 + 1e-9
    assert torch.equal(lower, -upper)
