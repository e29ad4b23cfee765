"""torch.func, forward-mode automatic differentiation and torch.compile through equilibrium layers."""

import itertools
import math

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from perron.gradients import Gradient, Implicit, JacobianFree
from perron.nn import Activate, Equilibrium, Inject, PositiveConcaveConv2d, PositiveConcaveLinear, SparseLinear
from perron.solvers import Auto, Picard

EXACT = Auto(tol=1e-10, max_steps=1000)


class Sine(nn.Module):
    """An unverified contraction."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        with torch.no_grad():
            self.linear.weight.mul_(0.4)

    def forward(self, z, x):
        return 0.5 * torch.sin(self.linear(z) + x)


def sparse_cell() -> nn.Module:
    cell = nn.Sequential(SparseLinear(torch.tensor([[0, 1, 2, 2], [1, 2, 0, 2]]), 3), Inject(), Activate("tanh"))
    with torch.no_grad():
        cell[0].weight.abs_()
    return Equilibrium(cell, injection="softplus", solver=EXACT)


LAYERS = {
    "linear": (lambda: PositiveConcaveLinear(3, 4, solver=EXACT), (5, 3)),
    "picard": (lambda: PositiveConcaveLinear(3, 4, "sigmoid", solver=Picard(tol=1e-10, max_steps=1000)), (5, 3)),
    "convolution": (lambda: PositiveConcaveConv2d(1, 2, solver=EXACT), (4, 1, 3, 3)),
    "sparse": (sparse_cell, (5, 3)),
    "unverified": (lambda: Equilibrium(Sine(), solver=EXACT), (5, 3)),
}


@pytest.fixture(params=list(LAYERS))
def problem(request):
    make, shape = LAYERS[request.param]
    layer = make().double()
    x = torch.randn(shape, dtype=torch.float64)
    parameters = {k: v.detach() for k, v in layer.named_parameters()}
    return lambda p, x: functional_call(layer, p, (x,)), parameters, x


def squares(f):
    return lambda p, x: f(p, x).square().sum()


def close(found, expected) -> None:
    if isinstance(expected, dict):
        for key in expected:
            close(found[key], expected[key])
        return
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_vmap_over_samples_parameters_and_both(problem) -> None:
    f, p, x = problem
    close(vmap(lambda v: f(p, v.unsqueeze(0)).squeeze(0))(x), f(p, x))
    many = {k: torch.stack([v, 0.9 * v, 1.1 * v]) for k, v in p.items()}
    expected = torch.stack([f({k: v[i] for k, v in many.items()}, x) for i in range(3)])
    close(vmap(f, (0, None))(many, x), expected)
    inputs = torch.stack([x, x + 1, x - 1], 1)
    expected = torch.stack([f({k: v[i] for k, v in many.items()}, inputs[:, i]) for i in range(3)])
    close(vmap(f, (0, 1))(many, inputs), expected)


def test_per_sample_gradients(problem) -> None:
    f, p, x = problem
    found = vmap(grad(lambda p, v: squares(f)(p, v.unsqueeze(0))), (None, 0))(p, x)
    for k in range(len(x)):
        expected = grad(squares(f))(p, x[k : k + 1])
        close({n: g[k] for n, g in found.items()}, expected)


def test_jacobians_of_both_modes_agree_with_finite_differences(problem) -> None:
    f, p, x = problem
    x = x[:2]
    for argument in (0, 1):
        close(jacfwd(f, argument)(p, x), jacrev(f, argument)(p, x))
    t = torch.randn_like(x)
    _, found = jvp(lambda v: f(p, v), (x,), (t,))
    h = 1e-5
    close(found, (f(p, x + h * t) - f(p, x - h * t)) / (2 * h))
    with forward_ad.dual_level():
        dual = f(p, forward_ad.make_dual(x, t))
        close(forward_ad.unpack_dual(dual).tangent, found)
    close(vjp(lambda v: f(p, v), x)[1](torch.ones_like(f(p, x)))[0], grad(lambda v: f(p, v).sum())(x))


def test_second_order_in_every_allowed_mode(problem) -> None:
    f, p, x = problem
    x = x[:2]
    loss = squares(f)
    expected = torch.autograd.functional.hessian(lambda v: loss(p, v), x)
    close(hessian(lambda v: loss(p, v))(x), expected)
    close(jacrev(jacrev(lambda v: loss(p, v)))(x), expected)
    close(jacrev(jacfwd(lambda v: loss(p, v)))(x), expected)
    mixed = jacfwd(jacrev(loss, 0), 1)(p, x)
    other = jacrev(jacfwd(loss, 0), 1)(p, x)
    close(mixed, other)


def test_forward_over_forward_is_refused_rather_than_wrong(problem) -> None:
    f, p, x = problem
    with pytest.raises(NotImplementedError, match="hessian"):
        jacfwd(jacfwd(lambda v: squares(f)(p, v)))(x)
    with pytest.raises(NotImplementedError, match="hessian"):
        jvp(lambda a: jvp(lambda v: f(p, v), (a,), (a,))[1], (x,), (x,))


def test_certificate_and_bad_injections_under_transforms() -> None:
    layer = Equilibrium(nn.Sequential(nn.Linear(2, 2, bias=False), Inject(), Activate("tanh")))
    with torch.no_grad():
        layer.cell[0].weight.abs_()
    b = torch.rand(4, 2) + 0.1
    vmap(lambda v: layer(v.unsqueeze(0)))(b)
    assert layer.last_solution.certified
    assert len(layer.last_solution.value) == 4
    b[1, 1] = -1
    with pytest.raises(ValueError, match="must be positive"):
        vmap(lambda v: layer(v.unsqueeze(0)))(b)


def test_forward_gradcheck() -> None:
    layer = PositiveConcaveLinear(3, 4, solver=EXACT).double()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(layer, (x,), check_fwd_over_rev=True)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), PositiveConcaveLinear(8, 8), nn.Linear(8, 3), nn.Tanh())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_networks_train_and_infer_as_uncompiled_ones(backend: str) -> None:
    torch._dynamo.reset()
    plain = network()
    compiled = torch.compile(plain, backend=backend)
    x = torch.randn(16, 6)
    torch.testing.assert_close(compiled(x), plain(x), rtol=1e-5, atol=1e-6)
    gradients = []
    for model in (compiled, plain):
        plain.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in plain.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert plain[2].last_solution.certified
    with torch.no_grad():
        torch.testing.assert_close(compiled(x[:3]), plain(x[:3]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gradient", [Implicit(), JacobianFree()])
@pytest.mark.parametrize(
    "layer", [PositiveConcaveLinear(3, 3), Equilibrium(Sine(), injection="free")], ids=["read", "opaque"]
)
def test_the_only_graph_break_is_the_solve(layer: Equilibrium, gradient: Gradient) -> None:
    torch._dynamo.reset()
    layer.gradient = gradient
    explanation = torch._dynamo.explain(nn.Sequential(nn.Linear(6, 3), layer, nn.Tanh()))(torch.randn(4, 6))
    assert explanation.graph_break_count <= 1, [str(r.reason) for r in explanation.break_reasons]


def test_compiled_layers_refuse_what_layers_refuse() -> None:
    torch._dynamo.reset()
    layer = Equilibrium(nn.Sequential(nn.Linear(2, 2, bias=False), Inject(), Activate("tanh")))
    with torch.no_grad():
        layer.cell[0].weight.abs_()
    with pytest.raises(ValueError, match="must be positive"):
        torch.compile(layer, backend="eager")(torch.tensor([[1.0, -1.0]]))
    value = torch.compile(layer, backend="eager")(torch.tensor([[1.0, math.nan], [1.0, 1.0]]))
    assert value[0].isnan().all()
    assert value[1].isfinite().all()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3), 2)))
def test_vmap_over_weights_of_which_some_are_proven_otherwise_or_not_at_all(order: tuple[int, int]) -> None:
    """Certified as concave, by its gain, and not at all: values and gradients are those of each alone, and without bounds."""
    every = [[[0.2, 0.3], [0.1, 0.2]], [[0.2, -0.3], [0.1, -0.2]], [[0.5, -0.9], [-0.9, 0.5]]]
    weights = torch.tensor(every, dtype=torch.float64)[list(order)]
    layer = Equilibrium(
        nn.Sequential(nn.Linear(2, 2, bias=False, dtype=torch.float64), Inject(), Activate("tanh")),
        solver=Auto(tol=1e-10, max_steps=2000),
    )
    x = torch.rand(3, 2, dtype=torch.float64) + 0.5

    def loss(weight: torch.Tensor) -> torch.Tensor:
        return functional_call(layer, {"cell.0.weight": weight}, (x,)).square().sum()

    slopes, found = vmap(torch.func.grad_and_value(loss))(weights)
    for k, weight in enumerate(weights):
        alone, value = torch.func.grad_and_value(loss)(weight)
        torch.testing.assert_close(found[k], value, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(slopes[k], alone, rtol=1e-6, atol=1e-8)
