from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from perron import enclose
from perron.cells import Inject, Refusal, trace
from perron.nn import PositiveConcaveConv2d
from perron.solvers import Anderson, Auto, Broyden, FixedPointProblem, Newton, Picard
from perron.theory import Contracting, PositiveConcave
from perron.theory.enclosure import Evaluated, prove, relative_error_bound, round_outward
from perron.verify import Interval, propagate
from problems import SUBLINEAR, dense_layer, dense_problems, long_picard, truth

RELIABLE = 1e-12


def affine_fixed_point(weight: torch.Tensor, b: torch.Tensor) -> list[Fraction]:
    """z = W z + b for a float64 W of size 1 or 2, exactly."""
    w = [[Fraction(x) for x in row] for row in weight.tolist()]
    c = [Fraction(x) for x in b.tolist()]
    if len(c) == 1:
        return [c[0] / (1 - w[0][0])]
    determinant = (1 - w[0][0]) * (1 - w[1][1]) - w[0][1] * w[1][0]
    return [
        ((1 - w[1][1]) * c[0] + w[0][1] * c[1]) / determinant,
        (w[1][0] * c[0] + (1 - w[0][0]) * c[1]) / determinant,
    ]


AFFINE = [
    ([[0.9]], [1.0]),
    ([[0.5]], [1.0]),
    ([[0.0, 0.75], [1.25, 0.0]], [0.25, 4.0]),
    ([[0.5, 0.25], [0.125, 0.75]], [1.0, 1e-3]),
    ([[1 - 2.0**-20]], [3.0]),
    ([[0.9]], [1e-290]),
    ([[0.9]], [1e290]),
]


@pytest.mark.parametrize("below", [0.0, 1e-9, 0.3, 1 - 1e-9, 1.0, 1.0001])
@pytest.mark.parametrize("above", [0.6, 0.999, 1.0, 1.0001, 1.5, 1e3, 1e15, 1e16])
@pytest.mark.parametrize("case", range(len(AFFINE)))
def test_all_bounds_are_attained_by_affine_maps(case: int, below: float, above: float) -> None:
    """From p = below z* and q = above z*: a raised q is z* itself, but for rounding, and so is the chord to a q above it."""
    weight, b = (torch.tensor(t, dtype=torch.float64) for t in AFFINE[case])
    exact = affine_fixed_point(weight, b)
    z = torch.tensor([[float(x) for x in exact]], dtype=torch.float64)
    p, q = below * z, max(above, below) * z
    if float(q.max()) > 1e306:
        return
    chain = trace(dense_layer(weight, "relu").cell)
    with torch.no_grad():
        values = Evaluated(
            at_zero=b.unsqueeze(0), p=p, at_p=chain(p, b.unsqueeze(0)), q=q, at_q=chain(q, b.unsqueeze(0))
        )
    found = prove(values, chain.rounding(torch.float64))
    assert found.proven.item()
    # What f rounds is amplified by z*/f(0), and counts with how far the points are away.
    noise = 1e4 * 2.0**-52 * float((z / b).max()) * max(1.0, above)
    raised = q < z
    expected = torch.where(raised, z, values.at_q)[0].tolist()
    for low, high, fixed, best in zip(found.lower[0].tolist(), found.upper[0].tolist(), exact, expected, strict=True):
        assert Fraction(low) <= fixed <= Fraction(high)
        assert high <= best * (1 + noise + 1e-12)
        assert low >= float(fixed) * (1 - min(noise + 1e-12, 1.0)) or above <= 1


@pytest.mark.parametrize("candidate", [5.0, 9.5, 0.0, 1e-300, 1e-16, 1e15, 1e16, 1e18, 1e100, 5e-324])
def test_candidates_far_from_the_solution(candidate: float) -> None:
    """z = 0.9 z + 1 is 10."""
    one = torch.ones(1, 1, dtype=torch.float64)
    weight = torch.full((1, 1), 0.9, dtype=torch.float64)
    found = enclose(dense_layer(weight, "relu"), candidate * one, one)
    exact = affine_fixed_point(weight, one[0])[0]
    assert not found.proven.item() or Fraction(found.lower.item()) <= exact <= Fraction(found.upper.item())


def test_a_chord_whose_ratio_is_below_the_range() -> None:
    layer = dense_layer(torch.tensor([[0.3741804957389832]], dtype=torch.float64), "relu")
    b = torch.tensor([[5.029480166029075e-40]], dtype=torch.float64)
    exact = affine_fixed_point(layer.cell[0].weight, b[0])[0]
    chain, zero = trace(layer.cell), torch.zeros_like(b)
    with torch.no_grad():
        for point in torch.logspace(281, 285, 60, dtype=torch.float64):
            q = point.expand(1, 1)
            found = prove(Evaluated(at_zero=b, p=zero, at_p=b, q=q, at_q=chain(q, b)), chain.rounding(torch.float64))
            assert found.proven.item()
            assert Fraction(found.lower.item()) <= exact <= Fraction(found.upper.item())


NEARLY_CRITICAL = torch.tensor(
    [[0.017839438860143757, 0.7403883453127966], [1.294493906370435, 0.02398573730736727]], dtype=torch.float64
)


@pytest.mark.parametrize("make", [Auto, Picard, Anderson, Broyden, Newton])
def test_a_nearly_critical_map(make) -> None:
    """Of spectral radius 0.99991."""
    b = torch.tensor([[0.22675055177677106, 0.36425101756000655]], dtype=torch.float64)
    exact = affine_fixed_point(NEARLY_CRITICAL, b[0])
    for steps in (5, 10, 40, 200):
        solution = dense_layer(NEARLY_CRITICAL, "relu", solver=make(max_steps=steps, on_failure="ignore")).solve(b)
        if solution.proven.item():
            for low, high, fixed in zip(solution.lower[0].tolist(), solution.upper[0].tolist(), exact, strict=True):
                assert Fraction(low) <= fixed <= Fraction(high)


@given(st.floats(0.3, 0.7), st.floats(-12, 3))
def test_loose_tolerances_in_few_steps(weight: float, exponent: float) -> None:
    layer = dense_layer(torch.full((1, 1), weight, dtype=torch.float64), "tanh")
    b = torch.full((1, 1), 10.0**exponent, dtype=torch.float64)
    exact = truth(layer, b)
    for tol in (0.3, 0.03):
        layer.solver = Picard(tol=tol, steps=5, on_failure="ignore")
        solution = layer.solve(b)
        if solution.proven.item():
            assert solution.lower <= exact * (1 + RELIABLE)
            assert exact <= solution.upper * (1 + RELIABLE)
            assert (solution.value - exact).abs() / exact <= solution.error_bound + RELIABLE


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
            found = prove(Evaluated(at_zero=zero, p=z, at_p=s, q=q, at_q=chain(q, b)), rounding)
            inside = (found.lower <= exact * (1 + RELIABLE)) & (exact * (1 - RELIABLE) <= found.upper)
            assert inside[found.proven].all()
            p, z = z, s


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("activation", SUBLINEAR)
def test_any_candidate_is_verified(activation: str, dtype: torch.dtype) -> None:
    layer = dense_layer(torch.rand(20, 20) / 15, activation)
    b = torch.rand(6, 20) + 0.05
    exact = truth(layer, b)
    found = enclose(layer, exact.to(dtype), b)
    assert found.proven.all()
    assert found.proof_dtype == torch.float64
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
    found = enclose(layer, candidate, b)
    assert found.proven[0]
    assert not found.proven[2]
    if found.proven[1]:
        assert ((found.lower[1] <= exact[1]) & (exact[1] <= found.upper[1])).all()


def test_float32_proof_accounts_for_float32_rounding() -> None:
    layer = dense_layer(torch.rand(50, 50) / 40, "tanh")
    b = torch.rand(5, 50) + 0.1
    exact = truth(layer, b)
    found = enclose(layer, exact.float(), b, proof_dtype=torch.float32)
    assert found.proven.all()
    assert ((found.lower.double() <= exact) & (exact <= found.upper.double())).all()
    with pytest.raises(Refusal, match="float64"):
        enclose(layer, exact, b, proof_dtype=torch.bfloat16)
    conv = PositiveConcaveConv2d(2, 2, injection="given")
    image = torch.rand(1, 2, 4, 4) + 0.1
    exact_image = long_picard(trace(conv.cell), image)
    found = enclose(conv, exact_image.float(), image, proof_dtype=torch.float32)
    assert found.proven.all(), "an unfolded convolution is a plain sum in float32 too"
    assert ((found.lower.double() <= exact_image) & (exact_image <= found.upper.double())).all()
    grouped = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 3, padding=1, groups=2, bias=False), Inject(), torch.nn.Tanh())
    with torch.no_grad():
        grouped[0].weight.abs_()
    with pytest.raises(Refusal, match="float64"):
        enclose(grouped, image, image, proof_dtype=torch.float32)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with pytest.raises(Refusal, match="cannot be bounded"):
            enclose(layer, exact, b, proof_dtype=torch.float32)
    finally:
        torch.set_float32_matmul_precision(before)


def test_refusals_and_shapes() -> None:
    b = torch.rand(2, 3) + 0.1
    with pytest.raises(Refusal, match="nonnegative"):
        enclose(dense_layer(-torch.eye(3), "tanh"), b, b)
    with pytest.raises(ValueError, match="shape"):
        enclose(dense_layer(torch.eye(3), "tanh"), b[:1], b)
    with pytest.raises(ValueError, match="positive"):
        enclose(dense_layer(torch.eye(3), "tanh"), b, b * 0)


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
        found = prove(Evaluated(at_zero=zero, p=point, at_p=value, q=point, at_q=value), rounding)
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
    tiny = torch.tensor([[1e-310]], dtype=torch.float64)
    assert relative_error_bound(tiny, tiny, 2 * tiny) == pytest.approx(1, rel=1e-12)
    for value in (torch.nan, torch.inf):
        assert relative_error_bound(value * tiny, tiny, 2 * tiny).isinf()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_bounds_beyond_the_range_of_the_layer_stay_on_their_side(dtype: torch.dtype) -> None:
    huge = torch.tensor([[1e300]], dtype=torch.float64)
    for signed in (False, True):
        low, high = round_outward(huge, 2 * huge, dtype, signed=signed)
        assert low.item() == torch.finfo(dtype).max
        assert high.item() == torch.inf
    low, high = round_outward(-2 * huge, -huge, dtype, signed=True)
    assert low.item() == -torch.inf
    assert high.item() == -torch.finfo(dtype).max


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


def test_what_a_precision_does_not_hold_is_not_verified_in_it() -> None:
    # z* = [2e-8, 1e38]; in float32 the weight is 0.
    layer = dense_layer(torch.tensor([[0.0, 1e-46], [0.0, 0.0]], dtype=torch.float64), "relu")
    b = torch.tensor([[1e-8, 1e38]], dtype=torch.float64)
    for injection in (b, b.float()):
        with pytest.raises(Refusal, match=r"float32 does not hold numbers of .*float64; use float64"):
            enclose(layer, b, injection, proof_dtype=torch.float32)
    with pytest.raises(Refusal, match="does not hold"):
        enclose(dense_layer(torch.eye(2) / 2, "relu"), b, b, proof_dtype=torch.float32)
    found = enclose(layer, b, b)
    assert found.proven.all()
    assert float(found.lower[0, 0]) > 1.9999e-8


@pytest.fixture
def flushing():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize(
    ("dtype", "weight", "b"), [(torch.float32, 1e-40, [1e-8, 1e32]), (torch.float64, 1e-310, [1e-8, 1e302])]
)
def test_nothing_is_proven_while_subnormal_numbers_count_as_zero(flushing, dtype, weight, b) -> None:
    matrix = torch.zeros(2, 2, dtype=dtype)
    torch.set_flush_denormal(False)
    matrix[0, 1] = weight
    assert float(matrix[0, 1]) > 0
    torch.set_flush_denormal(True)
    # z* = [2e-8, ...], and what is computed is [1e-8, ...].
    layer, x = dense_layer(matrix, "relu"), torch.tensor([b], dtype=dtype)
    assert "subnormal" in layer.certificate().refusal
    with pytest.raises(Refusal, match="subnormal"):
        enclose(layer, x, x)
    with pytest.raises(Refusal, match="subnormal"):
        propagate(torch.nn.ReLU(), Interval(x, x))
    chain = trace(layer.cell)
    for solver in (Auto(), Picard(), Anderson(), Newton(), Broyden()):
        layer.solver = solver
        assert not layer.solve(x).certified
        for posed in (FixedPointProblem(map=chain, injection=x, theory=t) for t in (PositiveConcave(), Contracting())):
            found = solver.solve(posed)
            assert not found.certified
            assert found.converged.all()
    torch.set_flush_denormal(False)
    assert layer.solve(x).certified


def test_no_adjoint_is_proven_while_subnormal_numbers_count_as_zero(flushing) -> None:
    torch.set_flush_denormal(False)
    layer, x = dense_layer(torch.eye(2) / 2, "tanh"), torch.ones(1, 2, requires_grad=True)
    y = layer(x)
    torch.set_flush_denormal(True)
    y.sum().backward()
    assert layer.last_solution.certified
    assert not layer.last_solution.adjoint.certified
