import copy
import gc
import threading

import pytest
import torch
from hypothesis import given, settings
from torch import nn

from perron.cells import Activate, Inject, trace
from perron.nn import Equilibrium, PositiveConcaveConv2d, PositiveConcaveLinear
from perron.solvers import Auto, Picard
from perron.solvers.adjoint import solve_adjoint
from perron.solvers.aggregation import Aggregation
from perron.theory.positive_concave import ConcaveGradientBound, PositiveConcave
from perron.theory.weighted_norm import norm
from problems import dense_layer, dense_problems, truth

EXACT = Picard(tol=1e-11, max_steps=2000)
ACTIVATIONS = ["tanh", "softsign", "sigmoid", "one_minus_exp", "arctan", "erf", "log1p", "sqrt_shift"]


class Contraction(nn.Module):
    """An unverified cell with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        with torch.no_grad():
            self.linear.weight.mul_(0.4)

    def forward(self, z, x):
        return torch.sin(self.linear(z)) * 0.5 + x


def functional(layer: nn.Module):
    names = [n for n, _ in layer.named_parameters()]
    return lambda x, *p: torch.func.functional_call(layer, dict(zip(names, p, strict=True)), (x,))


def cases():
    torch.manual_seed(0)
    for name in ACTIVATIONS:
        yield name, PositiveConcaveLinear(3, 4, name, solver=EXACT), (2, 3)
    yield "identity", PositiveConcaveLinear(3, 4, "identity", initial_radius=0.5, solver=EXACT), (2, 3)
    yield "weight norm", PositiveConcaveLinear(3, 3, weight_norm=True, solver=EXACT), (2, 3)
    yield "pre", PositiveConcaveLinear(3, 3, injection="pre", solver=EXACT), (2, 3)
    yield "conv", PositiveConcaveConv2d(1, 2, solver=EXACT), (2, 1, 3, 3)
    yield "opaque", Equilibrium(Contraction(), solver=EXACT), (2, 4)


@pytest.mark.parametrize(("name", "layer", "shape"), list(cases()), ids=lambda v: v if isinstance(v, str) else "")
def test_gradcheck_and_gradgradcheck(name, layer, shape) -> None:
    layer = layer.double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    parameters = tuple(layer.parameters())
    assert torch.autograd.gradcheck(functional(layer), (x, *parameters))
    assert torch.autograd.gradgradcheck(functional(layer), (x, *parameters))


def test_third_derivative() -> None:
    layer = dense_layer(torch.tensor([[0.7]], dtype=torch.float64), "tanh", solver=EXACT)
    b = torch.tensor([[0.3]], dtype=torch.float64, requires_grad=True)

    def third(function):
        d = function(b)
        for _ in range(3):
            (d,) = torch.autograd.grad(d.sum(), b, create_graph=True)
        return float(d.detach())

    def unrolled(v):
        z = torch.zeros_like(v)
        for _ in range(120):
            z = torch.tanh(0.7 * z + v)
        return z

    assert third(layer) == pytest.approx(third(unrolled), rel=1e-6)


@given(dense_problems(["tanh", "sigmoid", "erf", "log1p"]))
@settings(max_examples=25)
def test_gradient_agrees_with_unrolled_autograd_and_its_bound_holds(problem) -> None:
    layer, b = problem
    layer = layer.double()
    b = b.double().requires_grad_()
    layer.solver = Picard(tol=1e-6, max_steps=5000, on_failure="ignore")
    value = layer(b)
    v = torch.randn_like(value)
    (found,) = torch.autograd.grad(value, b, v)
    adjoint = layer.last_solution.adjoint
    # The exact adjoint, by a linear solve at the exact fixed point.
    chain = trace(layer.cell)
    z = truth(layer, b)
    with torch.no_grad():
        diagonal = chain.linearize(z, b).slope
        weight = chain.affine[0].weights[0]
        system = torch.eye(z.shape[1], dtype=z.dtype) - (diagonal.unsqueeze(-1) * weight).transpose(1, 2)
        exact = torch.linalg.solve(system, v)
        at_value = chain.linearize(value, b).slope
    converged = adjoint.converged & layer.last_solution.converged
    reference = diagonal * exact
    error = ((found - reference).abs().amax(1) / reference.abs().amax(1).clamp_min(1e-300))[converged]
    assert (error < 1e-2).all()
    # g = D^-1 found, where D is not flat; the bound is in a weighted norm, so test it through a bound for every norm.
    g = torch.where(at_value > 1e-6, found / at_value, exact)
    g, report = solve_adjoint(
        chain,
        value.detach(),
        b.detach(),
        v,
        layer.solver,
        bounds=(layer.last_solution.lower, layer.last_solution.upper),
        theory=PositiveConcave(),
    )

    weights = ConcaveGradientBound(
        chain,
        b.detach(),
        (layer.last_solution.lower, layer.last_solution.upper),
        model=Aggregation.of(chain, b.detach()),
    ).weights
    true = norm(weights, g - exact) / norm(weights, g)
    proven = report.error_bound.isfinite()
    assert (true[proven] <= report.error_bound[proven] * (1 + 1e-9) + 1e-12).all()


def test_adjoint_bound_in_closed_form() -> None:
    """z = w z + b: g = v/(1 - w)."""
    layer = dense_layer(torch.tensor([[0.9]], dtype=torch.float64), "identity", solver=Picard(tol=1e-8))
    b = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    layer(b).sum().backward()
    assert float(b.grad) == pytest.approx(10, rel=1e-7)
    adjoint = layer.last_solution.adjoint
    assert adjoint.certified
    assert float(adjoint.error_bound) < 1e-7
    assert abs(float(b.grad) - 10) / 10 <= float(adjoint.error_bound)


@pytest.mark.parametrize("scale", [1e-38, 1e-42, 1e-45])
def test_a_gradient_that_underflows_is_not_certified_as_exact(scale: float) -> None:
    """z = w z + b in float32: g = v/(1 - w), rounded to the spacing of denormal numbers."""
    layer = dense_layer(torch.tensor([[0.3]]), "identity", solver=Picard(on_failure="ignore"))
    b = torch.ones(1, 1, requires_grad=True)
    value = layer(b)
    v = torch.full_like(value, scale)
    (found,) = torch.autograd.grad(value, b, v)
    exact = float(v) / (1 - float(layer.cell[0].weight))
    adjoint = layer.last_solution.adjoint
    assert abs(float(found) - exact) / max(float(found), 1e-300) <= float(adjoint.error_bound) * (1 + 1e-6)


@pytest.mark.parametrize("scale", [1e-20, 1e-7, 1.0, 1e12])
def test_gradient_is_relative_to_the_scale_of_the_loss(scale: float) -> None:
    layer = PositiveConcaveLinear(5, 6).double()
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    (unit,) = torch.autograd.grad(layer(x).sum(), x)
    (scaled,) = torch.autograd.grad(layer(x).sum() * scale, x)
    torch.testing.assert_close(scaled / scale, unit, rtol=1e-9, atol=0)


def test_gradient_does_not_depend_on_training_mode() -> None:
    layer = PositiveConcaveLinear(5, 6)
    x = torch.randn(4, 5, requires_grad=True)
    gradients = [torch.autograd.grad(layer.train(mode)(x).sum(), x)[0] for mode in (True, False)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_no_grad_inference_mode_and_frozen_parameters() -> None:
    layer = PositiveConcaveLinear(5, 6)
    x = torch.randn(4, 5)
    expected = layer(x).detach()
    with torch.no_grad():
        assert not layer(x).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected)
    layer.requires_grad_(False)
    y = layer(x.requires_grad_())
    y.sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in layer.parameters())


def test_two_calls_and_two_backwards() -> None:
    layer = PositiveConcaveLinear(5, 5)
    x = torch.randn(4, 5, requires_grad=True)
    y = layer(x)
    (once,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    layer(torch.randn(4, 5)).sum().backward()
    (again,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(once, again, rtol=0, atol=0)
    stacked = layer(layer(x))
    stacked.sum().backward()
    assert torch.isfinite(x.grad).all()


def test_a_weight_changed_between_forward_and_backward_is_an_error() -> None:
    layer = dense_layer(torch.rand(3, 3), "tanh")
    y = layer(torch.rand(2, 3) + 0.1)
    with torch.no_grad():
        layer.cell[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_memory_does_not_grow_over_training() -> None:
    layer = PositiveConcaveLinear(5, 6)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.01)

    def live(steps: int) -> int:
        for _ in range(steps):
            optimiser.zero_grad()
            layer(torch.randn(8, 5)).square().sum().backward()
            optimiser.step()
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    before = live(5)
    assert live(200) <= before


def test_saved_memory_is_independent_of_the_number_of_steps() -> None:
    sizes = []
    for steps in (10, 100, 1000):
        saved = []
        layer = PositiveConcaveLinear(
            5, 6, solver=Picard(tol=1e-30, stop="residual", max_steps=steps, on_failure="ignore")
        )
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            layer(torch.randn(8, 5)).sum().backward()
        sizes.append(sum(saved))
    assert len(set(sizes)) == 1


def test_autocast() -> None:
    layer = nn.Sequential(nn.Linear(5, 6), PositiveConcaveLinear(6, 6, injection="pre"), nn.Linear(6, 2))
    x = torch.randn(4, 5)
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        loss = y.float().square().sum()
        loss.backward()
    assert y.dtype == torch.bfloat16
    assert layer[1].last_solution.certified
    torch.testing.assert_close(y.float(), exact, rtol=0.1, atol=0.1)
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_layers(dtype: torch.dtype) -> None:
    layer = PositiveConcaveLinear(5, 6)
    half = copy.deepcopy(layer).to(dtype)
    x = torch.randn(4, 5)
    y = half(x.to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert half.input.weight.grad.dtype == dtype


def test_threads() -> None:
    layer = PositiveConcaveLinear(5, 6)
    xs = [torch.randn(4, 5) for _ in range(8)]
    expected = [layer(x).detach() for x in xs]
    found: dict[int, torch.Tensor] = {}

    def work(k: int) -> None:
        for _ in range(5):
            found[k] = layer(xs[k])
            found[k].sum().backward()

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for k in range(8):
        torch.testing.assert_close(found[k].detach(), expected[k], rtol=0, atol=0)


def test_nan_gradient_stays_in_its_sample() -> None:
    layer = PositiveConcaveLinear(5, 6, solver=Picard(on_failure="ignore"))
    x = torch.randn(4, 5, requires_grad=True)
    (clean,) = torch.autograd.grad(layer(x).sum(), x)
    v = torch.ones(4, 6)
    v[1, 2] = torch.nan
    (dirty,) = torch.autograd.grad(layer(x), x, v)
    keep = [0, 2, 3]
    torch.testing.assert_close(dirty[keep], clean[keep], rtol=1e-3, atol=1e-6)


def test_batch_norm_inside_a_cell_counts_one_batch() -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, z, x):
            return 0.3 * torch.tanh(self.norm(z + x)) + x

    layer = Equilibrium(Normalised(), solver=Picard(tol=1e-5))
    layer(torch.randn(16, 4)).sum().backward()
    assert int(layer.cell.norm.num_batches_tracked) == 1
    assert not layer.certificate()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_a_saturated_relu6_have_finite_bounds(dtype: torch.dtype) -> None:
    """z1 = 6 whatever its argument is, and z2 = 3 + b2 + z2/4: dz/db = diag(0, 4/3), and g = (v1 + 2/3 v2, 4/3 v2)."""
    cell = nn.Sequential(nn.Linear(2, 2, bias=False, dtype=dtype), Inject(), Activate("relu6"))
    with torch.no_grad():
        cell[0].weight.copy_(torch.tensor([[3.0, 1.0], [0.5, 0.25]]))
    layer = Equilibrium(cell, solver=Auto(tol=1e-5))
    b = torch.tensor([[82.0, 1.0], [1.0, 0.5]], dtype=dtype, requires_grad=True)
    value = layer(b)
    torch.testing.assert_close(value, torch.tensor([[6.0, 16 / 3], [6.0, 14 / 3]], dtype=dtype), rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(value.sum(), b)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 4 / 3]] * 2, dtype=dtype), rtol=1e-5, atol=0)
    adjoint = layer.last_solution.adjoint
    assert adjoint.converged.all()
    assert (adjoint.error_bound <= 1e-5).all()
