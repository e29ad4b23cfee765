"""Monotone cells (monDEQ): the margin, the enclosures it gives, the splitting that reaches them."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from perron.cells import Activate, Inject, trace
from perron.constraints import MonotoneOperator, monotone_operator
from perron.nn import Equilibrium, MonotoneConv2d, MonotoneLinear
from perron.solvers import Anderson, Auto, Broyden, FixedPointProblem, Newton, OperatorSplitting, Picard
from perron.solvers.splitting import ForwardBackward
from perron.theory import gain, margin
from perron.theory.monotone_operator import MonotoneGradientBound, monotonicity
from perron.theory.monotone_operator import MonotoneOperator as MonotoneTheory

ACTIVATIONS = ["relu", "tanh", "softsign", "sigmoid", "arctan", "relu6", "identity"]


def layer(weight: Tensor, activation: str, **options) -> Equilibrium:
    linear = nn.Linear(*weight.shape, bias=False, dtype=weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
    return Equilibrium(nn.Sequential(linear, Inject(), Activate(activation)), injection="free", **options)


def random_weight(seed: int, n: int, scale: float, margin: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    a, b = scale * torch.randn(2, n, n, generator=generator, dtype=torch.float64)
    return MonotoneOperator(margin)(a, b)


def exact(weight: Tensor, activation: str, b: Tensor) -> Tensor:
    """By Peaceman and Rachford's steps in float64, written down again."""
    sigma = Activate(activation)
    inverse = torch.linalg.inv(2 * torch.eye(len(weight), dtype=torch.float64) - weight)
    z = u = torch.zeros_like(b)
    for _ in range(20000):
        half = 2 * z - u
        u, old = 2 * (half + b) @ inverse.t() - half, u
        z = sigma(u)
        if float((u - old).abs().max()) < 2e-15 * float(1 + u.abs().max()):
            break
    return z


@given(st.integers(0, 10_000), st.floats(1e-3, 2.0), st.integers(1, 12))
def test_the_parametrisation_has_its_margin(seed: int, m: float, n: int) -> None:
    weight = random_weight(seed, n, 1.0, m)
    found = margin(trace(layer(weight, "relu").cell))
    symmetric = torch.eye(n, dtype=torch.float64) - (weight + weight.t()) / 2
    true = float(torch.linalg.eigvalsh(symmetric)[0])
    # Below the computed eigenvalue by more than its own error can be.
    assert true - 1e-10 * float(weight.norm() + 1) <= found <= true - 2e-16 * float(symmetric.norm())
    assert found >= m * (1 - 1e-6) - 1e-9 * float(weight.norm())
    again = MonotoneOperator(m * (1 - 1e-9))
    torch.testing.assert_close(again(*again.right_inverse(weight)), weight, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("m", [0.999, 1.0, 1.5, 10.0])
def test_margins_of_one_and_more(m: float) -> None:
    """However small W is, I - W has no more than 1: something must be taken off its diagonal."""
    cell = MonotoneLinear(3, 4, margin=m, dtype=torch.float64)
    assert m * (1 - 1e-9) <= margin(trace(cell.cell))
    assert cell.solve(torch.randn(2, 3, dtype=torch.float64)).certified
    free = nn.Sequential(monotone_operator(nn.Linear(3, 3, bias=False).double(), margin=m), Inject(), nn.ReLU())
    assert m * (1 - 1e-9) <= margin(trace(free))


def test_margins_are_refused_where_there_is_none() -> None:
    assert margin(trace(layer(1.5 * torch.eye(3), "relu").cell)) < 0
    certificate = layer(1.5 * torch.eye(3), "relu").certificate()
    assert not certificate
    for activation in ("log1p", "erf", "one_minus_exp", "sqrt_shift", "(tanh+1.2)^0.5"):
        # Slopes above 1, or nothing known below zero.
        assert margin(trace(layer(-torch.eye(3), activation).cell)) == -math.inf
    nan = torch.eye(3)
    nan[0, 0] = math.nan
    assert margin(trace(layer(nan, "relu").cell)) == -math.inf
    with pytest.raises(ValueError, match="margin"):
        MonotoneOperator(0.5).right_inverse(torch.eye(3))
    with pytest.raises(ValueError, match="square"):
        MonotoneOperator(0.5).right_inverse(torch.ones(2, 3))
    with pytest.raises(ValueError, match="square"):
        monotone_operator(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="positive"):
        MonotoneOperator(0.0)
    with pytest.raises(ValueError, match="slopes"):
        MonotoneLinear(2, 2, "erf")


@given(
    st.integers(0, 10_000),
    st.sampled_from(ACTIVATIONS),
    st.sampled_from([0.02, 0.3, 1.0]),
    st.sampled_from([0.3, 1.0, 5.0]),
)
def test_enclosures_hold(seed: int, activation: str, m: float, scale: float) -> None:
    n = 1 + seed % 12
    weight = random_weight(seed, n, scale / math.sqrt(n), m)
    generator = torch.Generator().manual_seed(seed + 1)
    b = 3 * torch.randn(3, n, generator=generator, dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        cell = layer(weight.to(dtype), activation, solver=Auto(max_steps=3000, on_failure="ignore"))
        truth = exact(cell.cell[0].weight.detach().double(), activation, b.to(dtype).double())
        if not cell.certificate():
            assert m < 0.1
            continue
        solution = cell.solve(b.to(dtype))
        assert solution.proven.all()
        assert (solution.lower.double() <= truth + 1e-12).all()
        assert (truth <= solution.upper.double() + 1e-12).all()


@given(st.integers(0, 10_000))
def test_any_point_is_enclosed(seed: int) -> None:
    """The proof needs no convergence: it holds from everywhere."""
    n = 1 + seed % 8
    weight = random_weight(seed, n, 1.0, 0.2)
    generator = torch.Generator().manual_seed(seed + 1)
    b, z = 2 * torch.randn(2, 4, n, generator=generator, dtype=torch.float64)
    chain = trace(layer(weight, "tanh").cell)
    known = monotonicity(chain, b)
    lower, upper, proven = known.enclose(z, chain(z, b).detach())
    truth = exact(weight, "tanh", b)
    assert proven.all()
    assert (lower <= truth).all()
    assert (truth <= upper).all()


def test_the_bound_in_closed_form() -> None:
    """sigma = identity, W = -w: z* = b/(1 + w), margin 1 + w, and |y - z*| = |W (y - z)|/m exactly."""
    chain = trace(layer(torch.full((1, 1), -3.0, dtype=torch.float64), "identity").cell)
    b, z = torch.ones(1, 1, dtype=torch.float64), torch.full((1, 1), 0.7, dtype=torch.float64)
    known = monotonicity(chain, b)
    assert known.margin == pytest.approx(4, rel=1e-12)
    y = chain(z, b).detach()
    lower, upper, _ = known.enclose(z, y)
    radius = abs(float(y) - 0.25)
    assert radius <= float(upper - y) <= radius * (1 + 1e-9)
    assert radius <= float(y - lower) <= radius * (1 + 1e-9)


@pytest.mark.parametrize(
    "solver",
    [kind(max_steps=4000) for kind in (Auto, Picard, Anderson, Broyden, Newton)],
    ids=lambda s: type(s).__name__,
)
def test_every_solver_gets_there(solver) -> None:
    """F itself is far from a contraction here."""
    weight = random_weight(0, 8, 1.0, 0.5)
    cell = layer(weight, "relu", solver=solver)
    assert gain(trace(cell.cell)) > 2
    b = torch.randn(16, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    solution = cell.solve(b)
    assert solution.certified
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, exact(weight, "relu", b), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scheme", ["peaceman_rachford", "forward_backward"])
@pytest.mark.parametrize("dtype", [torch.float64, None])
@pytest.mark.parametrize("activation", ["relu", "relu6", "identity"])
def test_splitting_chosen_by_hand(scheme: str, dtype: torch.dtype | None, activation: str) -> None:
    weight = random_weight(0, 8, 0.5, 0.8)
    solver = OperatorSplitting(scheme=scheme, max_steps=4000, proof_dtype=dtype)
    cell = layer(weight, activation, solver=solver)
    assert gain(trace(cell.cell)) > 1
    b = torch.randn(16, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    solution = cell.solve(b)
    assert solution.converged.all()
    assert solution.certified == (dtype is not None)
    torch.testing.assert_close(solution.value, exact(weight, activation, b), rtol=1e-3, atol=1e-3)
    assert cell.solve(b[:0]).value.shape == (0, 8)


def test_one_forward_backward_step() -> None:
    """z <- relu(z - a ((I - W) z - b)), written down again."""
    weight, b, z = random_weight(0, 4, 0.5, 0.8), torch.randn(3, 4).double(), torch.rand(3, 4).double()
    problem = FixedPointProblem(map=trace(layer(weight, "relu").cell), injection=b, theory=MonotoneTheory())
    step = ForwardBackward(problem, 0.2)
    torch.testing.assert_close(step.next_auxiliary(z), torch.relu(z - 0.2 * (z - z @ weight.t() - b)))
    default = ForwardBackward(problem, None).size
    eye = torch.eye(4, dtype=torch.float64)
    assert default <= 0.8 / float(torch.linalg.matrix_norm(eye - weight, 2)) ** 2


def test_splitting_refuses_other_cells() -> None:
    b = torch.rand(2, 3)
    with pytest.raises(ValueError, match="strongly monotone"):
        layer(1.5 * torch.eye(3), "relu", solver=OperatorSplitting()).solve(b)
    with pytest.raises(ValueError, match="relu6"):
        layer(-torch.eye(3), "tanh", solver=OperatorSplitting(scheme="forward_backward")).solve(b)
    with pytest.raises(ValueError, match="scheme"):
        OperatorSplitting(scheme="douglas_rachford")
    with pytest.raises(ValueError, match="size"):
        OperatorSplitting(size=0.0)


def test_gradients() -> None:
    torch.manual_seed(0)
    cell = MonotoneLinear(3, 5, "tanh", margin=0.2, dtype=torch.float64, solver=Auto(tol=1e-12, max_steps=3000))
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cell, (x,), eps=1e-6, atol=1e-7)
    parameters = list(cell.parameters())
    v = torch.randn(2, 5, dtype=torch.float64)
    ours = torch.autograd.grad(cell(x), parameters, v)
    b, weight = cell.injected(x), cell.weight
    z, u = torch.zeros_like(b), torch.zeros_like(b)
    inverse = torch.linalg.inv(2 * torch.eye(5, dtype=b.dtype) - weight)
    for _ in range(400):
        half = 2 * z - u
        u = 2 * (half + b) @ inverse.t() - half
        z = torch.tanh(u)
    for mine, unrolled in zip(ours, torch.autograd.grad(z, parameters, v), strict=True):
        torch.testing.assert_close(mine, unrolled, rtol=1e-7, atol=1e-8)


def test_gradients_where_the_jacobian_is_large() -> None:
    """The Neumann series of the adjoint diverges; the equation is solved all the same."""
    weight = random_weight(1, 12, 0.7, 0.1)
    assert float(torch.linalg.eigvals(weight).abs().max()) > 3
    cell = layer(weight, "relu", solver=Auto(tol=1e-8, max_steps=20000))
    b = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cell, (b,), eps=1e-7, atol=1e-4, rtol=1e-3)
    assert cell.last_solution.adjoint is None or cell.last_solution.adjoint.converged.all()


def test_training_keeps_the_certificate() -> None:
    torch.manual_seed(0)
    cell = MonotoneLinear(4, 6)
    optimizer = torch.optim.SGD(cell.parameters(), lr=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        (cell(torch.randn(8, 4)) - 1).square().mean().backward()
        optimizer.step()
        assert cell.certificate().kind in ("monotone operator", "bounded gain")
        assert cell.solve(torch.randn(8, 4)).certified


def test_hard_inputs() -> None:
    cell = MonotoneLinear(3, 4, injection="inside", solver=Auto(on_failure="ignore"))
    assert cell(torch.randn(0, 3)).shape == (0, 4)
    x = torch.randn(3, 3)
    alone = cell.solve(x)
    x[1, 0] = math.nan
    together = cell.solve(x)
    assert together.proven.tolist() == [True, False, True]
    torch.testing.assert_close(together.value[0], alone.value[0])
    for dtype in (torch.float16, torch.bfloat16):
        half = MonotoneLinear(3, 4, dtype=dtype)
        assert half(torch.randn(2, 3, dtype=dtype)).dtype == dtype
        assert half.last_solution.certified
    given_layer = MonotoneLinear(4, 4, injection="given")
    assert given_layer.solve(-torch.rand(2, 4)).certified


def test_rounding_of_large_sums_is_accounted_for() -> None:
    """W z = 1e13 (z_2, -z_1): its own rounding moves sigma(W z + b) by more than the residual shows."""
    skew = torch.tensor([[0.0, 1e13], [-1e13, 0.0]], dtype=torch.float64)
    chain = trace(layer(skew, "tanh").cell)
    b = torch.zeros(1, 2, dtype=torch.float64)
    lower, upper, _ = monotonicity(chain, b).enclose(b + 1, b + 1)
    assert float((upper - lower).min()) > 1


def test_a_state_of_more_dimensions() -> None:
    """W acts on the last one; the margin is that of every row."""
    weight = random_weight(0, 5, 1.0, 0.3)
    cell = layer(weight, "tanh", solver=Auto(tol=1e-8, max_steps=2000))
    b = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solution = cell.solve(b)
    assert solution.certified
    assert solution.converged.all()
    rows = exact(weight, "tanh", b.reshape(12, 5)).reshape(3, 4, 5)
    assert (solution.lower <= rows + 1e-12).all()
    assert (rows - 1e-12 <= solution.upper).all()


# -------------------------------------------------------------------------------------------------------- convolutions


def convolution(scale: float = 1.0, **options) -> MonotoneConv2d:
    torch.manual_seed(0)
    cell = MonotoneConv2d(2, 3, dtype=torch.float64, **options)
    with torch.no_grad():
        cell.recurrent.a.mul_(scale)
        cell.recurrent.b.mul_(scale)
    return cell


def as_matrix(cell: MonotoneConv2d, rows: int, columns: int) -> Tensor:
    """W on all pixels and channels, column by column."""
    size = cell.features * rows * columns
    unit = torch.eye(size, dtype=torch.float64).view(size, cell.features, rows, columns)
    return cell.recurrent(unit).detach().flatten(1).t()


@pytest.mark.parametrize("size", [(5, 4), (1, 3), (2, 2)])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_the_convolution_as_a_matrix(size: tuple[int, int], kernel_size: int) -> None:
    cell = convolution(2.0, kernel_size=kernel_size, margin=0.3)
    weight = as_matrix(cell, *size)
    chain = trace(cell.cell)
    step = chain.steps[0].rebind([t.detach() for t in chain.tensors])
    v = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(step.linear(v).flatten(1), v.flatten(1) @ weight.t())
    torch.testing.assert_close(step.transpose(v, v.shape).flatten(1), v.flatten(1) @ weight)
    torch.testing.assert_close(step.rigorous().linear(v), step.linear(v))
    # The margin is in the form; what bounds |W| does.
    symmetric = torch.eye(len(weight), dtype=torch.float64) - (weight + weight.t()) / 2
    assert float(torch.linalg.eigvalsh(symmetric)[0]) >= margin(chain) - 1e-12
    assert margin(chain) == 0.3
    units = torch.eye(len(weight), dtype=torch.float64).view(len(weight), 3, *size)
    bound = step.magnitude().linear(units).flatten(1).t()
    assert bool((bound >= weight.abs() - 1e-12).all())
    assert float(step.row_sums()) >= float(weight.abs().sum(1).max()) - 1e-12
    assert step.norm() >= float(torch.linalg.matrix_norm(weight, 2))
    # On Fourier modes it is the same map.
    image = torch.einsum("hwij,bjhw->bihw", step.frequencies(*size), torch.fft.rfft2(v))
    torch.testing.assert_close(torch.fft.irfft2(image, s=size), step.linear(v))


@given(st.integers(0, 10_000), st.sampled_from(["relu", "tanh", "sigmoid"]), st.sampled_from([0.3, 1.0, 2.0]))
def test_enclosures_of_convolutions_hold(seed: int, activation: str, scale: float) -> None:
    cell = convolution(scale, activation=activation, margin=0.3, injection="inside")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        cell.recurrent.a.mul_(torch.randn(cell.recurrent.a.shape, generator=generator, dtype=torch.float64))
    for dtype in (torch.float32, torch.float64):
        cell = cell.to(dtype)
        cell.solver = Auto(max_steps=3000, on_failure="ignore")
        x = 2 * torch.randn(2, 2, 4, 5, generator=generator).to(dtype)
        solution = cell.solve(x)
        assert solution.certified
        assert solution.converged.all()
        b = cell.injected(x).detach().double()
        weight = as_matrix(cell.double(), 4, 5)
        truth = exact(weight, activation, b.flatten(1)).view(b.shape)
        assert bool((solution.lower.double() <= truth + 1e-12).all())
        assert bool((truth <= solution.upper.double() + 1e-12).all())


def test_gradients_of_convolutions() -> None:
    cell = convolution(1.5, activation="tanh", margin=0.3, injection="inside", solver=Auto(tol=1e-9, max_steps=500))
    assert gain(trace(cell.cell)) > 2
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(cell, (x,), eps=1e-6, atol=1e-6)
    v = torch.randn(2, 3, 3, 4, dtype=torch.float64)
    names, parameters = zip(*cell.named_parameters(), strict=True)
    ours = torch.autograd.grad(cell(x), parameters, v)
    for parameter, gradient in zip(parameters, ours, strict=True):
        where = gradient.abs().argmax()
        flat = parameter.data.view(-1)
        ends = []
        for step in (1e-6, -2e-6):
            flat[where] += step
            ends.append(float((cell(x).detach() * v).sum()))
        flat[where] += 1e-6
        assert float(gradient.flatten()[where]) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5), names
    tangent = torch.func.jvp(cell, (x,), (torch.ones_like(x),))[1]
    wanted = (cell(x + 1e-6) - cell(x - 1e-6)) / 2e-6
    torch.testing.assert_close(tangent, wanted, rtol=1e-5, atol=1e-7)


def adjoint(weight: Tensor, activation: str, z: Tensor, b: Tensor, v: Tensor) -> Tensor:
    """g = W^T D g + v at the fixed point z."""
    slope = Activate(activation).activation.derivative(z @ weight.t() + b)
    system = torch.eye(len(weight), dtype=torch.float64) - slope.unsqueeze(2) * weight
    return torch.linalg.solve(system.mT, v.unsqueeze(2)).squeeze(2)


@given(st.integers(0, 10_000), st.sampled_from(["tanh", "sigmoid"]), st.sampled_from([0.0, 1e-3, 0.3]))
def test_adjoint_bound_of_any_candidate_and_any_enclosure(seed: int, activation: str, width: float) -> None:
    n = 1 + seed % 8
    weight = random_weight(seed, n, 1.0, 0.3)
    generator = torch.Generator().manual_seed(seed)
    b, v, far = torch.randn(3, 3, n, generator=generator, dtype=torch.float64)
    chain = trace(layer(weight, activation).cell).rebind([weight])
    truth = exact(weight, activation, b)
    g = adjoint(weight, activation, truth, b, v)
    ends = truth - width * torch.rand(3, n, generator=generator, dtype=torch.float64), truth + width
    proof = MonotoneGradientBound(chain, b, (ends[0] - 1e-13, ends[1] + 1e-13), margin(chain))
    for z in (*ends, truth):
        for candidate in (g + 1e-3 * far, far, adjoint(weight, activation, z, b, v)):
            _, _, bound = proof.finish(z, candidate, v)
            apart = (candidate - g).norm(dim=1) / candidate.norm(dim=1)
            assert bool((apart <= bound + 1e-12).all())


def test_adjoint_bound_in_closed_form() -> None:
    """sigma = identity, W = 1 - m: the error is |r|/m, and 1 + |W|/m is 1/m."""
    chain = trace(layer(torch.full((1, 1), 0.9, dtype=torch.float64), "identity").cell)
    b, v, c = torch.ones(1, 1).double(), torch.ones(1, 1).double(), torch.full((1, 1), 9.0).double()
    _, _, bound = MonotoneGradientBound(chain, b, (b - 1, b + 1), margin(chain)).finish(b, c, v)
    assert 1 / 9 <= float(bound) <= 1 / 9 * (1 + 1e-9)


def test_gradients_come_with_a_bound_where_the_jacobian_is_large() -> None:
    weight = random_weight(1, 6, 1.0, 0.3)
    assert float(torch.linalg.eigvals(weight).abs().max()) > 2
    cell = layer(weight.float(), "tanh", solver=Auto(tol=1e-6, max_steps=4000))
    b = torch.randn(3, 6, requires_grad=True)
    cell(b).sum().backward()
    assert bool((cell.last_solution.adjoint.error_bound < 0.1).all())


def test_splitting_solves_the_adjoint_of_wide_maps() -> None:
    """Beyond the widths that are factorised, and where powers of J do not converge."""
    n = 520
    generator = torch.Generator().manual_seed(0)
    a, b = 2 / n**0.5 * torch.randn(2, n, n, generator=generator, dtype=torch.float64)
    weight = MonotoneOperator(0.2)(a, b)
    cell = layer(weight, "tanh", solver=Auto(tol=1e-7, max_steps=500))
    x = torch.randn(2, n, generator=generator, dtype=torch.float64, requires_grad=True)
    z = cell(x)
    v = torch.randn(2, n, generator=generator, dtype=torch.float64)
    (found,) = torch.autograd.grad(z, x, v)
    slope = 1 - z.detach() ** 2
    system = torch.eye(n, dtype=torch.float64) - slope.unsqueeze(2) * weight
    assert float(torch.linalg.eigvals(torch.eye(n) - system[0]).abs().max()) > 1.5
    g = torch.linalg.solve(system.mT, v.unsqueeze(2)).squeeze(2)
    torch.testing.assert_close(found, slope * g, rtol=1e-5, atol=1e-6)
    assert cell.last_solution.adjoint.converged.all()


def test_convolutions_refuse_what_they_cannot_do() -> None:
    with pytest.raises(ValueError, match="odd"):
        MonotoneConv2d(2, 2, 4)
    with pytest.raises(ValueError, match="margin"):
        MonotoneConv2d(2, 2, margin=-1.0)
    with pytest.raises(ValueError, match="slopes"):
        MonotoneConv2d(2, 2, activation="erf")
    cell = convolution()
    # Nonnegative kernels make no nonnegative map.
    with torch.no_grad():
        cell.recurrent.a.abs_()
        cell.recurrent.b.abs_()
    cell = Equilibrium(nn.Sequential(cell.recurrent, Inject(), Activate("tanh")), injection="softplus")
    assert cell.certificate().kind != "positive concave"
    with torch.no_grad():
        cell.cell[0].a[0, 0, 0, 0] = math.nan
    assert not cell.certificate()
    assert convolution()(torch.zeros(0, 2, 4, 4, dtype=torch.float64)).shape == (0, 3, 4, 4)


@pytest.mark.parametrize("entry", [1e308, -1e300])
def test_margins_of_weights_that_overflow_are_refused(entry: float) -> None:
    """Finite weights whose symmetric part, or its norm, is not: a refusal, not an error of the decomposition."""
    module = nn.Linear(3, 3, bias=False, dtype=torch.float64)
    with torch.no_grad():
        module.weight.fill_(entry)
    layer = Equilibrium(nn.Sequential(module, Inject(), Activate("relu")), injection="free")
    assert not layer.certificate()


@pytest.mark.parametrize("margin", [math.nan, math.inf, 0.0, -1.0])
def test_margins_of_convolutions_that_were_assigned_are_checked(margin: float) -> None:
    layer = MonotoneConv2d(1, 2)
    assert layer.certificate().kind == "monotone operator"
    layer.recurrent.margin = margin
    assert layer.certificate().kind != "monotone operator"


@pytest.mark.parametrize("weight", [-3.0, -0.5, 0.5, 0.99])
@pytest.mark.parametrize("scale", [1e-250, 1e-170, 1.0, 1e170, 1e250])
@pytest.mark.parametrize("start", [-1.0, 0.0, 0.9, 1e5])
def test_the_bound_is_attained_by_linear_cells(weight: float, scale: float, start: float) -> None:
    """z = w z + b, from z = start z*: |F(z) - z*| = |w| |z - z*| is the bound itself, at every scale."""
    chain = trace(layer(weight * torch.eye(2, dtype=torch.float64), "identity").cell)
    b = torch.tensor([[scale, -2 * scale]], dtype=torch.float64)
    exact = b / (1 - weight)
    z = start * exact
    lower, upper, proven = monotonicity(chain, b).enclose(z, chain(z, b).detach())
    assert proven.all()
    assert (lower <= exact).all()
    assert (exact <= upper).all()
    # The norm of both entries bounds each of them.
    reach = abs(weight) * abs(start - 1) * float(exact.norm() if 1e-100 < scale < 1e100 else exact.abs().max() * 1.1181)
    noise = 1e-13 * (1 + abs(start)) * float(exact.abs().max()) / (1 - weight) ** 2
    assert float((upper - lower).max()) / 2 <= 1.001 * reach + noise
