import pytest
import torch
from hypothesis import given

from perron.affine import Refusal
from perron.cells import Inject, trace
from perron.enclosure import Evaluated, prove, relative_error_bound, round_outward, verify
from perron.nn import PositiveConcaveConv2d
from perron.solvers import Picard
from problems import SUBLINEAR, dense_layer, dense_problems, long_picard, truth

RELIABLE = 1e-12


@given(dense_problems())
def test_chord_and_ray_bounds_are_theorems(problem) -> None:
    """z_k <= z* <= p + (z - p)/(1 - r), and what `prove` makes of them, at every k."""
    layer, b = problem
    chain, b = trace(layer.cell).to(torch.float64), b.double()
    exact = truth(layer, b)
    with torch.no_grad():
        rounding = chain.rounding(torch.float64)
        zero = z = chain(torch.zeros_like(b), b)
        p = torch.zeros_like(b)
        for _ in range(12):
            s = chain(z, b)
            ratio = torch.where(s > z, (s - z) / (z - p), 0.0).nan_to_num(posinf=torch.inf).amax(1, keepdim=True)
            assert (z <= exact * (1 + RELIABLE)).all()
            q = torch.where(ratio < 1, p + (z - p) / (1 - ratio), torch.inf)
            assert (q >= exact * (1 - RELIABLE)).all()
            q = q.clamp_max(1e6 * exact.max())
            found = prove(Evaluated(zero, z, s, q, chain(q, b)), rounding)
            inside = (found.lower <= exact * (1 + RELIABLE)) & (exact * (1 - RELIABLE) <= found.upper)
            assert inside[found.proven].all()
            p, z = z, s


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("activation", SUBLINEAR)
def test_any_candidate_is_verified(activation: str, dtype: torch.dtype) -> None:
    layer = dense_layer(torch.rand(20, 20) / 15, activation)
    b = torch.rand(6, 20) + 0.05
    exact = truth(layer, b)
    found = verify(layer, exact.to(dtype), b)
    assert found.proven.all()
    assert found.precision == torch.float64
    assert ((found.lower <= exact) & (exact <= found.upper)).all()
    width = ((found.upper - found.lower) / found.lower).amax()
    assert width <= 400 * torch.finfo(dtype).eps + 1e-10


def test_wrong_candidates_are_not_proven_narrowly() -> None:
    layer = dense_layer(torch.rand(8, 8) / 2, "tanh")
    b = torch.rand(3, 8) + 0.1
    exact = truth(layer, b)
    candidate = exact.clone()
    candidate[1] *= 0.5
    candidate[2] = torch.nan
    found = verify(layer, candidate, b)
    assert found.proven[0]
    assert not found.proven[2]
    if found.proven[1]:
        assert ((found.lower[1] <= exact[1]) & (exact[1] <= found.upper[1])).all()


def test_float32_proof_accounts_for_float32_rounding() -> None:
    layer = dense_layer(torch.rand(50, 50) / 40, "tanh")
    b = torch.rand(5, 50) + 0.1
    exact = truth(layer, b)
    found = verify(layer, exact.float(), b, dtype=torch.float32)
    assert found.proven.all()
    assert ((found.lower.double() <= exact) & (exact <= found.upper.double())).all()
    with pytest.raises(Refusal, match="float64"):
        verify(layer, exact, b, dtype=torch.bfloat16)
    conv = PositiveConcaveConv2d(2, 2, injection="given")
    image = torch.rand(1, 2, 4, 4) + 0.1
    exact_image = long_picard(trace(conv.cell), image)
    found = verify(conv, exact_image.float(), image, dtype=torch.float32)
    assert found.proven.all(), "an unfolded convolution is a plain sum in float32 too"
    assert ((found.lower.double() <= exact_image) & (exact_image <= found.upper.double())).all()
    grouped = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 3, padding=1, groups=2, bias=False), Inject(), torch.nn.Tanh())
    with torch.no_grad():
        grouped[0].weight.abs_()
    with pytest.raises(Refusal, match="float64"):
        verify(grouped, image, image, dtype=torch.float32)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with pytest.raises(Refusal, match="cannot be bounded"):
            verify(layer, exact, b, dtype=torch.float32)
    finally:
        torch.set_float32_matmul_precision(before)


def test_refusals_and_shapes() -> None:
    b = torch.rand(2, 3) + 0.1
    with pytest.raises(Refusal, match="nonnegative"):
        verify(dense_layer(-torch.eye(3), "tanh"), b, b)
    with pytest.raises(ValueError, match="shape"):
        verify(dense_layer(torch.eye(3), "tanh"), b[:1], b)
    with pytest.raises(ValueError, match="positive"):
        verify(dense_layer(torch.eye(3), "tanh"), b, b * 0)


@pytest.mark.parametrize("width", [3, 100, 1000])
def test_rounding_is_accounted_for_in_closed_form(width: int) -> None:
    """z = w sum(z) + b with equal entries: every coordinate rounds the same way, so noise alone could fake a proof."""
    w = float(torch.tensor(0.9 / width))
    layer = dense_layer(torch.full((width, width), w), "identity")
    b = torch.rand(300, 1).add(0.5).expand(300, width).contiguous()
    exact = b.double() / (1 - width * w)
    chain = trace(layer.cell)
    rounding = chain.rounding(torch.float32)
    for ulps in range(-8, 9):
        point = (exact * (1 + ulps * torch.finfo(torch.float32).eps)).float()
        with torch.no_grad():
            zero, value = chain(torch.zeros_like(b), b), chain(point, b)
        found = prove(Evaluated(zero, point, value, point, value), rounding)
        inside = (found.lower.double() <= exact) & (exact <= found.upper.double())
        assert inside[found.proven].all()


def test_outward_rounding_and_error_bound() -> None:
    lower = torch.rand(4, 100, dtype=torch.float64)
    upper = lower * (1 + 1e-12)
    low, high = round_outward(lower, upper, torch.float32)
    assert (low.double() <= lower).all()
    assert (high.double() >= upper).all()
    bound = relative_error_bound(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.9, 2.0]]), torch.tensor([[1.0, 2.1]]))
    assert float(bound) == pytest.approx(0.1 / 0.9, rel=1e-5)
    assert relative_error_bound(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, 1)) == 0
    assert relative_error_bound(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1)).isinf()


def test_a_priori_contraction_in_the_thompson_metric() -> None:
    """Theory section 5: on [f(0), u] the factor is at most 1 - min f(0)/f(u)."""
    layer = dense_layer(torch.rand(10, 10), "sigmoid")
    b = torch.rand(1, 10).expand(50, 10)
    chain = trace(layer.cell)
    with torch.no_grad():
        low, high = chain(torch.zeros_like(b), b), chain(torch.ones_like(b), b)
        x, y = (low + (high - low) * torch.rand(50, 10) for _ in range(2))
        factor = 1 - (low / high).amin()
        distance = lambda a, c: (a.log() - c.log()).abs().amax(1)
        assert (distance(chain(x, b), chain(y, b)) <= factor * distance(x, y) + 1e-6).all()


def test_monotone_and_concave_in_the_injection() -> None:
    """Theory section 7: interval propagation by two solves is exact."""
    layer = dense_layer(torch.rand(12, 12) / 8, "arctan", solver=Picard(tol=1e-10))
    low = torch.rand(30, 12, dtype=torch.float64).float() + 0.05
    high = low + torch.rand(30, 12)
    z = [truth(layer, b) for b in (low, high, (low.double() + high.double()) / 2)]
    assert (z[0] <= z[1]).all()
    assert (z[2] >= (z[0] + z[1]) / 2 - 1e-12).all()
