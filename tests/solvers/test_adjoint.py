"""Bounds on the error of the adjoint at their tight cases, where closed forms are at hand."""

from fractions import Fraction

import pytest
import torch
from torch import nn

from perron.cells import Activate, Chain, Inject, trace
from perron.nn import Equilibrium, PositiveConcaveLinear
from perron.solvers import Auto
from perron.theory.contraction import SignedGradientBound
from perron.theory.monotone_operator import MonotoneGradientBound
from perron.theory.positive_concave import ConcaveGradientBound
from problems import dense_layer, truth


def one(value: float) -> torch.Tensor:
    return torch.full((1, 1), value, dtype=torch.float64)


def chain_of(weight: float, activation: str) -> Chain:
    chain = trace(dense_layer(one(weight), activation).cell)
    return chain.rebind([t.detach() for t in chain.tensors])


@pytest.mark.parametrize("proof", [ConcaveGradientBound, SignedGradientBound])
@pytest.mark.parametrize("weight", [0.01, 0.5, 0.9, 1 - 2.0**-20])
@pytest.mark.parametrize("start", [0.0, 0.3, 1.7, 1e6])
@pytest.mark.parametrize("scale", [1e-250, 1.0, 1e250])
def test_the_bound_in_the_weighted_norm_is_attained(proof, weight: float, start: float, scale: float) -> None:
    """g = w g + v is v/(1 - w); from any candidate the distance that is left is w/(1 - w) times the residual."""
    chain, b = chain_of(weight, "identity"), one(1.0)
    z, exact = b / (1 - weight), scale / (1 - weight)
    g, _, bound = proof(chain, b, (z, z)).finish(z, one(start * exact), one(scale))
    error = abs(g.item() - exact) / abs(g.item())
    assert error <= bound.item()
    assert bound.item() <= error * (1 + 1e-7) + 1e-13 / (1 - weight) * max(start, 1)


@pytest.mark.parametrize("weight", [0.002, 0.01])
def test_what_the_jacobian_varies_in_the_enclosure_is_counted(weight: float) -> None:
    """At the lower end of an enclosure the adjoint is v/(1 - J), the exact fixed point being the upper one."""
    chain, b = chain_of(weight, "tanh"), one(0.1)
    lower, upper = one(0.1), one(0.3)
    steep, flat = weight * (1 - 0.1**2), weight * (1 - 0.3**2)
    candidate = one(1 / (1 - steep))
    g, _, bound = ConcaveGradientBound(chain, b, (lower, upper)).finish(lower, candidate, one(1.0))
    error = abs(g.item() - 1 / (1 - flat)) / g.item()
    assert error <= bound.item() <= 1.005 * error


@pytest.mark.parametrize("weight", [0.125, 0.5, 0.9])
@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_the_bound_of_monotone_cells_is_attained(weight: float, scale: float) -> None:
    """With 0 < W < 1 and slope 1, |g - g*| is (1 + W/(1 - W)) times the residual."""
    chain, b = chain_of(weight, "identity"), one(1.0)
    z = b / (1 - weight)
    proof = MonotoneGradientBound(chain, b, (z, z), chain.affine[0].margin())
    for start in (0.5, 1.1, 3.0):
        exact = scale / (1 - weight)
        _, _, bound = proof.finish(z, one(start * exact), one(scale))
        error = abs(start - 1) / start
        assert error <= bound.item() <= error * (1 + 1e-9) + 1e-12


def test_nothing_is_certified_of_products_below_the_range() -> None:
    """A weight of 1e-154 times a gradient of 1e-200 is 0 in float64, and the gradient is not."""
    weight = torch.tensor([[0.5, 0.0], [0.0, 1e-170]], dtype=torch.float64)
    chain = trace(dense_layer(weight, "identity").cell)
    chain = chain.rebind([t.detach() for t in chain.tensors])
    b = torch.ones(1, 2, dtype=torch.float64)
    z = b / (1 - weight.diagonal())
    v = torch.tensor([[0.0, 1e-300]], dtype=torch.float64)
    g, _, bound = ConcaveGradientBound(chain, b, (z, z)).finish(z, 2 * v, v)
    assert g[0, 1] > 0
    assert bound.item() > 0
    # Nothing is small beside a cotangent below the range.
    single, small = chain_of(2e-6, "identity"), one(1.1186e-320)
    assert (
        ConcaveGradientBound(single, one(1.0), (one(1.000002), one(1.000002))).finish(one(1.0), small, small)[2].item()
        > 1e-6
    )
    nothing = torch.zeros_like(v)
    assert ConcaveGradientBound(chain, b, (z, z)).finish(z, nothing, nothing)[2].item() == 0


def test_cells_without_plain_sums_have_their_slopes_from_the_value_throughout() -> None:
    """Grouped convolutions in float32 have none. z = 1 - exp(-1.5 z - b): the image of an enclosure is narrower than it."""
    convolution = nn.Conv1d(2, 2, 1, groups=2, bias=False)
    nn.init.constant_(convolution.weight, 1.5)
    layer = Equilibrium(nn.Sequential(convolution, Inject(), Activate("one_minus_exp")))
    b = torch.full((1, 2, 1), 0.5)
    exact = truth(layer, b)
    chain = trace(layer.cell)
    chain = chain.rebind([t.detach() for t in chain.tensors])
    v = torch.ones_like(b)
    for width in (1e-1, 1e-2, 1e-3):
        lower, upper = ((1 - width) * exact).float(), ((1 + width) * exact).float()
        for z in (lower, upper):
            candidate = 1 / (1 - 1.5 * (1 - z))
            g, _, bound = ConcaveGradientBound(chain, b, (lower, upper)).finish(z, candidate, v)
            error = ((g - 1 / (1 - 1.5 * (1 - exact))).abs() / g).max()
            assert float(error) <= float(bound)


def test_what_underflows_in_one_step_may_be_large_after_the_next() -> None:
    """g = J g + v with J = 1e-307 1e305: of g = 1e-14 the first product has three digits, and the second brings it back."""
    maps = [nn.Linear(1, 1, bias=False, dtype=torch.float64) for _ in range(2)]
    for linear, weight in zip(maps, (1e305, 1e-307), strict=True):
        nn.init.constant_(linear.weight, weight)
    chain = trace(nn.Sequential(*maps, Inject(), Activate("identity")))
    chain = chain.rebind([t.detach() for t in chain.tensors])
    rate = float(Fraction(1e305) * Fraction(1e-307))
    z, exact = one(1 / (1 - rate)), 1.7e-14 / (1 - rate)
    for proof in (ConcaveGradientBound, SignedGradientBound):
        g, _, bound = proof(chain, one(1.0), (z, z)).finish(z, one(exact), one(1.7e-14))
        assert abs(g.item() - exact) / abs(g.item()) <= bound.item()


def test_slopes_of_a_value_above_the_supremum_are_none() -> None:
    """1 - s is negative there, and no slope is: the gradient of a saturated cell is not smaller than what came in."""
    chain, b = chain_of(25.0, "one_minus_exp"), one(10.0)
    lower, z, upper = one(1 - 1e-12), one(1 + 1e-12), one(1 + 3e-12)
    g, _, bound = ConcaveGradientBound(chain, b, (lower, upper)).finish(z, one(1.0), one(1.0))
    # The exact slope is at most exp(-35).
    assert abs(g.item() - 1) <= bound.item() * g.item()
    assert g.item() >= 1


@pytest.mark.parametrize("step_dtype", [torch.float32, torch.bfloat16])
def test_coarse_steps_of_a_fine_layer_bound_nothing_of_it(step_dtype: torch.dtype) -> None:
    layer = PositiveConcaveLinear(6, 9, "log1p", dtype=torch.float64)
    x = torch.randn(5, 6, dtype=torch.float64)
    fine, coarse = (Auto(tol=1e-9, step_dtype=p, max_steps=500) for p in (None, step_dtype))
    layer.solver = fine
    exact = layer.solve(x)
    layer.solver = coarse
    found = layer.solve(x)
    assert found.certified
    assert (found.lower <= exact.upper).all()
    assert (exact.lower <= found.upper).all()
