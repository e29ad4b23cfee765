"""Cells that contract: the factors, the enclosures they give, and what must be refused."""

import math
from dataclasses import replace
from fractions import Fraction

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from perron import certify
from perron.activations import get_activation
from perron.cells import Activate, ActivationStep, Chain, DenseStep, Inject, InjectStep, Normalize, Refusal, trace
from perron.nn import Equilibrium, SubhomogeneousConv2d, SubhomogeneousLinear
from perron.solvers import Anderson, Auto, Broyden, FixedPointProblem, Newton, Picard
from perron.theory import Contracting, activation_degree, degree, gain
from perron.theory.contracting import contraction
from perron.theory.contraction import _ball, sensitivity
from problems import long_picard

TWO = torch.tensor([[10.0, -10.0], [-10.0, 10.0]], dtype=torch.float64)
SOLVERS = [Auto(), Picard(), Anderson(), Broyden(), Newton()]


def layer(weight: Tensor, *modules: nn.Module, **options) -> Equilibrium:
    linear = nn.Linear(*weight.shape, bias=False, dtype=weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
    return Equilibrium(nn.Sequential(linear, *modules), **options)


# ------------------------------------------------------------------------------------------------------------- degrees


@pytest.mark.parametrize(
    ("name", "expected"), [("tanh+1.2", 0.99913), ("tanh+1.3", 0.7912), ("tanh+1.603", 0.49920), ("tanh+1.1", 1.41)]
)
def test_degrees_on_the_whole_line(name: str, expected: float) -> None:
    """The table of the theory text."""
    found = activation_degree(name, signed=True)
    assert found == pytest.approx(expected, rel=2e-3 if expected > 1 else 2e-4)


@pytest.mark.parametrize(
    "name",
    [
        "tanh+1.2",
        "softsign+0.3",
        "sigmoid",
        "sigmoid^0.5",
        "(tanh+1.2)^0.5",
        "erf+1",
        "arctan+2",
        "one_minus_exp+0.1",
        "log1p+1",
        "relu6+2",
    ],
)
def test_degrees_are_upper_bounds_and_sharp(name: str) -> None:
    from test_activations import REFERENCE

    base, shift, power = _parts(name)
    values = []
    for k in range(-60, 60):
        v = mpmath.mpf(10) ** (mpmath.mpf(k) / 10)
        f = lambda x: (REFERENCE[base](x) + shift) ** power
        values.append(float(v * mpmath.diff(f, v) / f(v)) if abs(v - 6) > 0.1 or base != "relu6" else 0.0)
    bound = activation_degree(name)
    assert bound >= max(values)
    # Unbounded ones are only bounded by 1 far out.
    assert bound <= max(values) * 1.05 or base == "log1p" or base == "relu6"


def _parts(name: str) -> tuple[str, float, float]:
    name, _, power = name.partition("^")
    base, _, shift = name.strip("()").partition("+")
    return base, float(shift or 0), float(power or 1)


def test_degree_needs_nonnegative_weights_and_a_positive_cell() -> None:
    def chain(weight: Tensor, *modules: nn.Module) -> Chain:
        return trace(layer(weight, *modules).cell)

    good = torch.rand(3, 3)
    assert degree(chain(good, Activate("tanh+1.2"), Inject())) < 0.25
    assert degree(chain(good, Activate("tanh+1.2"), Inject(), Normalize())) == 2 * activation_degree("tanh+1.2")
    for modules in ([Activate("tanh"), Inject()], [Activate("tanh"), Inject(), Normalize()]):
        with pytest.raises(ValueError, match="shift"):
            degree(chain(good, *modules))
    with pytest.raises(ValueError, match="nonnegative"):
        degree(chain(-good, Activate("tanh+1.2"), Inject()))
    with pytest.raises(ValueError, match="last step"):
        degree(chain(good, Activate("tanh+1.2"), Normalize(), Inject()))


@given(st.integers(0, 10_000), st.sampled_from([1.0, 2.0, 3.0, math.inf]), st.sampled_from([None, 1]))
def test_normalised_cells_contract_in_thompsons_metric(seed: int, p: float, dim: int | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(1, 12, (), generator=generator))
    scale = 10 ** (4 * torch.rand((), generator=generator) - 2)
    cell = layer(
        scale * torch.rand(n, n, generator=generator, dtype=torch.float64),
        Activate("tanh+1.2"),
        Inject(),
        Normalize(p, dim),
    ).cell
    chain = trace(cell)
    b = torch.rand(1, n, generator=generator, dtype=torch.float64)
    x, y = (10 ** (6 * torch.rand(2, 1, n, generator=generator, dtype=torch.float64) - 3)).unbind()
    before = float((x.log() - y.log()).abs().max())
    after = float((chain(x, b).log() - chain(y, b).log()).abs().max())
    assert after <= degree(chain) * before + 1e-12


# -------------------------------------------------------------------------------------------------------- certificates


def test_the_counterexamples_have_two_fixed_points_and_no_certificate() -> None:
    """Subhomogeneous of degree below 1, and yet F(z) = tanh(W z) + 1.2 maps (2.2, 0.2) and (0.2, 2.2) to themselves."""
    assert activation_degree("tanh+1.2", signed=True) < 1
    plain = layer(TWO, Activate("tanh+1.2"), Inject())
    normal = layer(TWO, Activate("tanh+1.603"), Inject(), Normalize())
    for cell, points in ((plain, (2.2, 0.2)), (normal, (1.0, 0.2317))):
        certificate = cell.certificate()
        assert not certificate
        assert "two fixed points" in str(certificate.refusal)
        b = torch.zeros(1, 2, dtype=torch.float64)
        for point in (torch.tensor([points]), torch.tensor([points[::-1]])):
            z = point.double()
            for solver in SOLVERS:
                cell.solver = solver
                solution = cell.solve(b, z0=z)
                assert not solution.certified
                assert not solution.proven.any()
                assert solution.stopping == "residual"
                assert solution.error_bound.isinf().all()
            cell.solver = Picard(tol=1e-10)
            torch.testing.assert_close(cell.solve(b, z0=z).value, z, rtol=1e-3, atol=1e-3)


@given(st.integers(0, 10_000))
def test_gain_bounds_the_lipschitz_constant(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(1, 12, (), generator=generator))
    weight = torch.randn(n, n, generator=generator, dtype=torch.float64)
    for name in ("tanh", "sigmoid", "relu", "(tanh+1.2)^0.5"):
        chain = trace(layer(weight, Activate(name), Inject()).cell)
        b = torch.zeros(1, n, dtype=torch.float64)
        x, y = 3 * torch.randn(2, 1, n, generator=generator, dtype=torch.float64)
        assert float((chain(x, b) - chain(y, b)).abs().max()) <= gain(chain) * float((x - y).abs().max()) + 1e-12


def test_certificates_say_what_was_checked() -> None:
    certificate = SubhomogeneousLinear(3, 5, normalize=2).certificate()
    assert certificate.kind == "subhomogeneous"
    assert certificate.rate == pytest.approx(2 * activation_degree("tanh+1.2"))
    assert SubhomogeneousLinear(3, 5).certificate().kind == "positive concave"
    bounded = SubhomogeneousLinear(3, 5, weights="signed_bounded").certificate()
    assert bounded.kind == "bounded gain"
    assert bounded.metric == "sup norm"
    assert "sup norm" in str(bounded)
    signed = SubhomogeneousLinear(3, 5, weights="signed", initial_radius=3.0).certificate()
    assert not signed
    assert "signed_bounded" in str(signed.refusal)
    # Too small a shift: the degree of the normalised cell is not below 1.
    weak = SubhomogeneousLinear(3, 5, "tanh+0.01", normalize=2).certificate()
    assert not weak
    assert "larger shift" in str(weak.refusal)
    assert not certify(nn.Sequential(SubhomogeneousLinear(3, 5, weights="signed", initial_radius=3.0)))


def test_bounded_rows_hold_through_training() -> None:
    torch.manual_seed(0)
    cell = SubhomogeneousLinear(4, 6, "(tanh+1.2)^0.5", weights="signed_bounded")
    optimizer = torch.optim.SGD(cell.parameters(), lr=100.0)
    for _ in range(3):
        optimizer.zero_grad()
        cell(torch.randn(8, 4)).square().sum().backward()
        optimizer.step()
        assert cell.certificate()
        assert cell.solve(torch.randn(8, 4)).certified


# ---------------------------------------------------------------------------------------------------------- enclosures


@st.composite
def cells(draw: st.DrawFn) -> tuple[Equilibrium, Tensor]:
    """Signed or nonnegative, normalised or not, widths 1 to 20, in both precisions."""
    n = draw(st.integers(1, 20))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    normalize = draw(st.sampled_from([None, 1.0, 2.0, math.inf]))
    signed = normalize is None and draw(st.booleans())
    scale = draw(st.sampled_from([0.0, 0.3, 0.9, 2.0, 10.0]))
    weight = torch.rand(n, n, generator=generator, dtype=dtype)
    if signed:
        weight = weight - draw(st.sampled_from([0.1, 0.5]))
    weight = weight / weight.abs().sum(1).max().clamp_min(1e-30) * scale
    name = draw(
        st.sampled_from(["tanh+1.2", "sigmoid", "(tanh+1.2)^0.5", "softsign+1.1", *(["tanh"] if signed else [])])
    )
    modules = [Activate(name), Inject()] if normalize is not None or draw(st.booleans()) else [Inject(), Activate(name)]
    if normalize is not None:
        modules.append(Normalize(normalize))
    b = 10 ** (3 * torch.rand(4, n, generator=generator, dtype=dtype) - 2)
    return layer(weight, *modules), b


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_enclosures_hold(solver) -> None:
    @settings(max_examples=30)
    @given(cells())
    def check(problem) -> None:
        cell, b = problem
        cell.solver = solver
        solution = cell.solve(b)
        exact = long_picard(trace(cell.cell), b)
        settled = (trace(cell.cell).to(torch.float64)(exact, b.double()) - exact).abs().amax(1) < 1e-13
        held = solution.proven & settled
        if solution.lower is not None:
            assert (solution.lower.double() <= exact + 1e-12)[held].all()
            assert (exact - 1e-12 <= solution.upper.double())[held].all()
        gap = (solution.value.double() - exact).abs()
        positive = solution.lower is not None and bool((solution.lower > 0).all())
        error = (gap / exact.abs()).amax(1) if positive else gap.amax(1) / exact.abs().amax(1).clamp_min(1e-300)
        assert (error <= solution.error_bound * (1 + 1e-9) + 1e-12)[held].all()
        if cell.certificate():
            assert solution.certified
            assert solution.converged.all()

    check()


def test_what_is_proven_has_no_second_fixed_point() -> None:
    """Signed maps, some of them proven: many starts, one limit."""
    proven = refused = 0
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        n = 2 + seed % 5
        scale = 3 * float(torch.rand((), generator=generator))
        weight = scale * torch.randn(n, n, generator=generator, dtype=torch.float64)
        cell = layer(
            weight, Activate("tanh+1.2"), Inject(), solver=Picard(tol=1e-8, max_steps=400, on_failure="ignore")
        )
        b = torch.rand(1, n, generator=generator, dtype=torch.float64)
        solution = cell.solve(b)
        if not solution.certified:
            refused += 1
            continue
        proven += 1
        starts = 4 * torch.rand(60, n, generator=generator, dtype=torch.float64)
        found = long_picard_from(trace(cell.cell), b.expand(60, n), starts)
        assert float((found - solution.value).abs().max()) < 1e-6 + 4 * float(solution.error_bound)
    assert proven > 50
    assert refused > 50


def long_picard_from(chain: Chain, b: Tensor, z: Tensor) -> Tensor:
    for _ in range(3000):
        before, z = z, (0.5 * z + 0.5 * chain(z, b)).detach()
        # Where 3,000 steps come near at all, what is left of the way is far below 1e-6.
        if torch.allclose(z, before, rtol=0, atol=1e-14):
            break
    return z


def test_the_weighted_norm_proves_more_than_row_sums() -> None:
    weight = torch.tensor([[0.1, 12.0], [-0.1, 0.1]], dtype=torch.float64)
    cell = layer(weight, Activate("tanh"), Inject())
    assert not cell.certificate()
    assert cell.solve(torch.rand(3, 2, dtype=torch.float64)).certified


# --------------------------------------------------------------------------------------------------------- hard inputs


@pytest.mark.parametrize("weights", ["nonnegative", "signed", "signed_bounded"])
def test_bad_samples_leave_their_neighbours_alone(weights) -> None:
    torch.manual_seed(1)
    options = {} if weights != "nonnegative" else {"normalize": math.inf}
    cell = SubhomogeneousLinear(5, 5, weights=weights, injection="given", initial_radius=0.3, **options)
    cell.solver = Auto(on_failure="ignore")
    b = torch.rand(4, 5)
    alone = cell.solve(b)
    b[1, 2], b[3, 0] = math.nan, math.inf
    together = cell.solve(b)
    for k in (0, 2):
        torch.testing.assert_close(together.value[k], alone.value[k], rtol=1e-6, atol=1e-6)
        assert together.proven[k] == alone.proven[k]
    for k in (1, 3):
        assert not together.converged[k]
        assert not together.proven[k]
        assert together.value[k].isnan().all()


def test_a_negative_injection_is_not_certified_by_the_degree() -> None:
    cell = SubhomogeneousLinear(3, 3, normalize=2, injection="given", solver=Auto(on_failure="ignore"))
    b = torch.rand(3, 3)
    b[1, 0] = -0.1
    assert cell.solve(b).proven.tolist() == [True, False, True]


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e4, 1e30])
def test_extreme_weights(scale: float) -> None:
    for modules in ([Activate("tanh+1.2"), Inject(), Normalize()], [Activate("tanh+1.2"), Inject()]):
        cell = layer(torch.rand(4, 4) * scale, *modules)
        solution = cell.solve(torch.rand(3, 4))
        assert solution.certified
        assert (solution.error_bound <= 1e-4).all()
    signed = layer(torch.randn(4, 4) * scale, Activate("tanh+1.2"), Inject(), solver=Auto(on_failure="ignore"))
    solution = signed.solve(torch.rand(3, 4))
    assert solution.certified == (scale < 1)


def test_shapes_precisions_and_layouts() -> None:
    cell = SubhomogeneousLinear(4, 6, normalize=2)
    assert cell(torch.randn(0, 4)).shape == (0, 6)
    assert cell.solve(torch.randn(0, 4)).certified
    x = torch.randn(8, 4)
    strided = torch.randn(8, 8)[:, ::2].copy_(x)
    torch.testing.assert_close(cell(strided), cell(x))
    with pytest.raises(ValueError, match="features"):
        cell(torch.randn(3, 5))
    for dtype in (torch.float16, torch.bfloat16):
        half = SubhomogeneousLinear(4, 6, normalize=2, dtype=dtype)
        assert half(x.to(dtype)).dtype == dtype
        assert half.last_solution.certified
    image = SubhomogeneousConv2d(2, 3, normalize=math.inf, normalize_dim=1)
    assert image.solve(torch.randn(2, 2, 5, 4)).certified
    assert SubhomogeneousConv2d(2, 3, weights="signed_bounded").solve(torch.randn(2, 2, 5, 4)).certified
    with pytest.raises(ValueError, match="signed"):
        SubhomogeneousLinear(2, 2, normalize=2, weights="signed_bounded")
    with pytest.raises(ValueError, match="weights"):
        SubhomogeneousLinear(2, 2, weights="positive")


@pytest.mark.parametrize(
    "options", [{"normalize": 2.0}, {"weights": "signed", "initial_radius": 0.4}, {"weights": "signed_bounded"}, {}]
)
def test_gradients_are_those_of_finite_differences_and_of_the_unrolled_loop(options) -> None:
    torch.manual_seed(0)
    cell = SubhomogeneousLinear(3, 4, dtype=torch.float64, solver=Auto(tol=1e-12, max_steps=500), **options)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cell, (x,), eps=1e-6, atol=1e-7)
    b, chain = cell.injected(x), trace(cell.cell)
    z = torch.ones_like(b)
    for _ in range(200):
        z = chain(z, b)
    v = torch.randn_like(z)
    parameters = [x, *cell.parameters()]
    for ours, unrolled in zip(
        torch.autograd.grad(cell(x), parameters, v), torch.autograd.grad(z, parameters, v), strict=True
    ):
        torch.testing.assert_close(ours, unrolled, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    "name", ["relu", "softsign", "relu6", "tanh", "sigmoid", "arctan", "identity", "one_minus_exp"]
)
@pytest.mark.parametrize("scale", [0.9, 1.3])
def test_gradients_where_the_state_or_its_argument_is_negative(name: str, scale: float) -> None:
    """The slope of an activation follows from its value on the orthant only."""
    torch.manual_seed(3)
    weight = torch.randn(4, 4, dtype=torch.float64)
    weight *= scale / weight.abs().sum(1).max() if name != "one_minus_exp" else 0.01
    cell = layer(weight, Inject(), Activate(name), solver=Auto(tol=1e-12, max_steps=2000, on_failure="ignore"))
    b = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cell, (b,), eps=1e-6, atol=1e-6)


def test_a_map_that_diverges_says_so() -> None:
    cell = layer(
        torch.tensor([[3.0, -0.1], [0.0, 3.0]]), Inject(), Activate("one_minus_exp"), solver=Auto(on_failure="ignore")
    )
    solution = cell.solve(torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
    assert solution.converged.tolist() == [False, True]
    assert not solution.proven.any()


@settings(max_examples=60)
@given(cells(), st.sampled_from([1e-2, 1e-4, 1e-8]))
def test_bounds_of_the_adjoint(problem, tol: float) -> None:
    cell, b = problem
    cell.solver = Auto(tol=tol, max_steps=2000, on_failure="ignore")
    b = b.requires_grad_()
    value = cell(b)
    solution = cell.last_solution
    v = torch.randn(value.shape, generator=torch.Generator().manual_seed(0), dtype=value.dtype)
    (ours,) = torch.autograd.grad(value, b, v)
    adjoint = cell.last_solution.adjoint
    chain = trace(cell.cell).to(torch.float64)
    if chain.normalizes:
        assert not adjoint.certified
        return
    exact = long_picard(chain, b)
    if not solution.certified or float((chain(exact, b.double()) - exact).abs().max()) > 1e-13:
        return
    assert adjoint.certified
    x = b.detach().double()
    jacobian = torch.func.vmap(torch.func.jacrev(lambda z, c: chain(z[None], c[None])[0]))(exact, x)
    g = torch.linalg.solve(torch.eye(x.shape[1], dtype=x.dtype) - jacobian.mT, v.double())
    expected = torch.func.vjp(lambda c: chain(exact, c), x)[1](g)[0]
    # The bound is in a weighted norm of g; of a gradient whose largest entry dominates, this is left of it.
    size = expected.abs().amax(1).clamp_min(1e-300)
    assert torch.isfinite(adjoint.error_bound).all()
    if cell.certificate().kind == "bounded gain":
        assert ((ours.double() - expected).abs().amax(1) / size)[size > 1e-3].lt(100 * tol + 1e-5).all()


def test_the_bound_of_the_adjoint_holds_in_its_norm() -> None:
    """Against the exact adjoint, in the norm of the proof; loose enclosures too."""
    from perron.solvers.adjoint import solve_adjoint
    from perron.theory.contraction import SignedGradientBound

    worst = 0.0
    for seed in range(80):
        generator = torch.Generator().manual_seed(seed)
        n = 2 + seed % 9
        weight = torch.randn(n, n, generator=generator, dtype=torch.float64)
        weight *= 0.95 / weight.abs().sum(1).max()
        name = ["tanh", "sigmoid", "softsign", "(tanh+1.2)^0.5", "arctan"][seed % 5]
        cell = layer(weight, Inject(), Activate(name))
        chain = trace(cell.cell)
        chain = chain.rebind([t.detach() for t in chain.tensors])
        b = torch.randn(3, n, generator=generator, dtype=torch.float64)
        exact = long_picard(chain, b)
        width = 10.0 ** -(seed % 6)
        value = exact + width * (torch.rand(b.shape, generator=generator, dtype=b.dtype) - 0.5)
        bounds = (torch.minimum(value, exact) - 1e-12, torch.maximum(value, exact) + 1e-12)
        v = torch.randn(b.shape, generator=generator, dtype=b.dtype)
        g, found = solve_adjoint(
            chain, value, b, v, Auto(tol=1e-6, on_failure="ignore"), bounds=bounds, theory=Contracting()
        )
        jacobian = torch.func.vmap(torch.func.jacrev(lambda z, c, f=chain: f(z[None], c[None])[0]))(exact, b)
        truth = torch.linalg.solve(torch.eye(n, dtype=b.dtype) - jacobian.mT, v)
        w = SignedGradientBound(chain, b, bounds).weights
        error = (w * (g - truth).abs()).sum(1) / (w * g.abs()).sum(1)
        assert (error <= found.error_bound).all()
        worst = max(worst, float((error / found.error_bound)[found.error_bound > 1e-8].max()) if width > 1e-3 else 0.0)
    assert worst > 0.02, "far from sharp"


def test_a_normalised_layer_has_no_bound_on_its_gradient() -> None:
    cell = SubhomogeneousLinear(3, 4, normalize=2)
    cell(torch.randn(2, 3)).sum().backward()
    assert cell.last_solution.certified
    assert not cell.last_solution.adjoint.certified


def test_fixed_steps() -> None:
    cell = SubhomogeneousLinear(3, 4, normalize=2, solver=Picard(steps=10, on_failure="ignore"))
    solution = cell.solve(torch.randn(5, 3))
    assert solution.steps.tolist() == [10] * 5
    assert solution.certified


def test_no_proof_is_looked_for_where_none_is_wanted() -> None:
    cell = SubhomogeneousLinear(3, 4, normalize=2, solver=Auto(proof_dtype=None))
    solution = cell.solve(torch.randn(5, 3))
    assert not solution.certified
    assert solution.stopping == "residual"


def test_rounding_of_signed_sums_is_accounted_for() -> None:
    """Large weights that cancel: F in float64 is wrong by more than the distance of two iterates."""
    big = torch.tensor([[1e13, -1e13], [1e13, -1e13]], dtype=torch.float64) * (1 - 1e-3)
    known = contraction(trace(layer(big, Activate("tanh"), Inject()).cell), torch.zeros(1, 2, dtype=torch.float64))
    assert float(known.norm.error.min()) > 1e-4


def test_the_enclosures_are_sharp_and_no_sharper() -> None:
    """F(z) = 0.9 z + 1 from a distance, and F(z) = (z + 0.001)^0.9: nearly every inequality of the proofs is met."""
    b = torch.ones(1, 1, dtype=torch.float64)
    linear = trace(layer(torch.full((1, 1), 0.9, dtype=torch.float64), Inject(), Activate("identity")).cell)
    known = contraction(linear, b)
    assert float(known.norm.factor) == pytest.approx(0.9, rel=1e-6)
    z = torch.full_like(b, 3.0)
    lower, upper, proven = known.enclose(z, linear(z, b).detach())
    assert proven.all()
    assert 10 <= float(upper) <= 10 + 1e-5
    assert float(lower) < 3.7
    power = trace(layer(torch.ones(1, 1, dtype=torch.float64), Inject(), Activate("(identity+0.001)^0.9")).cell)
    known = contraction(power, 0 * b)
    assert float(known.thompson.factor) == pytest.approx(0.9, rel=1e-4)
    exact = float(long_picard(power, 0 * b))
    z = torch.full_like(b, 1e6)
    lower, upper, proven = known.enclose(z, power(z, 0 * b).detach())
    assert proven.all()
    assert exact * 0.9 < float(lower) <= exact
    assert float(upper) > exact


def test_candidates_outside_of_the_box_are_moved_into_it() -> None:
    from perron.solvers.proving import Proving

    weight = torch.tensor([[0.3, -0.2], [0.1, 0.2]], dtype=torch.float64)
    problem = FixedPointProblem(
        map=trace(layer(weight, Activate("tanh"), Inject()).cell),
        injection=torch.rand(1, 2).double(),
        theory=Contracting(),
    )
    with torch.no_grad():
        facts = Proving(Picard(), problem, None).facts
        far, edge = torch.full((1, 2), 1e6).double(), facts.known.upper
        outside, inside = (facts.attempt(None, z, z).found for z in (far, edge))
    torch.testing.assert_close(outside.upper, inside.upper, rtol=0, atol=0)


def test_a_degree_says_nothing_of_samples_with_negative_injections() -> None:
    """Nonnegative weights, b < 0 outside of sigma: the fixed point is negative, and proven by the sup norm alone."""
    weight = torch.tensor([[0.2, 0.1], [0.05, 0.3]], dtype=torch.float64)
    cell = layer(weight, Activate("tanh+1.2"), Inject(), injection="free")
    b = torch.tensor([[-3.0, 1.0], [0.5, 0.5]], dtype=torch.float64)
    solution = cell.solve(b)
    exact = long_picard(trace(cell.cell), b)
    assert exact[0, 0] < 0
    assert solution.proven.all()
    assert ((solution.lower <= exact) & (exact <= solution.upper)).all()


def test_steep_powers_have_their_rounding() -> None:
    """(tanh v + 1 + 1e-9)^0.1 at v = -30: an ulp of tanh moves it by far more than an ulp."""
    activation = get_activation("(tanh+1.000000001)^0.1")
    v = torch.full((1,), -30.0, dtype=torch.float64)
    with mpmath.workdps(50):
        exact = (mpmath.tanh(-30) + mpmath.mpf(1.000000001)) ** mpmath.mpf(0.1)
        low, high = ActivationStep(activation=activation).over(v, v)
        assert mpmath.mpf(float(low)) <= exact <= mpmath.mpf(float(high))
    # One roundoff of tanh, times p x^(p - 1).
    assert float(high - low) > 0.1 * 1e-9**-0.9 * 1e-16


def test_the_ball_counts_the_rounding_of_sums_that_cancel() -> None:
    """F(z) = W2 relu(W1 z + b) with W2 = 1e12 (1, -1): F(0) is 0 up to 1e-4."""
    first, second = nn.Linear(2, 2, bias=False).double(), nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        first.weight.copy_(1e-14 * torch.eye(2))
        second.weight.copy_(1e12 * torch.tensor([[1.0, -1.0], [1.0, -1.0]]))
    chain = trace(nn.Sequential(first, Inject(), nn.ReLU(), second))
    assert gain(chain) < 1
    lower, upper = _ball(chain, torch.full((1, 2), 0.7, dtype=torch.float64))
    assert float((upper - lower).min()) > 1e-5


def test_no_false_certificates_at_scale() -> None:
    """A part of `make uniqueness`."""
    import uniqueness

    results = uniqueness.measure(300, seed=3)
    assert {k: r for k, r in results.items() if r.get("false certificates") or r.get("exceptions")} == {}
    assert sum(r["several fixed points found"] for r in (results[k] for k in uniqueness.SEARCHED)) > 5
    assert results["radius edge"]["no fixed point"] > 3
    assert all(results[edge]["certified for every input"] > 0 for edge in uniqueness.EDGES)


# ------------------------------------------------------------------------------------------------------- tight cases


@pytest.mark.parametrize("q", [0.5, 0.9, 1 - 2.0**-20])
@pytest.mark.parametrize("offset", [-0.4, -1e-9, 1e-9, 0.4])
@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_the_bound_in_the_sup_norm_is_attained(q: float, offset: float, scale: float) -> None:
    """z = q P z + b with a permutation P: from z* + c 1 the distance left is q/(1 - q) times the residual."""
    weight = q * torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    chain = trace(layer(weight, Inject(), Activate("identity")).cell)
    b = torch.full((1, 2), scale, dtype=torch.float64)
    exact = b / (1 - q)
    z = exact * (1 + offset)
    lower, upper, proven = contraction(chain, b).enclose(z, chain(z, b).detach())
    assert proven.all()
    noise = 1e-14 / (1 - q) * float(exact[0, 0])
    attained = lower if offset > 0 else upper
    other = upper if offset > 0 else lower
    assert float((attained - exact).abs().max()) <= noise
    assert (lower <= exact).all()
    assert (exact <= upper).all()
    assert float((other - exact).abs().max()) == pytest.approx(
        2 * q * abs(offset) * float(exact[0, 0]), rel=1e-6, abs=noise
    )


@pytest.mark.parametrize("power", [0.25, 0.5, 0.9])
@pytest.mark.parametrize("factor", [1e-3, 0.5, 1.001, 2.0, 1e3])
def test_the_bound_in_thompsons_metric_is_attained(power: float, factor: float) -> None:
    """z = (w z)^p is w^(p/(1-p)); from k z* the distance left is p |log k|, p/(1 - p) times the residual."""
    w = 1e20
    cell = layer(torch.full((1, 1), w, dtype=torch.float64), Inject(), Activate(f"(identity+0.0001)^{power}")).cell
    chain = trace(cell)
    b = torch.zeros(1, 1, dtype=torch.float64)
    exact = w ** (power / (1 - power))
    z = torch.full((1, 1), factor * exact, dtype=torch.float64)
    lower, upper, proven = contraction(chain, b).enclose(z, chain(z, b).detach())
    assert proven.all()
    low, high = (math.log(float(t) / exact) for t in (lower, upper))
    assert low <= 1e-12
    assert high >= -1e-12
    attained, other = (low, high) if factor > 1 else (high, low)
    # The degree of the activation is only known to a relative 1e-4.
    moved = abs(math.log(factor))
    assert abs(attained) <= 2e-4 * power / (1 - power) * moved + 1e-10
    assert abs(other) == pytest.approx(2 * power * moved, rel=2e-3)


def test_underflow_in_a_subhomogeneous_cell_is_no_relative_error() -> None:
    """What the first matrix rounds below the range, by some 1e-7, is blown up again by the others."""
    weights = (1.3e-320, 1e308, 1e15)
    maps = [nn.Linear(1, 1, bias=False, dtype=torch.float64) for _ in weights]
    for linear, weight in zip(maps, weights, strict=True):
        nn.init.constant_(linear.weight, weight)
    chain = trace(nn.Sequential(*maps, Inject(), Activate("(identity+0.0001)^0.5")))
    product = float(math.prod(Fraction(w) for w in weights))
    exact = (product + math.sqrt(product**2 + 4e-4)) / 2
    b = torch.zeros(1, 1, dtype=torch.float64)
    z = torch.full((1, 1), exact, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(100):
            z, before = chain(z, b), z
    lower, upper, proven = contraction(chain, b).enclose(before, z)
    assert not proven.all() or float(lower) <= exact <= float(upper)


def chain_of(*scales: float, activation: str = "identity") -> Chain:
    """z -> sigma(s_1 s_2 ... z + b) in one dimension, one matrix for each factor."""
    maps = [DenseStep(weights=(torch.tensor([[s]], dtype=torch.float64),)) for s in scales]
    return Chain((*maps, InjectStep(), ActivationStep(activation=get_activation(activation))))


@pytest.mark.parametrize("scales", [(0.9,), (-0.9,), (3.0, -0.3), (1e-200, 1e-200, 1e300, 0.7e100), (1 - 1e-9,)])
def test_the_gain_and_the_ball_are_attained_by_linear_maps(scales: tuple[float, ...]) -> None:
    """z = kappa z + b has |z*| = |b|/(1 - kappa) for kappa > 0."""
    chain = chain_of(*scales)
    exact = abs(math.prod((Fraction(s) for s in scales), start=Fraction(1)))
    assert exact <= Fraction(gain(chain)) <= exact * (1 + Fraction(1, 10**12))
    if min(scales) < 1e-100:
        # F(0) itself underflows on the way.
        return
    b = torch.full((1, 1), 3.0, dtype=torch.float64)
    _, upper = _ball(chain, b)
    fixed = 3 / (1 - exact)
    assert fixed <= Fraction(float(upper)) <= fixed * (1 + Fraction(1, 10**5))


def test_products_that_underflow_on_the_way_are_no_contraction() -> None:
    """tanh(1.5 z + b) has three fixed points, though 1e-200 * 1e-200 is nothing."""
    chain = chain_of(1e-200, 1e-200, 1e300, 1.5e100, activation="tanh")
    b = torch.zeros(1, 1, dtype=torch.float64)
    assert gain(chain) >= 1.5
    assert not float(contraction(chain, b).factor) < 1


def test_the_factor_of_the_weighted_norm_is_attained() -> None:
    """The slope of tanh is 1 at 0, which lies in every box: |J| is |A| there."""
    found = 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        weight = 2 * torch.rand(2, 2, generator=generator, dtype=torch.float64) - 1
        radius = float(torch.linalg.eigvals(weight.abs()).abs().max())
        weight = weight * (1 - 10.0 ** -(1 + seed % 6)) / radius
        matrix = [[abs(Fraction(x)) for x in row] for row in weight.tolist()]
        chain = Chain((DenseStep(weights=(weight,)), InjectStep(), ActivationStep(activation=get_activation("tanh"))))
        known = contraction(chain, torch.zeros(1, 2, dtype=torch.float64))
        if known.norm.factor < 1:
            found += 1
            w, kappa = [Fraction(x) for x in known.norm.weights[0].tolist()], Fraction(float(known.norm.factor))
            rows = [sum((a * x for a, x in zip(row, w, strict=True)), Fraction(0)) for row in matrix]
            ratio = max(row / x for row, x in zip(rows, w, strict=True))
            assert ratio <= kappa <= ratio * (1 + Fraction(1, 10**12))
    assert found > 20


def test_slopes_and_their_variation_are_attained() -> None:
    """tanh(a z) on [0, z]: slopes a at 0 and a (1 - tanh(a z)^2) at z; of two layers, at least the difference."""
    a, z = 0.7, torch.full((1, 1), 1.3, dtype=torch.float64)
    one = torch.ones_like(z)
    chain = chain_of(a, activation="tanh")
    steep, flat, _ = sensitivity(chain, 0 * z, 0 * z, z)
    least = a * (1 - math.tanh(a * 1.3) ** 2)
    assert a <= float(steep.matvec(one)) <= a * (1 + 1e-12)
    assert a - least <= float(steep.variation(flat, one)) <= (a - least) * (1 + 1e-10)
    deep = Chain((chain.steps[2], *chain.steps))
    steep, flat, _ = sensitivity(deep, 0 * z, 0 * z, z)
    inner = math.tanh(1.3)
    change = a - a * (1 - inner**2) * (1 - math.tanh(a * inner) ** 2)
    assert change <= float(steep.variation(flat, one)) <= 1.5 * change


@pytest.mark.parametrize("gap", [0.2, 1e-6, 1e-12])
def test_degrees_below_zero_keep_their_digits(gap: float) -> None:
    """sup t sech(t)^2/(1 - tanh(t) + gap): what is divided by cancels."""
    shift = 1 + gap
    with mpmath.workdps(40):
        slope = lambda t: t * mpmath.sech(t) ** 2 / (mpmath.mpf(shift) - mpmath.tanh(t))
        exact = max(slope(mpmath.mpf(k) / 50) for k in range(1, 1500))
    assert activation_degree(f"tanh+{shift!r}", signed=True) >= exact


def test_degrees_are_of_the_function_and_not_of_its_name() -> None:
    sigmoid = get_activation("sigmoid")
    other = replace(get_activation("tanh+0.1"), name="sigmoid")
    assert activation_degree(other) == activation_degree("tanh+0.1") != activation_degree(sigmoid)


def test_norms_assigned_out_of_range_have_no_degree() -> None:
    cell = layer(torch.rand(2, 2), Activate("tanh+1.7"), Inject(), Normalize()).cell
    assert degree(trace(cell)) < 1
    for p, dim in ((0.5, None), (math.nan, None), (2.0, 0)):
        cell[3].p, cell[3].dim = p, dim
        with pytest.raises(Refusal, match="norm"):
            degree(trace(cell))


def test_underflow_before_a_norm_is_no_relative_error() -> None:
    """The first entry is 1300 y beside 1e9, in steps of 1e-320 y: at y = 0.05 that has three digits."""
    pairs = [(1.3e-320, 1e-300), (1e308, 1e300), (1e14, 1e6)]
    maps = []
    for pair in pairs:
        maps.append(nn.Linear(2, 2, bias=False, dtype=torch.float64))
        with torch.no_grad():
            maps[-1].weight.copy_(torch.diag(torch.tensor(pair, dtype=torch.float64)))
    chain = trace(nn.Sequential(*maps, Activate("(identity+0.0001)^0.25"), Inject(), Normalize()))
    with mpmath.workdps(40):
        rates = [mpmath.fprod(mpmath.mpf(pair[k]) for pair in pairs) for k in range(2)]
        exact = [mpmath.mpf(1)] * 2
        for _ in range(200):
            raw = [(rate * y + mpmath.mpf(0.0001)) ** mpmath.mpf(0.25) for rate, y in zip(rates, exact, strict=True)]
            exact = [y / max(raw) for y in raw]
    b = torch.zeros(1, 2, dtype=torch.float64)
    z = torch.ones_like(b)
    with torch.no_grad():
        for _ in range(100):
            z, before = chain(z, b), z
        lower, upper, proven = contraction(chain, b).enclose(before, z)
    for low, high, fixed in zip(lower[0].tolist(), upper[0].tolist(), exact, strict=True):
        assert not proven.all() or low <= fixed <= high
