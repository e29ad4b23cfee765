from fractions import Fraction

import pytest
import torch
from torch import nn

from perron.activations import ACTIVATIONS
from perron.cells import (
    Activate,
    ActivationStep,
    Chain,
    Clamp,
    DenseStep,
    DiagonalLowRank,
    Inject,
    InjectStep,
    Refusal,
    trace,
)
from perron.theory import degree, gain, margin
from perron.theory.contracting import contraction
from perron.theory.contraction import sensitivity
from problems import Tenfold, TenfoldMatrix


def nonnegative(cell: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in cell.parameters():
            p.abs_()
    return cell


@pytest.mark.parametrize(
    "name", [a.name for a in ACTIVATIONS.values() if a.derivative_of_value is not None and a.smooth]
)
def test_slopes_from_values_are_bounds(name: str) -> None:
    """In float32 against the same formula in float64, at the very same values."""
    chain = trace(nonnegative(nn.Sequential(nn.Linear(8, 8, bias=False), Inject(), Activate(name))))
    activation = ACTIVATIONS[name]
    value = activation(10 ** (8 * torch.rand(2000, 8) - 6))
    exact = activation.derivative_of_value(value.double())
    upper = chain.linearize_at_fixed_point(value, "upper").slope.double()
    lower = chain.linearize_at_fixed_point(value, "lower").slope.double()
    assert (lower <= exact).all()
    assert (exact <= upper).all()
    assert (upper - lower).max() <= 1e-5 * activation.slope_at_zero


@pytest.mark.parametrize("name", ["softsign", "arctan"])
def test_bounds_rounded_out_of_the_range_bound_saturated_slopes(name: str) -> None:
    """(1 - s)^2 and cos(s)^2 rise again beyond the supremum: the lower slope there must be the one at it, zero."""
    chain = trace(nonnegative(nn.Sequential(nn.Linear(1, 1, bias=False), Inject(), Activate(name))))
    beyond = torch.full((1, 1), ACTIVATIONS[name].supremum, dtype=torch.float64) + 1e-4
    assert float(chain.linearize_at_fixed_point(beyond, "lower").slope) <= 1e-15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slopes_that_jump_are_taken_from_the_argument(dtype: torch.dtype) -> None:
    """At a bound of 6 that was rounded down the value says slope 1; the argument, 100, says 0."""
    cell = nn.Sequential(nn.Linear(2, 2, bias=False, dtype=dtype), Inject(), Activate("relu6"))
    with torch.no_grad():
        cell[0].weight.copy_(torch.tensor([[3.0, 1.0], [0.5, 0.25]]))
    chain, b = trace(cell), torch.tensor([[82.0, 1.0]], dtype=dtype)
    below = torch.tensor([[6.0, 16 / 3]], dtype=dtype) * (1 - 1e-6)
    assert chain.linearize_at_fixed_point(below, "upper") is None
    steep = chain.linearize_steps(below, b, "upper").slope
    flat = chain.linearize_steps(below * (1 + 1e-6), b, "lower").slope
    assert steep[0, 0] <= 1e-5
    assert flat[0, 0] == 0
    assert steep[0, 1] >= 1 >= flat[0, 1] >= 1 - 1e-5


@pytest.mark.parametrize(
    "cell",
    [
        nn.Sequential(nn.Linear(4, 4), Inject(), nn.Tanh()),
        nn.Sequential(Inject(), nn.Linear(4, 4, bias=False), nn.Sigmoid()),
        nn.Sequential(nn.Linear(4, 6), nn.Softsign(), nn.Linear(6, 4, bias=False), Inject(), Activate("erf")),
        nn.Sequential(DiagonalLowRank(4, 2, bias=True), Inject(), Activate("log1p")),
        nn.Sequential(nn.Linear(4, 4), Inject()),
        nn.Sequential(
            nn.Linear(4, 4), Inject(), Clamp(nn.Parameter(torch.full((4,), 0.8)), nn.Parameter(torch.tensor(1.5)))
        ),
        nn.Sequential(
            Clamp(nn.Parameter(torch.tensor(0.2)), nn.Parameter(torch.full((4,), 0.7))), nn.Linear(4, 4), Inject()
        ),
        nn.Sequential(nn.Sigmoid(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4), Inject(), nn.Tanh()),
    ],
)
def test_pullback_is_that_of_autograd(cell: nn.Module) -> None:
    chain = trace(nonnegative(cell.double()))
    z, b, g = (torch.rand(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    value = chain(z, b)
    inputs = (b, *chain.tensors)
    expected = torch.autograd.grad(value, inputs, g, create_graph=True)
    found = chain.pullback(z, b, g)
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e)
    second = torch.autograd.grad(sum(a.square().sum() for a in found), (z, b, g, *chain.tensors), allow_unused=True)
    reference = torch.autograd.grad(
        sum(e.square().sum() for e in expected), (z, b, g, *chain.tensors), allow_unused=True
    )
    for a, e in zip(second, reference, strict=True):
        torch.testing.assert_close(a, e) if e is not None else None
    some = chain.pullback(z, b, g, [False] + [True] * len(chain.tensors))
    assert some[0] is None
    assert all(t is not None for t in some[1:])


def exact_relative(chain: Chain) -> Fraction:
    """(1 + gamma_1)(1 + gamma_2) ... - 1 of the steps in float64."""
    u, found = Fraction(1, 2**53), Fraction(1)
    for step in chain.steps:
        n = (
            1
            if isinstance(step, InjectStep)
            else step.activation.ulps
            if isinstance(step, ActivationStep)
            else step.terms + 2
        )
        found *= 1 + n * u / (1 - n * u)
    return found - 1


def test_no_rounding_is_lost_beside_1() -> None:
    """(1 + r)(1 + u) - 1 is r in floating point: a sum with an injection would cost nothing."""
    matrix = DenseStep(weights=(torch.rand(3, 3, dtype=torch.float64),))
    sigma = ActivationStep(activation=ACTIVATIONS["tanh"])
    for steps in ((InjectStep(),), (InjectStep(), matrix), (matrix, InjectStep(), sigma), (matrix, sigma) * 4):
        chain = Chain(steps)
        found, exact = Fraction(chain.rounding(torch.float64).relative), exact_relative(chain)
        assert exact <= found <= exact * (1 + Fraction(1, 10**12))


HALF = DenseStep(weights=(0.5 * torch.eye(2, dtype=torch.float64),))


@pytest.mark.parametrize("step", [Tenfold(), TenfoldMatrix(weights=HALF.weights)])
def test_steps_that_nobody_knows_are_not_the_identity(step: object) -> None:
    """A chain with one is evaluated, and nothing else."""
    chain = Chain((HALF, step, InjectStep()))
    z = torch.ones(1, 2, dtype=torch.float64)
    assert float(chain(z, z).max()) >= 3.5
    for ask in (
        lambda: chain.rounding(torch.float64),
        lambda: chain.at_zero(z),
        lambda: chain.linear(z),
        lambda: chain.rigorous(),
        lambda: chain.sizes(),
        lambda: Chain((*chain.steps, ActivationStep(activation=ACTIVATIONS["tanh"]))).single,
        lambda: chain.pullback(z, z, z),
        lambda: chain.linearize(z, z),
        lambda: chain.linearize_steps(z, z, "upper"),
        lambda: gain(chain),
        lambda: degree(chain),
        lambda: margin(chain),
        lambda: contraction(chain, z),
        lambda: sensitivity(chain, z, z, z),
    ):
        with pytest.raises(Refusal, match=type(step).__name__):
            ask()
