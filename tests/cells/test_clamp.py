"""Limits of every entry: box-constrained programs, power control with caps, and what is proven of them."""

import copy
import math

import pytest
import torch
from exact import ExactCell
from torch import Tensor, nn

from perron import certify, enclose
from perron.cells import Chain, Clamp, ClampStep, DenseStep, Inject, InjectStep, Refusal, trace
from perron.nn import Equilibrium
from perron.solvers import Anderson, Auto, Broyden, Newton, OperatorSplitting, Picard, Solver
from perron.theory import Sign, degree, derive, gain, margin, pose
from perron.theory.contraction import sensitivity
from perron.theory.positive_concave import ConcaveGradientBound
from perron.verify import Interval, propagate

DOUBLE = torch.float64
INF = math.inf


def cell_of(weight: Tensor, lower: Tensor | float, upper: Tensor | float) -> nn.Sequential:
    """z -> clamp(W z + b, lower, upper)."""
    linear = nn.Linear(*weight.shape, bias=False, dtype=DOUBLE)
    linear.weight = nn.Parameter(weight.clone())
    limits = [t if isinstance(t, Tensor) else torch.tensor(t, dtype=DOUBLE) for t in (lower, upper)]
    return nn.Sequential(linear, Inject(), Clamp(*limits))


def layer_of(
    weight: Tensor, lower: Tensor | float, upper: Tensor | float, injection: str = "free", solver: Solver | None = None
) -> Equilibrium:
    return Equilibrium(
        cell_of(weight, lower, upper), injection=injection, solver=solver or Auto(tol=1e-10, max_steps=2000)
    )


def step_of(lower: Tensor | float, upper: Tensor | float) -> ClampStep:
    return ClampStep(lower=torch.as_tensor(lower, dtype=DOUBLE), upper=torch.as_tensor(upper, dtype=DOUBLE))


# -------------------------------------------------------------------------------------------------------- the module


def test_the_module_projects_onto_its_box() -> None:
    limits = torch.tensor([-1.0, 0.0, -INF]), torch.tensor([1.0, 0.0, INF])
    v = torch.tensor([[-2.0, -3.0, -4.0], [2.0, 3.0, 4.0], [0.5, 0.0, 0.5]])
    expected = torch.tensor([[-1.0, 0.0, -4.0], [1.0, 0.0, 4.0], [0.5, 0.0, 0.5]])
    module = Clamp(*limits)
    assert torch.equal(module(v), expected)
    assert torch.equal(module(module(v)), module(v))
    again = copy.deepcopy(module)
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(v), expected)
    assert "lower=(3,)" in repr(module)
    assert repr(Clamp(0, 6)) == "Clamp(lower=0, upper=6)"
    assert not list(module.parameters())
    assert len(list(Clamp(nn.Parameter(torch.zeros(3)), 1.0).parameters())) == 1


@pytest.mark.parametrize(
    "limits",
    [
        (1.0, 0.0),
        (math.nan, 1.0),
        (0.0, math.nan),
        (INF, INF),
        (-INF, -INF),
        (torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0])),
        (torch.zeros(2), torch.ones(3)),
        (torch.zeros(1), torch.ones(3)),
    ],
)
def test_limits_that_are_none_raise(limits: tuple[Tensor | float, Tensor | float]) -> None:
    with pytest.raises(ValueError, match=r"limit"):
        Clamp(*limits)


def test_limits_do_not_broadcast() -> None:
    module = Clamp(0.0, torch.ones(2, 1, 1))
    with pytest.raises(ValueError, match=r"\(2, 1, 1\) met a state of shape \(3, 2, 4, 4\)"):
        module(torch.rand(3, 2, 4, 4))
    with pytest.raises(ValueError, match="met a state"):
        Clamp(torch.zeros(3), 1.0)(torch.rand(3))


@pytest.mark.parametrize("shape", [(), (4,)])
def test_gradients_are_those_of_autograd(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    lower, upper = torch.full(shape, -0.5, dtype=DOUBLE), torch.full(shape, 0.7, dtype=DOUBLE)
    step = step_of(lower.requires_grad_(), upper.requires_grad_())
    v = torch.randn(20, 4, dtype=DOUBLE).requires_grad_()
    with torch.no_grad():
        # At a limit, too.
        v[0], v[1] = -0.5, 0.7
    y = torch.randn(20, 4, dtype=DOUBLE)
    of_v, *of_limits = torch.autograd.grad(step(v), (v, lower, upper), y)
    assert torch.equal(y * step.derivative(v), of_v)
    for found, expected in zip(step.gradients(v, y), of_limits, strict=True):
        torch.testing.assert_close(found, expected)


# --------------------------------------------------------------------------------------------------- what is read of it


@pytest.mark.parametrize(
    ("lower", "upper", "concave", "positive", "slope"),
    [
        (0.0, 1.0, True, True, 0.0),
        (-INF, 1.0, True, True, 0.0),
        (-1.0, INF, True, True, 1.0),
        (0.0, 0.0, True, False, 0.0),
        (1e-300, 1.0, False, None, None),
        (-1.0, -1e-300, False, None, None),
        (0.0, torch.tensor([1.0, INF]), True, True, 1.0),
        (0.0, torch.tensor([1.0, 0.0]), True, False, 0.0),
        (torch.tensor([0.0, 0.1]), 1.0, False, None, None),
    ],
)
def test_facts_of_the_orthant(lower, upper, concave: bool, positive: bool | None, slope: float | None) -> None:
    step = step_of(lower, upper)
    if not concave:
        with pytest.raises(Refusal, match="orthant"):
            step.check_concave()
        return
    step.check_concave()
    assert step.positive(True, False) == positive
    assert not step.positive(False, True)
    assert step.asymptotic_slope == slope
    assert step.least == 0


def test_what_it_gives_for_positive_arguments_is_bounded() -> None:
    step = step_of(torch.tensor([0.25, -1.0]), torch.tensor([0.5, 2.0]))
    v = 10 ** (4 * torch.rand(1000, 2, dtype=DOUBLE) - 2)
    assert step.least == 0
    assert step_of(torch.tensor([0.25, 0.5]), 2.0).least == 0.25
    assert step.supremum == 2
    assert step_of(0.0, torch.tensor([1.0, INF])).supremum == INF
    assert float(step(v).max()) <= step.supremum
    assert step.degree(0.0) == (1.0, 0.0)
    assert step.degree(0.3) == (1.0, 0.3)
    assert step_of(0.25, 0.5).degree(3.0) == (1.0, 0.5)
    with pytest.raises(Refusal):
        step_of(-2.0, -1.0).degree(0.0)
    # Thompson's distance, which between the limits stays what it is.
    a, b = v[:500], v[500:]
    for clamp in (step, step_of(0.25, 0.5), step_of(0.0, INF)):
        x, y = (t if clamp is not step else t[:, :1].expand(-1, 2) for t in (a, b))
        if clamp.least > 0 or clamp is not step:
            apart = (clamp(x).log() - clamp(y).log()).abs().amax(1)
            assert (apart <= clamp.thompson((x.log() - y.log()).abs().amax(1)) * (1 + 1e-12)).all()


U = 2.0**-53


@pytest.mark.parametrize(
    ("box", "steepest", "flattest"),
    [
        ((0.1, 0.9), 1, 1),
        ((0.0, 0.5), 1, 0),
        ((0.5, 1.0), 1, 0),
        ((U, 1 - U), 1, 1),
        ((1.0, 2.0), 1, 0),
        ((-1.0, 0.0), 1, 0),
        ((1 + 2 * U, 2.0), 0, 0),
        ((-1.0, -U), 0, 0),
        ((-1.0, 2.0), 1, 0),
        ((math.nan, 2.0), 1, 0),
        ((-INF, INF), 1, 0),
    ],
)
def test_slopes_next_to_a_kink_belong_to_both_sides(box: tuple[float, float], steepest: int, flattest: int) -> None:
    low, high = (torch.tensor([[x]], dtype=DOUBLE) for x in box)
    found = step_of(0.0, 1.0).slopes(low, high)
    assert [float(t) for t in found] == [steepest, flattest]


@pytest.mark.parametrize(
    ("v", "most", "least"), [(1.0, 1, 0), (1 - 1e-13, 1, 0), (1 + 1e-13, 1, 0), (0.9, 1, 1), (1.1, 0, 0)]
)
def test_slopes_of_computed_arguments_allow_for_their_rounding(v: float, most: int, least: int) -> None:
    """v = z + b was rounded; in a chain of 400 products it may be off by 1e-13."""
    weight = torch.zeros(400, 400, dtype=DOUBLE)
    weight[:, 0] = 1.0
    chain = trace(cell_of(weight, 0.0, 1.0))
    z = torch.full((1, 400), v / 2, dtype=DOUBLE)
    assert chain.linearize_steps(z, z, "upper").slope.unique().tolist() == [most]
    assert chain.linearize_steps(z, z, "lower").slope.unique().tolist() == [least]


def test_slopes_allow_for_underflow() -> None:
    """W z/1e300 may lose 1e-308, which comes back as more than a limit of 1e-10."""
    weight = torch.full((1, 1), 0.5, dtype=DOUBLE)
    first = DenseStep(weights=(torch.full((1, 1), 1e300, dtype=DOUBLE),))
    chain = Chain((DenseStep(weights=(1e-300 * weight,)), first, InjectStep(), step_of(0.0, 1e-10)))
    z, b = torch.full((1, 1), 4e-10, dtype=DOUBLE), torch.zeros(1, 1, dtype=DOUBLE)
    assert float(chain.linearize_steps(z, b, "upper").slope) == 1
    assert float(chain.linearize_steps(0.2 * z, b, "lower").slope) == 0


def test_it_computes_nothing() -> None:
    weight = torch.rand(3, 3, dtype=DOUBLE)
    without = trace(nn.Sequential(*cell_of(weight, 0.0, 1.0)[:2])).steps[:2]
    for chain in (Chain((*without, step_of(0.0, 1.0))), Chain((step_of(0.0, 1.0), *without))):
        assert chain.rounding(DOUBLE) == Chain(without).rounding(DOUBLE)
    box = torch.tensor([[0.1, -0.5, 2.0]], dtype=DOUBLE), torch.tensor([[0.3, 0.5, 3.0]], dtype=DOUBLE)
    low, high = step_of(0.2, 1.0).over(*box)
    assert low.tolist() == [[0.2, 0.2, 1.0]]
    assert high.tolist() == [[0.3, 0.5, 1.0]]
    step = step_of(0.2, torch.tensor([0.25, 0.5, 1.0]))
    assert [t.tolist() for t in step.range(box[0])] == [[[0.2] * 3], [[0.25, 0.5, 1.0]]]
    assert step_of(0.2, INF).range(box[0]) is None
    assert step_of(-INF, 0.2).range(box[0]) is None
    # A rounded argument is passed on, and the box of its slopes is as much wider.
    error = torch.full((1, 3), 0.2, dtype=DOUBLE)
    found = step_of(0.2, 1.0).reach(*box, error, error)
    assert found.steep[0].slope.tolist() == [[1, 1, 0]]
    assert found.flat[0].slope.tolist() == [[0, 0, 0]]
    assert (found.error - torch.tensor([[0.2, 0.2, 0.0]], dtype=DOUBLE)).abs().max() <= 1e-12
    found = step_of(0.2, 1.0).reach(*(t[:, 1:] for t in (*box, 7 * error, error)))
    assert found.steep[0].slope.tolist() == [[1, 1]]


# ------------------------------------------------------------------------------------------------- programs in a box


def program(seed: int, n: int = 6, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """min z^T Q z/2 - c^T z in a box with a known solution: Q, c, lower, upper, z*, and whether an entry is free.

    c = Q z* + mu with mu > 0 where z* is at its upper limit, mu < 0 at its lower one, and 0 elsewhere.
    """
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=DOUBLE)

    root = rand(n, n) - 0.5
    q = scale * (root @ root.t() + 0.1 * torch.eye(n, dtype=DOUBLE))
    lower, upper = -rand(n) - 0.1, rand(n) + 0.1
    kind = torch.arange(n) % 3
    z = torch.where(kind == 0, lower, torch.where(kind == 1, upper, lower + (upper - lower) * (0.2 + 0.6 * rand(n))))
    mu = torch.where(kind == 0, -1.0, torch.where(kind == 1, 1.0, 0.0)) * (0.1 + rand(n))
    return q, q @ z + mu, lower, upper, z, kind == 2


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.3, 1.0, 1.9])
def test_programs_in_a_box(seed: int, share: float) -> None:
    """z = clamp(z - a (Q z - c)) for a up to 2/|Q|, and beyond what contracts in any sup norm."""
    q, c, lower, upper, z, free = program(seed)
    a = share / float(torch.linalg.matrix_norm(q, 2))
    layer = layer_of(torch.eye(len(z), dtype=DOUBLE) - a * q, lower, upper)
    assert layer.certificate()
    b = (a * c).unsqueeze(0).requires_grad_()
    value = layer(b)
    solution = layer.last_solution
    assert solution.certified
    assert ((solution.lower <= z) & (z <= solution.upper)).all()
    torch.testing.assert_close(value[0], z, rtol=0, atol=1e-8)
    # dz* = a Q_ff^{-1} dc of the free entries.
    v = torch.randn(len(z), dtype=DOUBLE)
    (found,) = torch.autograd.grad(value, b, v.unsqueeze(0))
    expected = torch.zeros_like(z)
    expected[free] = torch.linalg.solve(a * q[free][:, free], v[free])
    torch.testing.assert_close(found[0], expected, rtol=1e-6, atol=1e-8)
    assert solution.adjoint is None or float(solution.adjoint.error_bound[0]) < 1e-4


@pytest.mark.parametrize("scheme", ["peaceman_rachford", "forward_backward"])
def test_splitting_methods_solve_programs_in_a_box(scheme: str) -> None:
    q, c, lower, upper, z, _ = program(3, scale=2.0)
    solver = OperatorSplitting(scheme=scheme, tol=1e-9, max_steps=5000)
    layer = layer_of(torch.eye(len(z), dtype=DOUBLE) - q, lower, upper, solver=solver)
    assert layer.certificate().kind == "monotone operator"
    solution = layer.solve(c.unsqueeze(0))
    assert solution.certified
    assert ((solution.lower <= z) & (z <= solution.upper)).all()
    torch.testing.assert_close(solution.value[0], z, rtol=0, atol=1e-7)


def test_gradients_of_limits() -> None:
    """An active limit moves its entry with it, and the free entries by -Q_ff^{-1} Q_fa."""
    q, c, lower, upper, z, free = program(5)
    a = 1 / float(torch.linalg.matrix_norm(q, 2))
    layer = layer_of(torch.eye(len(z), dtype=DOUBLE) - a * q, nn.Parameter(lower), nn.Parameter(upper))
    v = torch.randn(len(z), dtype=DOUBLE)
    (layer((a * c).unsqueeze(0)) * v).sum().backward()
    active = v.clone()
    active[~free] -= q[~free][:, free] @ torch.linalg.solve(q[free][:, free], v[free])
    for limit, at in ((layer.cell[2].lower, z == lower), (layer.cell[2].upper, z == upper)):
        torch.testing.assert_close(limit.grad, torch.where(at, active, 0.0), rtol=1e-6, atol=1e-8)


def test_second_derivatives_with_limits() -> None:
    q, c, lower, upper, *_ = program(2, n=3)
    a = 1 / float(torch.linalg.matrix_norm(q, 2))
    layer = layer_of(torch.eye(3, dtype=DOUBLE) - a * q, lower, upper, solver=Auto(tol=1e-12, max_steps=2000))
    weight = layer.cell[0].weight.detach().clone().requires_grad_()

    def solve(w: Tensor, b: Tensor, u: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"cell.0.weight": w, "cell.2.upper": u}, (b,)).square()

    inputs = (weight, (a * c).unsqueeze(0).requires_grad_(), upper.clone().requires_grad_())
    assert torch.autograd.gradcheck(solve, inputs, atol=1e-5)
    assert torch.autograd.gradgradcheck(solve, inputs, atol=1e-4)


# ------------------------------------------------------------------------------------------- power control with caps


def power_control(seed: int, n: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """z = min(G z + b, cap) with a known solution, G >= 0 of radius well over 1: G, b, cap, z*, and who is below the cap."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.rand(n, n, generator=generator, dtype=DOUBLE)
    below = torch.arange(n) % 2 == 0
    g[:, below] *= 0.9 / g[below][:, below].sum(1).max()
    b, power = (torch.rand(n, generator=generator, dtype=DOUBLE) + 0.1 for _ in range(2))
    z = power.clone()
    z[below] = torch.linalg.solve(
        torch.eye(int(below.sum()), dtype=DOUBLE) - g[below][:, below], g[below][:, ~below] @ power[~below] + b[below]
    )
    wanted = g @ z + b
    cap = torch.where(below, z * (1.1 + power), power)
    # Who is at the cap wants more.
    g[~below] *= (1.5 * power / wanted).clamp_min(1.0)[~below].unsqueeze(1)
    return g, b, cap, z, below


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("solver", [Auto, Picard, Anderson, Newton, Broyden])
def test_power_control_with_caps(seed: int, solver: type) -> None:
    g, b, cap, z, below = power_control(seed)
    layer = layer_of(g, 0.0, cap, "given", solver(tol=1e-8, max_steps=3000))
    certificate = layer.certificate()
    assert certificate.kind == "positive concave"
    assert "clamp" in str(certificate)
    assert "zero" in str(certificate)
    injection = b.unsqueeze(0).requires_grad_()
    value = layer(injection)
    solution = layer.last_solution
    assert solution.certified
    assert solution.converged.all()
    assert ((solution.lower <= z) & (z <= solution.upper)).all()
    torch.testing.assert_close(value[0], z, rtol=1e-7, atol=0)
    v = torch.rand(len(z), dtype=DOUBLE)
    (found,) = torch.autograd.grad(value, injection, v.unsqueeze(0))
    expected = torch.zeros_like(z)
    expected[below] = torch.linalg.solve((torch.eye(len(z), dtype=DOUBLE) - g)[below][:, below].t(), v[below])
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-7)
    assert float(layer.last_solution.adjoint.error_bound[0]) < 1e-5


def test_who_has_no_cap_needs_a_radius_below_1() -> None:
    eye = torch.eye(2, dtype=DOUBLE)
    caps = torch.tensor([1.0, INF], dtype=DOUBLE)
    assert certify(cell_of(0.99 * eye, 0.0, caps))
    assert certify(cell_of(1.01 * eye, 0.0, torch.ones(2, dtype=DOUBLE)))
    # z_2 = 1.01 z_2 + b has no solution.
    # Limits are no weights: what is said of those does not count them.
    assert "all 4 weights" in str(certify(cell_of(0.99 * eye, -1.0, caps)))
    for radius in (1.0, 1.01):
        assert not certify(cell_of(radius * eye, 0.0, caps))


def test_enclosures_around_any_candidate() -> None:
    g, b, cap, z, _ = power_control(1)
    found = enclose(cell_of(g, -1.0, cap), z.unsqueeze(0) * (1 + 1e-9), b.unsqueeze(0))
    assert found.proven.all()
    assert ((found.lower <= z) & (z <= found.upper)).all()
    assert ((found.upper - found.lower) / z).max() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("radius", [0.5, 1.0, 30.0])
def test_enclosures_contain_the_exact_fixed_point(radius: float, dtype: torch.dtype) -> None:
    """Against several hundred bits; caps over many decades."""
    for seed in range(10):
        torch.manual_seed(seed)
        weight = torch.rand(4, 4, dtype=dtype)
        weight = radius * weight / weight.sum(1).max()
        cap = (10 ** (8 * torch.rand(4) - 4)).to(dtype)
        lower = torch.where(torch.rand(4) < 0.5, 0.0, -1.0).to(dtype)
        layer = Equilibrium(cell_of(weight, lower, cap).to(dtype), injection="given", solver=Auto(tol=1e-5))
        b = (10 ** (6 * torch.rand(3, 4) - 4)).to(dtype).requires_grad_()
        value = layer(b)
        v = torch.rand_like(value)
        (of_b,) = torch.autograd.grad(value, b, v)
        solution, adjoint = layer.last_solution, layer.last_solution.adjoint
        assert solution.certified
        exact = ExactCell(trace(layer.cell), torch.Size([4]))
        truth = exact.truth(b.detach(), solution.value.double(), concave=True)
        assert truth.known.all()
        z = truth.high
        assert (solution.lower.double() <= z * (1 + 1e-15)).all()
        assert (z <= solution.upper.double() * (1 + 1e-15)).all()
        # dz/db = (I - D W)^{-1} D, so that of b is D g.
        slope = trace(layer.cell).to(DOUBLE).linearize(z, b.detach().double()).slope
        system = torch.eye(4, dtype=DOUBLE) - slope.unsqueeze(2) * weight.double()
        expected = slope * torch.linalg.solve(system.mT, v.double().unsqueeze(2)).squeeze(2)
        proven = adjoint.error_bound.isfinite()
        torch.testing.assert_close(
            of_b.double()[proven], expected[proven], rtol=1e-3, atol=1e-4 * float(expected.abs().max())
        )


# ---------------------------------------------------------------------------------------------------- what is refused


def test_a_lower_limit_above_zero_makes_no_cell_concave_and_no_degree_smaller() -> None:
    """z = max(z, 1), at most 2, has every number between them for a fixed point."""
    one = torch.ones(1, 1, dtype=DOUBLE)
    chain = trace(cell_of(one, 1.0, 2.0))
    assert degree(chain) == 1
    assert 1 <= gain(chain) < 1 + 1e-12
    assert margin(chain) <= 0
    assert not certify(chain)
    for z in (1.0, 1.5, 2.0):
        assert float(chain(z * one, 0 * one)) == z
    solution = Equilibrium(cell_of(one, 1.0, 2.0), injection="given").solve(0 * one)
    assert not solution.certified
    # Below a gain of 1 there is one.
    layer = layer_of(0.5 * one, 1.0, 2.0, "given")
    assert layer.certificate().kind == "bounded gain"
    for b, z in ((0.1, 1.0), (0.7, 1.4), (5.0, 2.0)):
        solution = layer.solve(b * one)
        assert solution.certified
        assert float(solution.value) == pytest.approx(z, rel=1e-8)
    assert derive(trace(layer.cell), (Sign.POSITIVE,)).certificate.kind == "bounded gain"


def test_signed_weights_with_two_fixed_points_are_refused() -> None:
    """z = clamp(2 z, -1, 1): -1, 0 and 1."""
    two = torch.full((1, 1), 2.0, dtype=DOUBLE)
    layer = layer_of(two, -1.0, 1.0)
    assert not layer.certificate()
    assert not layer.solve(torch.zeros(1, 1, dtype=DOUBLE)).certified
    # With b far enough outside all is at one limit, and a single sample may be proven.
    theory, _ = pose(trace(layer.cell), (Sign.ANY,))
    assert theory is not None
    solution = layer.solve(torch.full((1, 1), 5.0, dtype=DOUBLE))
    assert solution.certified
    assert float(solution.value) == 1


def test_limits_are_checked_again_when_they_were_assigned() -> None:
    layer = layer_of(torch.full((2, 2), 0.1, dtype=DOUBLE), 0.0, nn.Parameter(torch.ones(2, dtype=DOUBLE)), "given")
    b = torch.ones(1, 2, dtype=DOUBLE)
    assert layer.solve(b).certified
    with torch.no_grad():
        layer.cell[2].upper[0] = -1.0
    assert "limit" in layer.certificate().refusal
    with pytest.raises(Refusal, match="limit"):
        layer.solve(b)


class Doubled(ClampStep):
    """A subclass of a known step that computes something else."""

    def __call__(self, v: Tensor, injection: Tensor | None = None) -> Tensor:
        return 2 * super().__call__(v)


def test_subclasses_are_refused() -> None:
    steps = trace(cell_of(torch.eye(2, dtype=DOUBLE), 0.0, 1.0)).steps
    limits = {"lower": steps[2].lower, "upper": steps[2].upper}
    assert "Doubled" in certify(Chain((*steps[:2], Doubled(**limits)))).refusal

    class Own(Clamp):
        pass

    with pytest.raises(Refusal, match="Own, a subclass of Clamp"):
        trace(nn.Sequential(nn.Linear(2, 2), Inject(), Own(0.0, 1.0)))


# --------------------------------------------------------------------------------------------------------- its bounds


def test_the_variation_of_slopes_is_attained() -> None:
    """Inside of the limits none, across one all of |W|, outside nothing at all."""
    chain = trace(cell_of(torch.full((1, 1), 0.5, dtype=DOUBLE), 0.0, 1.0))
    one, zero = torch.ones(1, 1, dtype=DOUBLE), torch.zeros(1, 1, dtype=DOUBLE)
    for low, high, steepest, change in ((0.2, 1.8, 0.5, 0.0), (1.8, 2.2, 0.5, 0.5), (2.2, 3.0, 0.0, 0.0)):
        steep, flat, _ = sensitivity(chain, zero, low * one, high * one)
        assert float(steep.matvec(one)) == steepest
        assert change <= float(steep.variation(flat, one)) <= change * (1 + 1e-12)


def test_gradient_bounds_know_which_caps_bind() -> None:
    """Where every cap is clearly passed or clearly not, J is known exactly."""
    chain = trace(cell_of(torch.full((2, 2), 0.25, dtype=DOUBLE), 0.0, torch.tensor([1.0, 8.0], dtype=DOUBLE)))
    b = torch.tensor([[2.0, 2.0]], dtype=DOUBLE)
    # z_1 = 1, z_2 = (2 + 1/4)/(3/4) = 3.
    z = torch.tensor([[1.0, 3.0]], dtype=DOUBLE)
    bound = ConcaveGradientBound(chain, b, (0.99 * z, 1.01 * z))
    assert (bound.kappa < 1).all()
    assert float(bound.spread.max()) <= 1e-12
    loose = ConcaveGradientBound(chain, b, (0.1 * z, 20 * z))
    assert float(loose.spread.max()) > 0.1


@pytest.mark.parametrize("upper", [1.0, INF])
def test_boxes_of_one_entry_in_closed_form(upper: float) -> None:
    """z = clamp(z/2 + b, 0, u) is clamp(2 b, 0, u) for b >= 0."""
    layer = layer_of(torch.full((1, 1), 0.5, dtype=DOUBLE), 0.0, upper, "given")
    low, high = (torch.tensor([[x]], dtype=DOUBLE) for x in (0.2, 0.7))
    box = propagate(layer, Interval(low, high))
    for found, exact in ((box.lower, 0.4), (box.upper, min(1.4, upper))):
        assert float(found) == pytest.approx(exact, rel=1e-3)
    assert float(box.lower) <= 0.4
    assert float(box.upper) >= min(1.4, upper)


def test_boxes_behind_a_clamp_are_exact() -> None:
    clamp = Clamp(torch.tensor([0.0, -INF, 1.0]), torch.tensor([1.0, 0.5, INF]))
    low, high = torch.tensor([[-1.0, -7.0, 0.0]]), torch.tensor([[0.5, 7.0, 9.0]])
    box = propagate(clamp, Interval(low, high))
    assert box.lower.tolist() == [[0.0, -7.0, 1.0]]
    assert box.upper.tolist() == [[0.5, 0.5, 9.0]]


def test_images_and_channels() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 2, 3, padding=1, bias=False, dtype=DOUBLE)
    with torch.no_grad():
        conv.weight.abs_()
    cap = torch.rand(2, 4, 5, dtype=DOUBLE) + 0.1
    layer = Equilibrium(
        nn.Sequential(conv, Inject(), Clamp(torch.tensor(0.0, dtype=DOUBLE), cap)), injection="softplus"
    )
    assert layer.certificate().kind == "positive concave"
    x = torch.randn(3, 2, 4, 5, dtype=DOUBLE)
    solution = layer.solve(x)
    assert solution.certified
    assert (solution.value <= cap * (1 + 1e-4)).all()
    layer(x).sum().backward()
    assert conv.weight.grad.isfinite().all()
    with pytest.raises(ValueError, match="met a state"):
        layer.solve(x[..., :4])
