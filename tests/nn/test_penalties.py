import copy
import math

import pytest
import torch
from torch import Tensor, nn

from perron.cells import as_map
from perron.gradients import Implicit, JacobianFree, Phantom
from perron.nn import (
    GraphEquilibrium,
    PositiveConcaveLinear,
    SubhomogeneousLinear,
    UnconstrainedLinear,
    penalties,
)
from perron.nn.equilibrium import Equilibrium
from perron.nn.penalties import PENALTIES
from perron.solvers import Picard

TIGHT = Picard(tol=1e-12, max_steps=2000, on_failure="ignore")


def _states(layer: Equilibrium, *inputs: Tensor) -> list[penalties.State]:
    with penalties.observe(layer) as states:
        layer(*inputs)
    return states


def _jacobian(state: penalties.State) -> Tensor:
    """(batch, n, n), by automatic differentiation."""
    z = state.value.detach()
    return torch.stack(
        [
            torch.func.jacrev(lambda v, k=k: state.map(v[None], state.injection[k : k + 1])[0])(z[k])
            for k in range(len(z))
        ]
    )


def _layer(radius: float = 1.2, **options: object) -> UnconstrainedLinear:
    torch.manual_seed(0)
    return UnconstrainedLinear(4, 5, initial_radius=radius, dtype=torch.float64, solver=TIGHT, **options)


def test_frobenius_norm_is_estimated_without_bias():
    (state,) = _states(_layer(), torch.randn(3, 4, dtype=torch.float64))
    found = penalties.jacobian(state, samples=4000, generator=torch.Generator().manual_seed(0))
    wanted = _jacobian(state).square().sum((1, 2)) / 5
    assert torch.allclose(found, wanted, rtol=0.05)


def test_residual_ratio_is_the_spectral_radius_and_gives_the_steps():
    torch.manual_seed(0)
    layer = PositiveConcaveLinear(4, 6, "tanh", dtype=torch.float64, solver=TIGHT, initial_radius=0.95)
    (state,) = _states(layer, torch.randn(3, 4, dtype=torch.float64))
    radius = torch.linalg.eigvals(_jacobian(state)).abs().amax(1)
    assert torch.allclose(penalties.residual_ratio(state, burn_in=60), radius, rtol=1e-6)
    steps = penalties.picard_steps(state, tol=1e-4, burn_in=60)
    assert torch.allclose(math.log(1e-4) / radius.log(), steps, rtol=1e-5)


def test_steps_go_on_with_the_slope_of_the_curve_where_picard_does_not_converge():
    ratios = torch.tensor([0.98 - 1e-9, 0.98 + 1e-9, 1.5], dtype=torch.float64, requires_grad=True)

    class Scaled(nn.Module):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return z * ratios[:, None]

    state = penalties.State(
        map=as_map(Scaled())[0], injection=torch.zeros(3, 2).double(), value=torch.zeros(3, 2).double()
    )
    steps = penalties.picard_steps(state)
    (slope,) = torch.autograd.grad(steps.sum(), ratios)
    assert bool(steps.isfinite().all())
    steps = steps.detach()
    assert abs(float(steps[0] - steps[1])) < 1e-3
    assert torch.allclose(slope, slope[0].expand(3), rtol=1e-3)


@pytest.mark.parametrize("name", list(PENALTIES))
@pytest.mark.parametrize("kind", ["plain", "normalised"])
def test_gradients_match_finite_differences_through_the_fixed_point(name: str, kind: str):
    if kind == "plain":
        layer: Equilibrium = _layer()
    else:
        torch.manual_seed(0)
        layer = SubhomogeneousLinear(4, 3, "tanh+1.2", normalize=2.0, dtype=torch.float64, solver=TIGHT)
    x = torch.randn(3, 4, dtype=torch.float64)
    names = [n for n, _ in layer.named_parameters()]

    # The burn-in is not differentiated: without it the whole is a function that can be differenced.
    options = {} if name == "jacobian" else {"burn_in": 0}

    def value(*parameters: Tensor) -> Tensor:
        with penalties.observe(layer) as states:
            torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))
        return PENALTIES[name](states[0], generator=torch.Generator().manual_seed(1), **options).mean()

    parameters = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    assert torch.autograd.gradcheck(value, parameters, eps=1e-6, atol=1e-5, rtol=1e-4)


def test_penalties_of_an_unread_cell_are_those_of_the_whole_batch():
    torch.manual_seed(0)
    w = torch.randn(3, 3, dtype=torch.float64) / 6

    def cell(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ w + 2 * z.flip(0) @ w + x)

    layer = Equilibrium(cell, injection="free", solver=TIGHT)
    (state,) = _states(layer, torch.randn(4, 3, dtype=torch.float64))
    jacobian = torch.func.jacrev(lambda v: cell(v.view(4, 3), state.injection[0]).flatten())(
        state.value.detach().flatten()
    )
    radius = torch.linalg.eigvals(jacobian).abs().max()
    assert torch.allclose(penalties.residual_ratio(state, burn_in=200, steps=50), radius, rtol=1e-2)
    found = penalties.jacobian(state, samples=4000, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(found, jacobian.square().sum() / 12, rtol=0.05)


def test_penalty_shares_the_adjoint_of_the_loss():
    layer = _layer()
    with penalties.observe(layer) as states:
        z = layer(torch.randn(3, 4, dtype=torch.float64))
    loss = z.sum() + penalties.residual_ratio(states[0]).sum()
    with torch.autograd.profiler.profile() as record:
        loss.backward()
    assert sum(e.name == "_FixedPointBackward" for e in record.function_events) == 1


def test_training_on_a_penalty_lowers_what_it_measures():
    layer = _layer(3.0)
    layer.solver = Picard(tol=1e-4, max_steps=500, on_failure="ignore")
    x = torch.randn(64, 4, dtype=torch.float64)
    optimizer = torch.optim.Adam(layer.parameters(), 0.02)
    before = layer.solve(x).steps.double().mean()
    for _ in range(30):
        optimizer.zero_grad()
        (state,) = _states(layer, x)
        penalties.picard_steps(state).mean().backward()
        optimizer.step()
    assert layer.solve(x).steps.double().mean() < 0.7 * before


def test_states_are_those_of_the_block_and_every_kind_of_layer_has_them():
    path = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    graph = GraphEquilibrium("tanh")
    (state,) = _states(graph, torch.randn(3, 2), path)
    assert penalties.jacobian(state).shape == (2,)
    layer = _layer()
    x = torch.randn(3, 4, dtype=torch.float64)
    with penalties.observe(nn.Sequential(layer)) as states:
        layer(x)
        layer(x)
    layer(x)
    assert len(states) == 2
    assert not layer._observers
    with pytest.raises(RuntimeError), penalties.observe(layer):
        raise RuntimeError
    assert not layer._observers
    assert copy.deepcopy(layer)._observers == []


@pytest.mark.parametrize("options", [{"samples": 0}, {"steps": 0}, {"burn_in": -1}, {"tol": 0.0}])
def test_options_out_of_range_are_refused(options: dict[str, float]):
    (state,) = _states(_layer(), torch.randn(3, 4, dtype=torch.float64))
    name = "jacobian" if "samples" in options else "picard_steps"
    with pytest.raises(ValueError, match=str(next(iter(options)))):
        PENALTIES[name](state, **options)


def test_empty_batch_and_no_gradient():
    layer = _layer()
    (state,) = _states(layer, torch.zeros(0, 4, dtype=torch.float64))
    assert all(p(state).shape == (0,) for p in PENALTIES.values())
    with torch.no_grad():
        (state,) = _states(layer, torch.randn(3, 4, dtype=torch.float64))
        assert bool(penalties.jacobian(state).isfinite().all())


# ------------------------------------------------------------------------------------------------- approximate gradients


def test_long_phantom_gradients_are_the_implicit_ones():
    x = torch.randn(3, 4, dtype=torch.float64)
    exact, phantom = _layer(), _layer(gradient=Phantom(steps=400, damping=0.7))
    found = []
    for layer in (exact, phantom):
        z = layer(x)
        z.square().sum().backward()
        found.append([p.grad for p in layer.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in zip(*found, strict=True))


def test_jacobian_free_gradient_is_that_of_one_evaluation():
    x = torch.randn(3, 4, dtype=torch.float64)
    layer = _layer(gradient=JacobianFree())
    z = layer(x)
    z.sum().backward()
    found = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    torch.tanh(z.detach() @ layer.weight.t() + layer.input(x)).sum().backward()
    assert all(torch.allclose(a, p.grad) for a, p in zip(found, layer.parameters(), strict=True))


@pytest.mark.parametrize("gradient", [JacobianFree(), Phantom(steps=3, damping=0.5)])
def test_approximate_gradients_do_not_touch_the_value_or_its_proof(gradient):
    torch.manual_seed(0)
    layer = PositiveConcaveLinear(4, 5)
    x = torch.randn(3, 4)
    exact = layer(x)
    layer.gradient = gradient
    z = layer(x)
    assert torch.equal(z, exact)
    assert layer.last_solution.certified
    z.sum().backward()
    assert layer.last_solution.adjoint is None
    assert bool((layer.input.weight.grad != 0).any())


def test_wrong_gradients_are_refused():
    with pytest.raises(TypeError, match="gradient must be"):
        _layer(gradient="exact")
    layer = _layer()
    with pytest.raises(TypeError, match="gradient must be"):
        layer.gradient = "phantom"
    assert layer.gradient == Implicit()
    for options in ({"steps": 0}, {"damping": 0.0}, {"damping": 1.5}):
        with pytest.raises(ValueError, match="damping"):
            Phantom(**options)
