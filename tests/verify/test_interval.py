import math
from fractions import Fraction
from functools import partial

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from perron.cells import Activate, Chain, Clamp, Inject, Normalize, Refusal, trace
from perron.models import BaselineConvNet, BaselineNet, PositiveConcaveConvNet, PositiveConcaveLinearNet
from perron.nn import (
    Equilibrium,
    MonotoneLinear,
    PositiveConcaveLinear,
    SubhomogeneousLinear,
    UnconstrainedLinear,
    VariationalDropout,
)
from perron.solvers import Auto
from perron.theory import Sign, Thompson, pose
from perron.theory.monotone_operator import shift as monotone_shift
from perron.theory.thompson import distance
from perron.verify import Interval, certify_classes, propagate
from perron.verify.interval import _injections, _solved, _within_domain

NETS = [
    (PositiveConcaveLinearNet(64, 10, width=12), (1, 8, 8)),
    (PositiveConcaveLinearNet(64, 10, width=12, activation="sigmoid"), (1, 8, 8)),
    (PositiveConcaveConvNet(1, 10, widths=(3, 4), image_size=8), (1, 8, 8)),
    (nn.Sequential(nn.Linear(5, 6), nn.ReLU(), PositiveConcaveLinear(6, 7), nn.Linear(7, 3)), (5,)),
    (nn.Sequential(nn.Linear(5, 6), Clamp(-0.5, torch.linspace(0, 1, 6)), nn.Linear(6, 3)), (5,)),
    (BaselineNet("subdeq-nonnegative", 64, 10, width=12), (1, 8, 8)),
    (BaselineNet("subdeq-bounded", 64, 10, width=12), (1, 8, 8)),
    (BaselineNet("mondeq", 64, 10, width=12), (1, 8, 8)),
    (BaselineConvNet("mondeq", 1, 10, widths=[3], image_size=8), (1, 8, 8)),
    (BaselineConvNet("subdeq-nonnegative", 1, 10, widths=[3], image_size=8), (1, 8, 8)),
]


def trained_looking(net: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    net.train()
    for _ in range(3):
        net(torch.randn(16, *shape))
    return net.eval()


@pytest.mark.parametrize(("net", "shape"), NETS)
@pytest.mark.parametrize("radius", [0.0, 1e-3, 0.1])
def test_boxes_contain_what_the_network_computes(net, shape, radius) -> None:
    net = trained_looking(net, shape)
    x = torch.randn(4, *shape)
    box = propagate(net, Interval(x - radius, x + radius))
    assert (box.lower <= box.upper).all()
    for _ in range(20):
        inside = x + radius * (2 * torch.rand_like(x) - 1)
        logits = net(inside).detach().double()
        # The network runs in float32 and to its own tolerance; the box is about exact arithmetic.
        slack = 2e-3 * logits.abs().max()
        assert (logits >= box.lower - slack).all()
        assert (logits <= box.upper + slack).all()


def clamped(gain: float, lower: float, upper: Tensor | float) -> Equilibrium:
    linear = nn.Linear(5, 5, bias=False, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.abs_().mul_(gain / linear.weight.sum(1, keepdim=True))
    cell = nn.Sequential(linear, Inject(), Clamp(lower, upper).double())
    return Equilibrium(cell, injection="given", solver=EXACT["solver"])


EXACT = {"injection": "given", "solver": Auto(tol=1e-11, max_steps=5000, on_failure="ignore"), "dtype": torch.float64}
LAYERS = [
    lambda: PositiveConcaveLinear(5, 5, **EXACT),
    lambda: SubhomogeneousLinear(5, 5, "tanh+1.7", normalize=float("inf"), initial_radius=3.0, **EXACT),
    lambda: SubhomogeneousLinear(5, 5, "(tanh+1.2)^0.3", normalize=2.0, initial_radius=3.0, **EXACT),
    lambda: SubhomogeneousLinear(5, 5, weights="signed_bounded", initial_radius=3.0, **EXACT),
    lambda: MonotoneLinear(5, 5, "tanh", margin=0.3, **EXACT),
    lambda: MonotoneLinear(5, 5, "relu", margin=1.0, **EXACT),
    lambda: clamped(0.9, -1.0, torch.tensor([0.2, 0.5, 1.0, 2.0, math.inf])),
    lambda: clamped(0.9, 0.1, 0.6),
]


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("radius", [1e-9, 1e-3, 0.2])
def test_boxes_of_injections(make, radius) -> None:
    """Corners included, and against the layer's own float64 solves."""
    torch.manual_seed(0)
    layer = make()
    b = 0.3 + torch.rand(6, 5, dtype=torch.float64)
    box = propagate(layer, Interval(b - radius, b + radius))
    assert box.lower.isfinite().all()
    for k in range(20):
        sign = 2 * torch.rand_like(b) - 1
        z = layer(b + radius * (sign.sign() if k % 2 else sign)).detach()
        assert (box.lower <= z + 1e-10).all()
        assert (z - 1e-10 <= box.upper).all()
    # Not wider than the radius times what such maps can amplify.
    assert float((box.upper - box.lower).max()) <= 100 * radius + 1e-4


def linear_layer(weight: Tensor, activation: str = "identity", injection: str = "free") -> Equilibrium:
    cell = nn.Sequential(nn.Linear(*weight.shape, bias=False, dtype=torch.float64), Inject(), Activate(activation))
    with torch.no_grad():
        cell[0].weight.copy_(weight)
    return Equilibrium(cell, injection=injection, solver=EXACT["solver"])


def assert_tight(box: Interval, lower: Tensor, upper: Tensor, rtol: float = 1e-9) -> None:
    """The box contains the exact one, and is hardly wider."""
    assert (box.lower <= lower).all()
    assert (upper <= box.upper).all()
    torch.testing.assert_close(box.lower, lower, rtol=rtol, atol=1e-290)
    torch.testing.assert_close(box.upper, upper, rtol=rtol, atol=1e-290)


@pytest.mark.parametrize("radius", [0.1, 1e-3, 1e-9])
@pytest.mark.parametrize("activation", ["relu", "identity"])
@pytest.mark.parametrize("weight", [[[0.75]], [[0.5, 0.3], [0.1, 0.6]], [[0.0, 0.9], [0.9, 0.0]]])
def test_positive_concave_boxes_in_closed_form(weight, activation: str, radius: float) -> None:
    """z = W z + b on the orthant: z* = (I - W)^-1 b at both ends."""
    matrix = torch.tensor(weight, dtype=torch.float64)
    layer = linear_layer(matrix, activation, "given")
    assert layer.certificate().kind == "positive concave"
    b = torch.arange(1.0, len(matrix) + 1, dtype=torch.float64).unsqueeze(0)
    box = propagate(layer, Interval(b - radius, b + radius))
    system = torch.eye(len(matrix), dtype=torch.float64) - matrix
    low, high = (torch.linalg.solve(system, end.t()).t() for end in (b - radius, b + radius))
    slack = 1e-14 * high
    assert_tight(box, low + slack, high - slack)


@pytest.mark.parametrize("radius", [0.1, 1e-6, 1e-14])
@pytest.mark.parametrize(
    ("weight", "kind", "shape"),
    [
        ([[0.75]], "bounded gain", [1.0]),
        ([[0.3, 0.4], [0.2, 0.5]], "bounded gain", [1.0, 1.0]),
        ([[0.3, -0.4], [-0.2, 0.5]], "bounded gain", [1.0, -1.0]),
        ([[-3.0]], "monotone operator", [1.0]),
        ([[-3.0, 0.0], [0.0, -3.0]], "monotone operator", [1.0, 0.0]),
        ([[-4.0, 1.0], [1.0, -4.0]], "monotone operator", [1.0, 0.0]),
    ],
)
def test_shift_of_the_fixed_point_in_closed_form(weight, kind: str, shape: list[float], radius: float) -> None:
    """z = W z + b: dz = (I - W)^-1 db. The bounds are attained but for the last, where the margin is that of another b."""
    matrix, direction = torch.tensor(weight, dtype=torch.float64), torch.tensor([shape], dtype=torch.float64)
    layer = linear_layer(matrix)
    assert layer.certificate().kind == kind
    b = torch.ones_like(direction)
    box = propagate(layer, Interval(b - radius * direction.abs(), b + radius * direction.abs()))
    system = torch.eye(len(matrix), dtype=torch.float64) - matrix
    middle, shift = (torch.linalg.solve(system, t.t()).t() for t in (b, radius * direction))
    assert (box.lower <= middle - shift.abs() + 1e-15).all()
    assert (middle + shift.abs() - 1e-15 <= box.upper).all()
    if weight != [[-4.0, 1.0], [1.0, -4.0]]:
        moved = direction[0] != 0
        torch.testing.assert_close(
            box.upper[:, moved], (middle + shift.abs())[:, moved], rtol=0, atol=1e-9 * radius + 1e-11
        )
        torch.testing.assert_close(
            box.lower[:, moved], (middle - shift.abs())[:, moved], rtol=0, atol=1e-9 * radius + 1e-11
        )


@pytest.mark.parametrize("radius", [1e-100, 1e-170, 1e-280])
@pytest.mark.parametrize("weight", [0.75, -3.0])
def test_tiny_boxes_do_not_vanish(weight: float, radius: float) -> None:
    """Around the fixed point 0, where no rounding of other terms hides that squares underflow."""
    layer = linear_layer(weight * torch.eye(2, dtype=torch.float64))
    r = torch.tensor([[radius, 0.0]], dtype=torch.float64)
    box = propagate(layer, Interval(-r, r))
    assert (box.lower <= -r / (1 - weight) * (1 - 1e-14)).all()
    assert (r / (1 - weight) * (1 - 1e-14) <= box.upper).all()
    assert (box.upper <= 1.01 * radius / (1 - weight)).all()


def test_the_shift_is_euclidean_where_the_cell_is_monotone() -> None:
    layer = linear_layer(torch.diag(torch.tensor([-3.0, -3.0], dtype=torch.float64)))
    radius = torch.tensor([[3.0, 4.0], [3e-200, 4e-200], [3e200, 4e200]], dtype=torch.float64)
    shift = monotone_shift(trace(layer.cell), radius)
    assert (shift >= torch.tensor([5.0, 5e-200, 5e200], dtype=torch.float64) / 4 * (1 - 1e-15)).all()
    torch.testing.assert_close(shift, torch.tensor([5.0, 5e-200, 5e200], dtype=torch.float64) / 4, rtol=1e-12, atol=0)


@pytest.mark.parametrize("ratio", [1.01, 2.0, 100.0])
def test_subhomogeneous_boxes_in_closed_form(ratio: float) -> None:
    """z = b^p, but for a shift of 1e-9, with W = 0: it moves by p D, and the bound p D/(1 - p) is next to that."""
    power, tolerance = 1e-3, 1e-12
    chain = trace(
        linear_layer(
            torch.zeros(1, 1, dtype=torch.float64), f"(identity+1e-9)^{power}".replace("1e-9", "0.000000001")
        ).cell
    )
    assert Thompson().certify(chain, Sign.NONNEGATIVE)
    low, high = (torch.full((1, 1), t, dtype=torch.float64) for t in (1.0, ratio))
    theory, _ = pose(chain, (Sign.ANY,))
    solve = partial(_solved, Auto(tol=tolerance, on_failure="ignore"), chain, theory)
    box = Thompson().moved(chain, Interval(low, high), solve)
    assert float(box.lower) <= 1
    assert ratio**power <= float(box.upper)
    # From the centre to the farther end.
    centre = (1 + ratio) / 2
    assert math.log(centre**power / float(box.lower)) <= power * math.log(centre) * 1.005 + 1e-9
    assert math.log(float(box.upper) / centre**power) <= power * math.log(centre) * 1.005 + 1e-9


def test_thompson_distances_at_their_tight_cases() -> None:
    """b alone, b behind sigma(0), and a division by the largest entry, which doubles what opposite changes do."""
    b = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    zero = nn.Linear(2, 2, bias=False, dtype=torch.float64)
    nn.init.zeros_(zero.weight)
    up, down = torch.tensor([[1.5, 1.0]]).double(), torch.tensor([[1.0, 1 / 1.5]]).double()
    plain = trace(nn.Sequential(zero, Inject()))
    found = distance(plain, Interval(down, up), b)
    assert math.log(1.5) * (1 - 1e-15) <= float(found) <= math.log(1.5) * (1 + 1e-12)
    shifted = trace(nn.Sequential(zero, Activate("sigmoid"), Inject()))
    found = distance(shifted, Interval(b, up), b)
    assert math.log(2.0 / 1.5) * (1 - 1e-15) <= float(found) <= math.log(2.0 / 1.5) * (1 + 1e-10)
    normalized = trace(nn.Sequential(zero, Inject(), Normalize()))
    found = distance(normalized, Interval(b / 1.5, b * 1.5), b)
    opposite = normalized(b, torch.tensor([[1.5, 1 / 1.5]]).double())
    apart = (opposite.log() - normalized(b, b).log()).abs().max()
    assert float(apart) == pytest.approx(2 * math.log(1.5))
    assert float(apart) * (1 - 1e-15) <= float(found) <= 2 * math.log(1.5) * (1 + 1e-12)


def test_a_subhomogeneous_layer_at_its_tight_case() -> None:
    """z = (tanh(0) + 1e3 + b)/max: with W = 0 and a norm the bound is 2 D/(1 - mu), and mu is next to 0."""
    layer = SubhomogeneousLinear(2, 2, "tanh+1000", normalize=math.inf, **EXACT)
    with torch.no_grad():
        layer.recurrent.weight = torch.zeros(2, 2).double()
    b = torch.full((1, 2), 1000.0, dtype=torch.float64)
    certificate = layer.certificate()
    assert certificate.kind == "subhomogeneous"
    assert certificate.rate < 1e-2
    box = propagate(layer, Interval(b / 2, 2 * b))
    # b = (2000, 500) gives (1, 1500/3000), and the other way round.
    assert (box.lower <= 0.5).all()
    assert (box.upper >= 1).all()
    exact = math.exp(-2 * math.log(2250 / 1500) / (1 - certificate.rate))
    torch.testing.assert_close(box.lower, torch.full_like(b, exact), rtol=1e-2, atol=0)


def test_distances_through_unknown_steps_are_refused() -> None:
    class TenTimes:
        def __call__(self, v: Tensor) -> Tensor:
            return 10 * v

    chain = trace(SubhomogeneousLinear(2, 2, "tanh+1.2", **EXACT).cell)
    b = torch.ones(1, 2, dtype=torch.float64)
    with pytest.raises(Refusal, match="TenTimes"):
        distance(Chain((*chain.steps, TenTimes())), Interval(b, b), b)


@given(st.integers(0, 10_000))
def test_thompson_distance_of_two_injections(seed: int) -> None:
    torch.manual_seed(seed)
    layer = SubhomogeneousLinear(4, 4, "tanh+1.7", normalize=2.0, initial_radius=3.0, **EXACT)
    chain = trace(layer.cell)
    centre = torch.rand(50, 4, dtype=torch.float64)
    box = Interval(centre * torch.rand(50, 4), centre * (1 + torch.rand(50, 4)))
    bound = distance(chain, box, centre)
    z = 10 ** torch.randn(50, 4, dtype=torch.float64)
    for b in (box.lower, box.upper, torch.where(torch.rand(50, 4) < 0.5, box.lower, box.upper)):
        apart = (chain(z, b).log() - chain(z, centre).log()).abs().amax(1)
        assert bool((apart <= bound * (1 + 1e-12)).all())


def test_injections_outside_of_the_domain_have_no_bounds() -> None:
    layer = SubhomogeneousLinear(5, 5, "tanh+1.7", normalize=float("inf"), **EXACT)
    b = torch.rand(2, 5).double()
    b[1, 2] = 0.01
    box = propagate(layer, Interval(b - 0.02 * torch.tensor([[0.0], [1.0]]), b + 0.02))
    assert box.lower[0].isfinite().all()
    assert box.lower[1].isnan().all()
    assert box.upper[1].isnan().all()
    with pytest.raises(Refusal, match="not certified"):
        propagate(UnconstrainedLinear(5, 5, initial_radius=9.0, **EXACT), Interval(b, b))


def test_dropout_in_a_cell_is_refused_in_training_only() -> None:
    inside = PositiveConcaveLinear(3, 3).cell
    layer = Equilibrium(nn.Sequential(VariationalDropout(0.5), *inside), injection="softplus")
    x = torch.rand(2, 3)
    layer(x)
    with pytest.raises(Refusal, match="dropout"):
        propagate(layer, Interval(x, x))
    assert propagate(layer.eval(), Interval(x, x)).lower.isfinite().all()


def test_classes() -> None:
    net, shape = NETS[0]
    net = trained_looking(net, shape)
    x = torch.randn(50, *shape)
    found = certify_classes(net, x)
    assert (found.predicted == net(x).argmax(1)).all()
    assert found.constant.float().mean() > 0.9
    assert (found.constant == (found.margin > 0)).all()
    x[3] = torch.nan
    net[3].solver = net[3].solver.__class__(on_failure="ignore")
    assert not certify_classes(net, x).constant[3]


def test_a_tie_is_not_certified() -> None:
    net = nn.Sequential(PositiveConcaveLinear(3, 4), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        net[1].weight[1] = net[1].weight[0]
        net[1].bias[1] = net[1].bias[0]
    assert not certify_classes(net, torch.randn(5, 3)).constant.any()


def test_refusals() -> None:
    net = nn.Sequential(PositiveConcaveLinear(3, 4), nn.GELU(), nn.Linear(4, 2)).eval()
    with pytest.raises(Refusal, match="GELU"):
        certify_classes(net, torch.randn(2, 3))
    with pytest.raises(Refusal, match="eval"):
        certify_classes(net.train(), torch.randn(2, 3))

    class Signed(nn.Module):
        def forward(self, z, x):
            return 0.1 * z + x

    plain = nn.Sequential(Equilibrium(Signed()), nn.Linear(3, 2)).eval()
    with pytest.raises(Refusal, match="not certified"):
        certify_classes(plain, torch.randn(2, 3))


def test_certifying_leaves_the_network_as_it_was() -> None:
    """Copies of parametrised modules share their class: nothing may be removed from it."""
    net, shape = NETS[0]
    net = trained_looking(net, shape)
    x = torch.randn(4, *shape)
    before = net(x)
    certify_classes(net, x)
    torch.testing.assert_close(net(x), before, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------------ modules


def box_around(x: Tensor, radius: float | Tensor) -> Interval:
    return Interval(x - radius, x + radius)


def test_boxes_are_checked() -> None:
    net, x = nn.Linear(3, 2), torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"the box is empty: 2.0 > 1.0 at index \[0, 0\]"):
        propagate(net, Interval(2 * x, x))
    for other in (torch.ones(1, 3), torch.ones(2, 3, 1), torch.ones(3)):
        with pytest.raises(ValueError, match="of one shape"):
            propagate(net, Interval(x, other))
    with pytest.raises(ValueError, match="of one shape"):
        propagate(net, Interval(torch.ones(3), torch.ones(3)))
    for other in (x.long(), x.bool(), x.cfloat()):
        with pytest.raises(ValueError, match="floating point"):
            propagate(net, Interval(other, other))
    # float32 and float64 ends are compared as they are.
    with pytest.raises(ValueError, match="empty"):
        propagate(net, Interval(x, x.double() * (1 - 1e-16) - 1e-16))


@pytest.mark.parametrize(("net", "shape"), [*NETS, (nn.Sequential(nn.Conv1d(2, 3, 3), nn.MaxPool1d(2)), (2, 8))])
def test_a_batch_of_nothing_has_no_bounds_to_miss(net, shape) -> None:
    x = torch.randn(0, *shape)
    box = propagate(net.eval(), Interval(x, x))
    assert box.lower.shape == box.upper.shape == net(x).shape


def test_nothing_is_known_of_what_depends_on_nan() -> None:
    x = torch.randn(3, 5)
    x[1, 2] = torch.nan
    layer = PositiveConcaveLinear(5, 4)
    for net in (nn.Linear(5, 4), layer, nn.Sequential(layer, nn.Linear(4, 2)), MonotoneLinear(5, 4)):
        box = propagate(net.eval(), Interval(x, x + 0.1))
        assert (box.lower[[0, 2]] <= box.upper[[0, 2]]).all()
        assert box.lower[1].isnan().all()
        assert box.upper[1].isnan().all()
    box = propagate(nn.Sequential(nn.Tanh(), nn.BatchNorm1d(5), nn.Dropout()).eval(), Interval(x, x))
    assert (box.lower.isnan() == x.isnan()).all()
    assert (box.upper.isnan() == x.isnan()).all()


def exact_affine(weight: Tensor, bias: Tensor, lower: Tensor, upper: Tensor) -> tuple[list[Fraction], list[Fraction]]:
    low, high = [], []
    for row, c in zip(weight.tolist(), bias.tolist(), strict=True):
        ends = [
            sorted((Fraction(w) * Fraction(a), Fraction(w) * Fraction(b)))
            for w, a, b in zip(row, lower, upper, strict=True)
        ]
        low.append(sum(e[0] for e in ends) + Fraction(c))
        high.append(sum(e[1] for e in ends) + Fraction(c))
    return low, high


@pytest.mark.parametrize("size", [1e-300, 1e-6, 1.0, 1e6])
@pytest.mark.parametrize("radius", [0.0, 1e-16, 1e-3, 10.0])
def test_affine_boxes_in_exact_arithmetic(size: float, radius: float) -> None:
    for seed in range(10):
        torch.manual_seed(seed)
        linear = nn.Linear(6, 3).double()
        with torch.no_grad():
            linear.weight.mul_(size)
        x = torch.randn(1, 6).double()
        box = propagate(linear, box_around(x, radius))
        low, high = exact_affine(linear.weight, linear.bias, (x - radius)[0].tolist(), (x + radius)[0].tolist())
        for k in range(3):
            assert Fraction(float(box.lower[0, k])) <= low[k]
            assert high[k] <= Fraction(float(box.upper[0, k]))
            slack = Fraction(1e-13) * Fraction(max(size, 1.0)) * 20
            assert low[k] - Fraction(float(box.lower[0, k])) <= slack
            assert Fraction(float(box.upper[0, k])) - high[k] <= slack


@pytest.mark.parametrize("eps", [1e-5, 0.0, 1e-300])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_batch_norm_boxes_in_high_precision(eps: float, affine: bool, dims: int) -> None:
    for seed in range(10):
        torch.manual_seed(seed)
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](
            2, eps=eps, affine=affine, momentum=None
        ).eval()
        norm.running_mean.normal_()
        norm.running_var.copy_(10 ** (6 * torch.rand(2) - 6))
        if affine:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        x = torch.randn(1, 2, *[1] * (dims if dims > 1 else 0)).double()
        radius = torch.rand_like(x) * 10.0 ** float(-8 * torch.rand(()))
        box = propagate(norm, box_around(x, radius))
        with mpmath.workdps(60):
            for k in range(2):
                scale = (norm.weight[k].item() if affine else 1) / mpmath.sqrt(
                    mpmath.mpf(norm.running_var[k].item()) + mpmath.mpf(eps)
                )
                shift = norm.bias[k].item() if affine else 0
                image = [
                    (mpmath.mpf(float(end.flatten()[k])) - norm.running_mean[k].item()) * scale + shift
                    for end in (x - radius, x + radius)
                ]
                below, above = float(box.lower.flatten()[k]), float(box.upper.flatten()[k])
                assert below <= min(image)
                assert max(image) <= above
                assert above - below <= max(image) - min(image) + 1e-13 * (1 + 20 * abs(scale))


def test_batch_norms_that_cannot_be_read() -> None:
    x = torch.randn(4, 3)
    for norm, what in (
        (nn.BatchNorm1d(3), "statistics of its batch"),
        (nn.BatchNorm1d(3, track_running_stats=False).eval(), "statistics of its batch"),
    ):
        with pytest.raises(Refusal, match=rf"Sequential\[1\] normalises by the {what}"):
            propagate(nn.Sequential(nn.Identity(), norm), Interval(x, x))
    for value in (-1e-7, math.nan, math.inf):
        norm = nn.BatchNorm1d(3).eval()
        norm.running_var[1] = value
        with pytest.raises(Refusal, match="running variance"):
            propagate(norm, Interval(x, x))
    norm = nn.BatchNorm1d(3, eps=0.0).eval()
    norm.running_var[1] = 0
    with pytest.raises(Refusal, match="running variance"):
        propagate(norm, Interval(x, x))
    with pytest.raises(ValueError, match="features"):
        propagate(nn.BatchNorm1d(1).eval(), Interval(x, x))
    with pytest.raises(ValueError, match="4D"):
        propagate(nn.BatchNorm2d(3).eval(), Interval(x, x))


@pytest.mark.parametrize(
    "module",
    [
        nn.MaxPool1d(3, stride=2, padding=1, ceil_mode=True),
        nn.MaxPool1d(2, dilation=3),
        nn.AvgPool1d(3, stride=2, padding=1, ceil_mode=True, count_include_pad=False),
        nn.AvgPool1d(3, stride=2, padding=1, ceil_mode=True),
        nn.MaxPool2d(3, stride=2, padding=1, dilation=2, ceil_mode=True),
        nn.AvgPool2d((3, 2), stride=(2, 3), padding=(1, 0), ceil_mode=True, count_include_pad=False),
        nn.MaxPool3d(2, padding=1),
        nn.AvgPool3d(2, padding=1, count_include_pad=False),
        nn.Tanh(),
        nn.Sigmoid(),
        nn.Softsign(),
        nn.ReLU(inplace=True),
        nn.ReLU6(inplace=True),
        nn.LeakyReLU(0.3, inplace=True),
        nn.LeakyReLU(0.0),
        nn.LeakyReLU(7.0),
        nn.Softplus(),
        nn.Softplus(beta=3.7, threshold=0.5),
        nn.Softplus(beta=0.1, threshold=-1),
        nn.Identity(),
        Activate("arctan"),
        Activate("tanh+1.2"),
        nn.Dropout(0.9),
        nn.Dropout2d(0.9),
        nn.AlphaDropout(0.9),
        VariationalDropout(0.5),
        nn.Flatten(),
        nn.Flatten(-2),
        nn.Unflatten(1, (1, 3)),
        nn.Sequential(nn.Sequential(), nn.Sequential(nn.ReLU(), nn.Sequential(nn.Flatten()))),
    ],
    ids=str,
)
@pytest.mark.parametrize("radius", [0.0, 1e-12, 0.7])
def test_nondecreasing_modules_are_bounded_by_their_ends(module: nn.Module, radius: float) -> None:
    dims = int(type(module).__name__[-2]) if "Pool" in type(module).__name__ else 2
    x = 3 * torch.randn(4, 3, *[9] * dims).double()
    box = box_around(x, radius)
    low, high = box.lower.clone(), box.upper.clone()
    found = propagate(module.eval(), box)
    assert (box.lower == low).all()
    assert (box.upper == high).all()
    ends = (module(low.clone()), module(high.clone()))
    assert found.lower.shape == ends[0].shape
    for value in (*ends, module((low + torch.rand_like(x) * (high - low)).clamp(low, high))):
        assert (found.lower <= value).all()
        assert (value <= found.upper).all()
    gap = 1.01 * math.log1p(math.exp(-module.threshold)) / module.beta if isinstance(module, nn.Softplus) else 0
    torch.testing.assert_close(found.lower, ends[0], rtol=1e-12, atol=1e-13 + gap)
    torch.testing.assert_close(found.upper, ends[1], rtol=1e-12, atol=1e-13 + gap)


@pytest.mark.parametrize(("beta", "threshold"), [(1.0, 20.0), (5.0, 20.0), (0.3, 2.0), (2.0, -3.0)])
def test_softplus_around_the_threshold_where_torch_switches(beta: float, threshold: float) -> None:
    """There the function falls from log(1 + exp(beta v))/beta to v: no end of a box is where it is evaluated."""
    module, edge = nn.Softplus(beta, threshold), threshold / beta
    steps = [0.0, 1e-15, 1e-12, 1e-9, 1e-6, 0.1]
    points = torch.tensor(sorted({edge + s * t for s in (1, -1) for t in steps}), dtype=torch.float64).unsqueeze(1)
    first, last = torch.meshgrid(points[:, 0], points[:, 0], indexing="ij")
    keep = first <= last
    lower, upper = first[keep].unsqueeze(1), last[keep].unsqueeze(1)
    box = propagate(module, Interval(lower, upper))
    for point in points:
        inside = (lower <= point) & (point <= upper)
        value = module(point)
        assert (box.lower <= value)[inside].all()
        assert (value <= box.upper)[inside].all()
        with mpmath.workdps(40):
            v = mpmath.mpf(float(point))
            exact = float(mpmath.log1p(mpmath.exp(beta * v)) / beta)
        if point < edge:
            assert (box.lower <= exact * (1 + 1e-15))[inside].all()
            assert (exact * (1 - 1e-15) <= box.upper)[inside].all()


@pytest.mark.parametrize(
    "value", [3.9, 3.99999999999, 4.0, 4.00000000001, 7.9999999999, 8.0, 8.0000001, -16.0, -17.0, -1e3]
)
@pytest.mark.parametrize("radius", [0.0, 1e-12, 1e-10])
def test_softplus_injections_at_thresholds(value: float, radius: float) -> None:
    """z = z/2 + b = 2 b with b = softplus(5 x)/5: the box against 40 digits, and never inverted."""
    layer = linear_layer(torch.full((1, 1), 0.5, dtype=torch.float64), "relu", "softplus")
    x = torch.full((1, 1), value, dtype=torch.float64)
    box = propagate(layer, box_around(x, radius))
    with mpmath.workdps(40):
        ends = [
            2 * max(mpmath.log1p(mpmath.exp(5 * mpmath.mpf(float(t)))) / 5, mpmath.mpf(2) ** -123)
            for t in (x - radius, x + radius)
        ]
    below, above = float(box.lower), float(box.upper)
    assert below <= ends[0]
    assert ends[1] <= above
    assert below <= float(layer(x)) * (1 + 1e-10)
    assert above - below <= ends[1] - ends[0] + 1e-9 * ends[1]


def test_softplus_injections_are_widened_by_their_rounding() -> None:
    x = torch.linspace(-18, 12, 3000, dtype=torch.float64).unsqueeze(1)
    box = _injections("softplus", Interval(x, x))
    with mpmath.workdps(40):
        for v, below, above in zip(x[:, 0].tolist(), box.lower[:, 0].tolist(), box.upper[:, 0].tolist(), strict=True):
            exact = max(mpmath.log1p(mpmath.exp(5 * mpmath.mpf(v))) / 5, mpmath.mpf(2) ** -123)
            assert below <= exact <= above, v


def test_the_domain_of_a_proof() -> None:
    b = Interval(
        torch.tensor([[0.0, 1.0], [1e-300, 1.0], [-1e-300, 1.0]], dtype=torch.float64), torch.ones(3, 2).double()
    )
    assert _within_domain(b, Sign.POSITIVE).lower.isnan().any(1).tolist() == [True, False, True]
    assert _within_domain(b, Sign.NONNEGATIVE).lower.isnan().any(1).tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("module", "shape", "message"),
    [
        (nn.MaxPool1d(2, return_indices=True), (3, 4), "returns indices"),
        (nn.Flatten(0), (3, 4), "flattens the batch"),
        (nn.Flatten(-3), (3, 4), "flattens the batch"),
        (nn.Unflatten(0, (2, 1)), (3,), "unflattens the batch"),
        (nn.LeakyReLU(-0.1), (3,), "not nondecreasing"),
        (nn.Softplus(beta=-1.0), (3,), "beta"),
        (nn.GELU(), (3,), "is a GELU, which is not known"),
        (nn.Conv1d(3, 2, 3, padding=1, padding_mode="circular"), (3, 4), "padding_mode"),
        (nn.AvgPool2d(2, divisor_override=3), (3, 4, 4), "divisor_override"),
    ],
    ids=str,
)
def test_what_is_not_bounded_is_refused_with_its_path(module: nn.Module, shape: tuple[int, ...], message: str) -> None:
    x = torch.randn(2, *shape)
    with pytest.raises(Refusal, match=message) as found:
        propagate(nn.Sequential(nn.Identity(), module).eval(), Interval(x, x))
    if "Conv" not in str(module) and "Avg" not in str(module):
        assert "Sequential[1] " in str(found.value)


def test_dropout_in_training_is_refused() -> None:
    x = torch.randn(2, 3)
    for module in (nn.Dropout(0.5), nn.AlphaDropout(0.5), VariationalDropout(0.5)):
        with pytest.raises(Refusal, match=r"Sequential\[0\] is a \w*Dropout"):
            propagate(nn.Sequential(module), Interval(x, x))


def test_input_maps_of_any_known_kind() -> None:
    x = torch.randn(5, 4).double()
    for inner in (
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4)).double().eval(),
        nn.Identity(),
        None,
    ):
        layer = PositiveConcaveLinear(4, 4, solver=EXACT["solver"], dtype=torch.float64)
        layer.input = inner
        box = propagate(layer.eval(), box_around(x, 0.1))
        for _ in range(10):
            z = layer(x + 0.1 * (2 * torch.rand_like(x) - 1))
            assert (box.lower <= z + 1e-10).all()
            assert (z - 1e-10 <= box.upper).all()


def test_given_injections_next_to_zero() -> None:
    """z = tanh(2 z + b): 0 and 0.957 for b = 0, so nothing is said of a box that reaches it, nor of negative ones."""
    layer = linear_layer(torch.full((1, 1), 2.0, dtype=torch.float64), "tanh", "given")
    b = torch.tensor([[0.0], [1e-3], [-1e-3]], dtype=torch.float64)
    box = propagate(layer, Interval(b, b + 0.5))
    assert box.lower.isnan().flatten().tolist() == [True, False, True]
    assert box.upper.isnan().flatten().tolist() == [True, False, True]
    assert box.lower[1] > 0.95
    # Where the gain is small the sign does not matter.
    small = linear_layer(torch.full((1, 1), -0.5, dtype=torch.float64), "identity", "given")
    box = propagate(small, Interval(b - 1, b))
    assert (box.lower <= (b - 1) / 1.5).all()
    assert (b / 1.5 <= box.upper).all()


def test_classes_of_modules_that_work_in_place() -> None:
    """Running the model must not change the inputs that the boxes are about."""
    net = nn.Sequential(nn.LeakyReLU(0.5, inplace=True), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        net[1].bias = nn.Parameter(torch.tensor([0.0, -0.6]))
    x = torch.tensor([[-1.0, 0.0]])
    found = certify_classes(net.eval(), x)
    assert float(x[0, 0]) == -1
    assert found.predicted.tolist() == [0]
    assert float(found.margin) == pytest.approx(0.1)


def test_random_networks_and_boxes() -> None:
    """A part of what the benchmark of boxes measures."""
    from boxes import measure

    found = measure(2000, seed=3)
    assert found["outside"] == found["inverted"] == 0
    assert found["bounded"] > 0.9 * found["samples"]
    assert found["points"] > 6 * found["bounded"]
