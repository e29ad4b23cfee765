import copy
import math
from dataclasses import dataclass
from fractions import Fraction
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

import perron
from perron.activations import ACTIVATIONS, Activation
from perron.cells import (
    Activate,
    ActivationStep,
    Chain,
    Clamp,
    DenseStep,
    DiagonalLowRank,
    Inject,
    InjectStep,
    Refusal,
    SparseLinear,
    VariationalDropout,
)
from perron.cells.trace import trace
from perron.constraints import nonnegative
from perron.nn import Equilibrium, PositiveConcaveConv2d, PositiveConcaveLinear
from perron.problem import FixedPointProblem
from perron.solvers import Auto, Picard
from perron.theory import (
    BoundedGain,
    Certificate,
    Contracting,
    MonotoneOperator,
    Sign,
    Theory,
    Thompson,
    certify,
    derive,
    pose,
    spectral_radius_bound,
)
from perron.theory.certify import THEORIES
from problems import Tenfold, TenfoldMatrix, below_one, dense_layer, fractions, long_picard


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
        linear.weight.copy_(torch.tensor([[0.0, -3.0, 0.0], [-0.5, 0.0, 0.0], [0.0, 0.0, 0.0]]))
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
    assert certify(layer).kind == "monotone operator"
    with torch.no_grad():
        layer.cell[0].weight[0, 1] = layer.cell[0].weight[1, 0] = -10
    assert not certify(layer)
    layer.solver = Picard(on_failure="ignore")
    assert not layer.solve(torch.randn(2, 4)).certified


def test_undeclared_activation_facts_are_refused() -> None:
    lie = Activation(
        name="lie",
        function=torch.square,
        derivative=lambda v: 2 * v,
        at_zero=0.0,
        supremum=1.0,
        asymptotic_slope=0.0,
        slope_at_zero=1.0,
    )
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


# ------------------------------------------------------------------------------------------------ at the edge of radius 1


def relu_cell(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules, Inject(), Activate("relu"))


def assign(module: nn.Module, **weights: torch.Tensor) -> nn.Module:
    for name, weight in weights.items():
        setattr(module, name, nn.Parameter(weight, requires_grad=False))
    return module


def near_critical(seed: int, n: int, dtype: torch.dtype, gap: float) -> tuple[nn.Sequential, list[list[Fraction]]]:
    """A random relu cell of some structure, its radius about 1 - gap, and the matrix whose radius it is."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return 0.05 + torch.rand(*shape, generator=generator, dtype=torch.float64)

    def scaled(weight: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        return weight * (1 - gap) / torch.linalg.eigvals(by).abs().max()

    kind = seed % 4
    if kind == 0:
        weight = draw(n, n)
        linear = assign(nn.Linear(n, n, bias=False), weight=scaled(weight, weight).to(dtype))
        return relu_cell(linear), fractions(linear.weight)
    if kind == 1:
        diagonal, left, right = draw(n), draw(n, 7), draw(n, 7)
        dense = torch.diag(diagonal) + left @ right.t()
        low = DiagonalLowRank(n, 7)
        assign(
            low, diagonal=scaled(diagonal, dense).to(dtype), left=scaled(left, dense).to(dtype), right=right.to(dtype)
        )
        rows = [
            [
                sum((Fraction(a) * Fraction(b) for a, b in zip(x, y, strict=True)), Fraction(0))
                + (Fraction(low.diagonal[i].item()) if i == j else 0)
                for j, y in enumerate(low.right.tolist())
            ]
            for i, x in enumerate(low.left.tolist())
        ]
        return relu_cell(low), rows
    if kind == 2:
        weight = draw(n, n, 3, 3)
        conv = assign(nn.Conv2d(n, n, 3, padding=1, bias=False), weight=scaled(weight, weight.sum((2, 3))).to(dtype))
        return relu_cell(conv), [
            [sum((Fraction(x) for x in taps.flatten().tolist()), Fraction(0)) for taps in row] for row in conv.weight
        ]
    edges = torch.cartesian_prod(torch.arange(n), torch.arange(n)).t()
    values = draw(n * n)
    sparse = assign(SparseLinear(edges, n), weight=scaled(values, values.view(n, n)).to(dtype))
    return relu_cell(sparse), fractions(sparse.weight.view(n, n))


@settings(max_examples=120)
@given(
    st.integers(0, 10_000),
    st.integers(1, 4),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.sampled_from([0.0, 1e-12, -1e-12, 1e-9, 3e-8, -3e-8, 1e-7]),
)
def test_no_certificate_from_radius_1_on_and_one_right_below(seed: int, n: int, dtype: torch.dtype, gap: float) -> None:
    """Against exact rational arithmetic on the very weights."""
    cell, matrix = near_critical(seed, n, dtype, gap)
    certificate = certify(cell)
    if not below_one(matrix):
        assert not certificate, str(certificate)
    if below_one([[x * (1 + Fraction(1, 10**11)) for x in row] for row in matrix]):
        assert certificate, str(certificate)


def test_radii_that_single_precision_does_not_see() -> None:
    row = torch.tensor([0.029541015625, 0.083984375, 0.029541015625], dtype=torch.bfloat16)
    conv = assign(nn.Conv1d(7, 7, 3, padding=1, bias=False), weight=row.expand(7, 7, 3).clone())
    assert not certify(relu_cell(conv)), "every row sums to 1.00146"
    # Nine taps of exact sum 1 + 2.9e-8, which rounds to 1 - 6e-8 in some order.
    taps = torch.tensor([0.1249999925494194, 0.0625, 0.1249999925494194, 0.0625], dtype=torch.float32)
    rest = 1 + 2.9e-8 - 2 * float(taps.double().sum())
    kernel = torch.cat([taps, torch.tensor([rest], dtype=torch.float32), taps.flip(0)]).view(1, 1, 9)
    exact = sum(Fraction(x) for x in kernel.flatten().tolist())
    conv = assign(nn.Conv1d(1, 1, 9, padding=4, bias=False), weight=kernel)
    assert bool(certify(relu_cell(conv))) == (exact < 1)
    certificate = certify(relu_cell(assign(nn.Linear(1, 1, bias=False), weight=torch.tensor([[1 - 2**-24]]))))
    assert "1 - 5.96e-08 < 1" in str(certificate)


def test_products_that_underflow_on_the_way_are_not_lost() -> None:
    """1e-200 * 1e-200 * 1e300 * 1e100 is 1: neither a radius nor a gain below it."""
    scales = (1e-200, 1e-200, 1e300, 1e100)
    maps = [assign(nn.Linear(1, 1, bias=False), weight=torch.tensor([[s]], dtype=torch.float64)) for s in scales]
    assert not certify(relu_cell(*maps))
    assert not certify(nn.Sequential(*maps, Inject()))


def test_maps_along_different_sides_of_an_image() -> None:
    """The product of their matrices is 0 or nilpotent, and the map itself has radius 4 and 4/3."""
    channels = assign(nn.Conv1d(2, 2, 1, bias=False), weight=torch.diag(torch.tensor([2.0, 0.0])).unsqueeze(2))
    along = assign(nn.Linear(2, 2, bias=False), weight=torch.diag(torch.tensor([0.0, 2.0])))
    assert not certify(relu_cell(channels, along))
    shift = assign(nn.Linear(2, 2, bias=False), weight=torch.tensor([[0.0, 4.0], [0.0, 0.0]]))
    assert not certify(relu_cell(shift, nn.AvgPool1d(3, 1, 1)))


# ------------------------------------------------------------------------------------------- what is no map at all


def bounded(*modules: nn.Module) -> nn.Sequential:
    cell = nn.Sequential(*modules, Inject(), nn.Tanh())
    for p in cell.parameters():
        if p.dtype in (torch.float32, torch.float64) and p.layout == torch.strided and not p.is_meta:
            p.data = p.data.abs() + 1e-3
    return cell


NO_MAPS = {
    "linear of another width": lambda: bounded(nn.Linear(2, 3)),
    "two that do not fit": lambda: bounded(nn.Linear(2, 3), nn.Linear(2, 2)),
    "injected at another width": lambda: nn.Sequential(
        *bounded(nn.Linear(2, 3)), *bounded(nn.Linear(3, 2))[:1], nn.Tanh()
    ),
    "unpadded": lambda: bounded(nn.Conv2d(2, 2, 3)),
    "padded too much": lambda: bounded(nn.Conv2d(2, 2, 3, padding=2)),
    "strided": lambda: bounded(nn.Conv2d(2, 2, 3, stride=2, padding=1)),
    "of other channels": lambda: bounded(nn.Conv1d(2, 4, 3, padding=1)),
    "pooling": lambda: bounded(nn.Conv2d(2, 2, 3, padding=1), nn.AvgPool2d(2)),
    "pooling that shrinks": lambda: bounded(nn.Conv2d(2, 2, 3, padding=1), nn.AvgPool2d(3, 1)),
    "images of other dimensions": lambda: bounded(nn.Conv2d(2, 2, 3, padding=1), nn.Conv1d(2, 2, 3, padding=1)),
    "an assigned weight": lambda: bounded(assign(nn.Linear(3, 3), weight=torch.rand(2, 3))),
    "an assigned vector": lambda: bounded(assign(nn.Linear(3, 3), weight=torch.rand(3))),
    "an assigned bias": lambda: bounded(assign(nn.Linear(3, 3), bias=torch.rand(1))),
    "an assigned kernel": lambda: bounded(assign(nn.Conv2d(2, 2, 3, padding=1), weight=torch.rand(2, 2, 3))),
    "groups": lambda: bounded(assign(nn.Conv1d(4, 4, 3, padding=1, groups=2), weight=torch.rand(3, 2, 3))),
    "a low rank": lambda: bounded(assign(DiagonalLowRank(3, 2), right=torch.rand(3, 1))),
    "a diagonal that broadcasts": lambda: bounded(assign(DiagonalLowRank(3, 2), diagonal=torch.rand(1))),
    "complex": lambda: bounded(assign(nn.Linear(3, 3, bias=False), weight=torch.rand(3, 3, dtype=torch.complex64))),
    "integers": lambda: bounded(assign(nn.Linear(3, 3, bias=False), weight=torch.ones(3, 3, dtype=torch.int64))),
    "meta": lambda: bounded(nn.Linear(3, 3, device="meta")),
    "sparse layout": lambda: bounded(assign(nn.Linear(3, 3, bias=False), weight=torch.eye(3).to_sparse_csr())),
    "quantised": lambda: bounded(
        assign(nn.Linear(3, 3), weight=torch.quantize_per_tensor(torch.ones(3, 3), 0.1, 0, torch.qint8))
    ),
    "limits of another width": lambda: bounded(nn.Linear(3, 3), Clamp(0.0, torch.ones(2))),
    "limits of other channels": lambda: bounded(nn.Conv2d(2, 2, 3, padding=1), Clamp(0.0, torch.ones(3, 4, 4))),
    "limits of other dimensions": lambda: bounded(nn.Conv2d(2, 2, 3, padding=1), Clamp(0.0, torch.ones(2, 4))),
    "limits assigned the wrong way round": lambda: bounded(
        nn.Linear(3, 3), assign(Clamp(0.0, 1.0), lower=torch.tensor(2.0))
    ),
    "a limit that is no number": lambda: bounded(
        nn.Linear(3, 3), assign(Clamp(0.0, 1.0), upper=torch.tensor(torch.nan))
    ),
    "limits of another precision": lambda: bounded(nn.Linear(3, 3), Clamp(torch.zeros(3).double(), 1.0)),
    "two precisions": lambda: bounded(assign(nn.Linear(3, 3), weight=torch.ones(3, 3).double())),
}


@pytest.mark.parametrize("name", NO_MAPS)
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_what_maps_no_space_into_itself_is_refused(name: str, activation: str) -> None:
    cell = NO_MAPS[name]()
    if activation == "relu":
        cell = nn.Sequential(*[Activate("relu") if isinstance(m, nn.Tanh) else m for m in cell])
    certificate = certify(cell)
    assert not certificate
    assert certificate.refusal
    layer = Equilibrium(cell, injection="softplus")
    assert not layer.certificate()
    side = next((p.shape[1] for p in cell.parameters() if p.dim() > 1), 3)
    image = any(isinstance(m, nn.Conv1d | nn.Conv2d) for m in cell)
    x = torch.rand(2, side, 4, 4) if image else torch.rand(2, side)
    with pytest.raises(Refusal):
        layer.solve(x)
    with pytest.raises(Refusal):
        layer(x)


def test_sizes_may_change_on_the_way() -> None:
    """Even kernels: one row more, and one less."""
    cell = bounded(nn.Conv2d(2, 5, 2, padding=1), nn.Tanh(), nn.Conv2d(5, 2, 2))
    assert certify(cell)
    assert Equilibrium(cell, injection="softplus").solve(torch.rand(2, 2, 4, 4)).certified
    assert certify(bounded(nn.Conv1d(2, 2, 4, padding="same"), nn.AvgPool1d(3, 1, 1)))


@pytest.mark.parametrize(
    "cell",
    [
        lambda: relu_cell(
            *[
                assign(nn.Linear(2, 2, bias=False), weight=1e200 * torch.ones(2, 2, dtype=torch.float64))
                for _ in range(2)
            ]
        ),
        lambda: relu_cell(assign(DiagonalLowRank(3, 1), left=torch.full((3, 1), 1e30), right=torch.full((3, 1), 1e30))),
        lambda: relu_cell(assign(nn.Conv2d(2, 2, 3, padding=1), weight=torch.full((2, 2, 3, 3), 3e38))),
        lambda: relu_cell(assign(nn.Linear(2, 2, bias=False), weight=1e308 * torch.ones(2, 2, dtype=torch.float64))),
    ],
)
def test_overflow_is_a_refusal_and_no_error(cell) -> None:
    cell = cell()
    for module in cell.modules():
        if getattr(module, "bias", None) is not None:
            module.bias.data.zero_()
    assert "spectral radius" in str(certify(cell).refusal)
    layer = Equilibrium(cell, injection="softplus", solver=Picard(on_failure="ignore", max_steps=5))
    assert not layer.certificate()
    shape = (2, 2, 4, 4) if isinstance(cell[0], nn.Conv2d) else (2, 3 if isinstance(cell[0], DiagonalLowRank) else 2)
    x = torch.rand(shape, dtype=next(cell.parameters()).dtype)
    assert not layer.solve(x).certified


# ----------------------------------------------------------------------------------------------------- unknown steps


class TenfoldActivation(ActivationStep):
    def __call__(self, v: torch.Tensor) -> torch.Tensor:
        return 10 * self.activation(v)


HALF = DenseStep(weights=(0.5 * torch.eye(2, dtype=torch.float64),))
FOREIGN = {
    "a class of its own": (HALF, Tenfold(), InjectStep(), ActivationStep(activation=ACTIVATIONS["relu"])),
    "a matrix": (TenfoldMatrix(weights=HALF.weights), InjectStep(), ActivationStep(activation=ACTIVATIONS["relu"])),
    "an activation": (HALF, InjectStep(), TenfoldActivation(activation=ACTIVATIONS["relu"])),
    "facts": (
        HALF,
        InjectStep(),
        ActivationStep(
            activation=Activation(
                name="relu",
                function=lambda v: 10 * v,
                derivative=torch.ones_like,
                at_zero=0.0,
                supremum=1.0,
                asymptotic_slope=0.0,
                slope_at_zero=1.0,
            )
        ),
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_steps_that_nobody_knows_prove_nothing(name: str) -> None:
    chain = Chain(FOREIGN[name])
    each = [derive(chain, (sign,), (theory,)).certificate for theory in THEORIES for sign in Sign]
    for certificate in (certify(chain), *each):
        assert not certificate
        assert certificate.refusal


def test_two_injections_or_none_are_no_cell() -> None:
    sigma = ActivationStep(activation=ACTIVATIONS["tanh"])
    assert certify(Chain((HALF, InjectStep(), sigma)))
    assert not certify(Chain((HALF, sigma)))
    assert not certify(Chain((HALF, InjectStep(), InjectStep(), sigma)))


def test_a_mask_drawn_with_another_probability_counts_as_it_is() -> None:
    dropout = VariationalDropout(0.75)
    dropout.draw(torch.ones(4, 50))
    dropout.p = 0.0625
    assert float(dropout.step().row_sums()) >= 4


@pytest.mark.parametrize("theory", [Thompson(), BoundedGain()])
def test_a_theory_in_a_problem_proves_by_itself(theory: Theory) -> None:
    """What `pose` leaves to whichever metric serves a sample better, one theory alone proves as well."""
    layer = dense_layer(torch.tensor([[0.2, 0.1], [0.05, 0.3]], dtype=torch.float64), "tanh+1.2")
    b = torch.rand(3, 2, dtype=torch.float64) + 0.1
    chain = trace(layer.cell)
    found = Auto(tol=1e-8).solve(FixedPointProblem(map=chain, injection=b, theory=theory))
    exact = long_picard(chain, b)
    assert found.certified
    assert ((found.lower <= exact) & (exact <= found.upper)).all()


def test_a_theory_that_is_added_is_posed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One list says what is certified and what solves: no layer is certified by a theory that its solves never see."""

    @dataclass(frozen=True)
    class Mine(MonotoneOperator):
        kind = "mine"

        def certify(self, chain: Chain, sign: Sign) -> Certificate:
            return Certificate(exists=True, unique=True, geometric=True, kind=self.kind)

    chain = trace(dense_layer(torch.tensor([[3.0, -4.0], [4.0, 3.0]], dtype=torch.float64), "tanh").cell)
    assert derive(chain, (Sign.ANY,)).theory is None
    assert pose(chain, (Sign.ANY,))[0] == Contracting()
    monkeypatch.setattr(import_module("perron.theory.certify"), "THEORIES", (*THEORIES, Mine()))
    assert pose(chain, (Sign.ANY,))[0] == Mine()
    assert derive(chain, (Sign.ANY,)).theory == Mine()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("weight", [[[0.1, 0.1], [0.1, 0.1]], [[0.0, -4.0], [0.2, 0.0]], [[-9.0, 0.0], [0.0, 0.5]]])
def test_a_bias_that_is_not_finite_is_refused(weight: list[list[float]], value: float) -> None:
    """By row sums, by a Perron vector, by the margin: none of them looks at the bias."""
    linear = nn.Linear(2, 2, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(weight))
        linear.bias.copy_(torch.tensor([value, 0.0]))
    for injection in ("free", "given", "softplus"):
        layer = Equilibrium(nn.Sequential(linear, Inject(), Activate("relu")), injection=injection)
        assert not certify(layer)
        assert "not finite" in str(certify(layer).refusal)
        assert not layer.solve(torch.ones(1, 2, dtype=torch.float64)).proven.any()
    with torch.no_grad():
        linear.bias.zero_()
    assert certify(layer)


def test_a_layer_that_hides_its_certificate_is_not_passed_over() -> None:
    sound, unsound = (dense_layer(torch.full((2, 2), w), "relu") for w in (0.1, 3.0))
    assert not certify(nn.Sequential(sound, unsound))
    unsound.certificate = None
    assert not certify(nn.Sequential(sound, unsound))


def test_an_injection_replaced_on_the_class_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """z = tanh(W z) has two fixed points for b = 0, which softplus would never give."""
    layer = Equilibrium(dense_layer(torch.full((2, 2), 1.2), "tanh").cell, injection="softplus")
    assert certify(layer)
    monkeypatch.setattr(Equilibrium, "positive", lambda self, b: b)
    with pytest.raises(ValueError, match="positive"):
        layer.solve(torch.zeros(1, 2))
