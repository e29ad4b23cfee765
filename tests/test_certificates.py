import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

import perron
from perron.activations import ACTIVATIONS, Activation
from perron.cells import Activate, Inject
from perron.certificates import certify, spectral_radius_bound
from perron.constraints import nonnegative
from perron.nn import Equilibrium, PositiveConcaveConv2d, PositiveConcaveLinear
from perron.solvers import Picard
from problems import dense_layer


def positive(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.abs_().add_(1e-3)
    return module


@pytest.mark.parametrize("name", [n for n, a in ACTIVATIONS.items() if a.asymptotic_slope == 0])
def test_every_sublinear_activation_is_certified_whatever_the_scale(name: str) -> None:
    certificate = certify(dense_layer(torch.rand(5, 5) * 1e4, name))
    assert certificate.exists
    assert certificate.unique
    assert certificate.geometric
    assert certificate.refusal is None
    assert name in str(certificate)


def test_a_priori_rate_only_where_the_theory_gives_one() -> None:
    # sup v sigma'(v)/sigma(v) of the logistic function.
    assert certify(PositiveConcaveLinear(3, 3, "sigmoid")).rate == pytest.approx(0.27846, rel=1e-3)
    assert certify(PositiveConcaveLinear(3, 3, "tanh")).rate is None


@pytest.mark.parametrize(
    ("spoil", "word"), [(-1e-30, "nonnegative"), (float("nan"), "finite"), (float("inf"), "finite")]
)
def test_one_bad_weight_is_refused(spoil: float, word: str) -> None:
    weight = torch.rand(6, 6)
    weight[2, 3] = spoil
    certificate = certify(dense_layer(weight, "tanh"))
    assert not certificate
    assert word in str(certificate.refusal)


@given(st.integers(1, 12), st.integers(0, 10_000), st.floats(0.01, 1.0))
def test_spectral_radius_bound_is_a_bound_and_tight(n: int, seed: int, density: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.rand(n, n, generator=generator) * (torch.rand(n, n, generator=generator) < density)
    radius = float(torch.linalg.eigvals(matrix.double()).abs().max())
    bound = spectral_radius_bound(matrix)
    assert bound >= radius * (1 - 1e-12)
    if density == 1.0:
        assert bound <= radius * (1 + 1e-6)


def test_spectral_radius_bound_in_closed_form() -> None:
    assert spectral_radius_bound(torch.zeros(3, 3)) == 0
    nilpotent = torch.triu(torch.ones(4, 4), 1)
    assert 0 <= spectral_radius_bound(nilpotent) < 0.1
    swap = torch.tensor([[0.0, 2.0], [0.5, 0.0]])
    assert 1 <= spectral_radius_bound(swap) < 1.01
    with pytest.raises(ValueError, match="nonnegative"):
        spectral_radius_bound(-torch.eye(2))
    with pytest.raises(ValueError, match="square"):
        spectral_radius_bound(torch.ones(2, 3))


def test_unbounded_activation_needs_the_spectral_radius() -> None:
    assert certify(dense_layer(torch.full((4, 4), 0.2499), "identity"))
    for scale in (0.25, 0.2501, 3.0):
        certificate = certify(dense_layer(torch.full((4, 4), scale), "identity"))
        assert not certificate, "a linear cell at or above radius 1 has no fixed point"
        assert "spectral radius" in str(certificate.refusal)


def test_composed_cells() -> None:
    good = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Softsign(), nn.AvgPool2d(3, 1, 1), nn.Conv2d(4, 2, 1), Inject(), nn.Tanh()
    )
    assert not certify(good), "random weights are signed"
    assert certify(positive(good))
    layer = Equilibrium(good, injection="softplus")
    solution = layer.solve(torch.randn(3, 2, 6, 6))
    assert solution.certified
    assert solution.converged.all()


@pytest.mark.parametrize(
    "step",
    [nn.MaxPool2d(3, 1, 1), nn.BatchNorm2d(2), nn.GELU(), nn.SiLU(), nn.LeakyReLU(), nn.Dropout(0.1), nn.Softplus()],
)
def test_steps_outside_the_class_are_refused(step: nn.Module) -> None:
    certificate = certify(nn.Sequential(positive(nn.Conv2d(2, 2, 3, padding=1)), step, Inject(), nn.Tanh()))
    assert not certificate
    assert type(step).__name__ in str(certificate.refusal)


def test_relu_after_signed_weights_is_refused_and_still_computed() -> None:
    linear = nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[0.0, -3.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))
    layer = Equilibrium(nn.Sequential(linear, Inject(), nn.ReLU()))
    assert not layer.certificate()
    b = torch.tensor([[1.0, -2.0, 3.0]])
    value = layer(b)
    torch.testing.assert_close(value, torch.tensor([[1.0, 0.0, 3.0]]))
    assert not layer.last_solution.certified


def test_zero_injection_with_vanishing_activation_is_refused() -> None:
    """z = tanh(2 z) has the two fixed points 0 and 0.957: uniqueness needs b > 0."""
    layer = dense_layer(torch.full((1, 1), 2.0), "tanh")
    with pytest.raises(ValueError, match="positive"):
        layer(torch.zeros(1, 1))
    relu = Equilibrium(layer.cell, injection="relu")
    assert not relu.certificate()
    assert "f(0) > 0" in str(relu.certificate().refusal)
    assert not relu.solve(torch.full((1, 1), -1.0)).certified
    # Injected before a nonnegative map with a zero row, b > 0 does not make f(0) > 0.
    early = nn.Sequential(Inject(), nn.Linear(2, 2, bias=False), nn.Tanh())
    with torch.no_grad():
        early[1].weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    assert not certify(early)


def test_softplus_that_underflows_still_gives_a_positive_injection() -> None:
    layer = PositiveConcaveLinear(2, 2, "tanh", injection="pre", initial_radius=3.0, solver=Picard(on_failure="ignore"))
    b = layer.injected(torch.full((1, 2), -1e4))
    assert (b > 0).all()
    solution = layer.solve(torch.full((1, 2), -1e4))
    assert (solution.upper > 0.9).any() or not solution.converged.all(), "0 is not the fixed point"


def test_tampering_is_seen() -> None:
    layer = PositiveConcaveLinear(4, 4)
    assert certify(layer)
    hooked = copy.deepcopy(layer)
    hooked.cell[0].register_forward_hook(lambda m, a, y: -y)
    assert not certify(hooked)
    replaced = copy.deepcopy(layer)
    replaced.cell[2].forward = lambda v: v**2
    assert not certify(replaced)

    class Squared(nn.Linear):
        def forward(self, v):
            return super().forward(v) ** 2

    assert not certify(nn.Sequential(positive(Squared(4, 4)), Inject(), nn.Tanh()))
    parametrize.remove_parametrizations(layer.cell[0], "weight")
    assert certify(layer)
    with torch.no_grad():
        layer.cell[0].weight[0, 0] = -1
    # Not positive concave any more; what it is now, is said.
    assert certify(layer).kind == "monotone"
    with torch.no_grad():
        layer.cell[0].weight[0, 1] = layer.cell[0].weight[1, 0] = -10
    assert not certify(layer)
    layer.solver = Picard(on_failure="ignore")
    assert not layer.solve(torch.randn(2, 4)).certified


def test_undeclared_activation_facts_are_refused() -> None:
    lie = Activation("lie", torch.square, lambda v: 2 * v, 0.0, 1.0, 0.0, 1.0)
    assert not certify(nn.Sequential(nonnegative(nn.Linear(2, 2, bias=False)), Inject(), Activate(lie)))


def test_networks() -> None:
    net = nn.Sequential(nn.Linear(3, 4), PositiveConcaveLinear(4, 4, injection="pre"), PositiveConcaveLinear(4, 2))
    certificate = perron.certify(net)
    assert certificate
    assert [name for name, _ in certificate.parts] == ["1", "2"]
    net.append(Equilibrium(nn.Bilinear(2, 2, 2)))
    assert not perron.certify(net)
    assert "3: " in str(perron.certify(net).refusal)
    assert not perron.certify(nn.Linear(2, 2))


def test_convolution_radius_holds_for_every_image_size() -> None:
    layer = PositiveConcaveConv2d(2, 2, activation="identity", initial_radius=0.9)
    assert certify(layer)
    kernel = layer.weight.detach()
    size = 5
    basis = torch.eye(2 * size * size).reshape(-1, 2, size, size)
    matrix = nn.functional.conv2d(basis, kernel, padding=1).flatten(1).T
    assert float(torch.linalg.eigvals(matrix).abs().max()) <= spectral_radius_bound(kernel.flatten(2).sum(2))


def test_a_module_used_twice_counts_twice() -> None:
    linear = nonnegative(nn.Linear(3, 3, bias=False))
    cell = nn.Sequential(linear, nn.Tanh(), linear, Inject(), nn.Tanh())
    layer = Equilibrium(cell)
    b = torch.rand(2, 3) + 0.1
    z = layer(b)
    weight = linear.weight
    torch.testing.assert_close(z, torch.tanh(torch.tanh(z @ weight.T) @ weight.T + b), rtol=3e-4, atol=0)


def test_an_injection_that_would_broadcast_is_an_error() -> None:
    cell = nn.Sequential(positive(nn.Linear(3, 1)), Inject(), nn.Tanh())
    with pytest.raises(ValueError, match="where the cell adds it"):
        Equilibrium(cell)(torch.rand(2, 3) + 0.1)


def test_a_refused_cell_with_injection_still_runs_and_differentiates() -> None:
    linear = nn.Linear(3, 3).double()
    with torch.no_grad():
        linear.weight.mul_(0.3)
    cell = nn.Sequential(linear, nn.GELU(), Inject(), nn.Tanh())
    layer = Equilibrium(cell, solver=Picard(tol=1e-12))
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    z = layer(x)
    torch.testing.assert_close(z, torch.tanh(nn.functional.gelu(linear(z)) + x))
    assert not layer.last_solution.certified
    assert torch.autograd.gradcheck(layer, x)


def test_a_refusal_names_the_nearest_rule_with_its_number_and_no_other() -> None:
    """Power control z = max(W z + b, 0) is feasible up to spectral radius 1."""
    infeasible = torch.tensor([[0.0, 1.1], [1.1, 0.0]])
    for name in ("relu", "identity"):
        for certificate in (dense_layer(infeasible, name).certificate(), certify(dense_layer(infeasible, name).cell)):
            assert str(certificate.refusal).startswith("the asymptotic map has spectral radius up to 1.1, not below 1")
            assert "row sums" not in str(certificate)
    signed = torch.tensor([[1.25, -0.5], [0.0, 1.25]])
    refusal = str(dense_layer(signed, "relu6").certificate().refusal)
    assert "entry -0.5" in refusal
    assert "eigenvalues up to 1.5, not below 1" in refusal
    assert not any(word in refusal for word in ("spectral radius", "degree", "row sums"))
    # With the activation before W there is no symmetric part to look at.
    linear = dense_layer(signed, "tanh").cell[0]
    refusal = str(certify(nn.Sequential(nn.Tanh(), linear, nn.Tanh(), linear, Inject())).refusal)
    assert "row sums times largest slopes are 3.0625" in refusal
    assert not any(word in refusal for word in ("spectral radius", "degree", "eigenvalues"))
