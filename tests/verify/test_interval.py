import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from perron.affine import Refusal
from perron.cells import trace
from perron.models import PositiveConcaveConvNet, PositiveConcaveLinearNet, RivalConvNet, RivalNet
from perron.nn import (
    Equilibrium,
    MonotoneLinear,
    PlainLinear,
    PositiveConcaveLinear,
    SubhomogeneousLinear,
    VariationalDropout,
)
from perron.solvers import Auto
from perron.verify import Interval, certify_classes, propagate
from perron.verify.interval import _thompson_distance

NETS = [
    (PositiveConcaveLinearNet(64, 10, width=12), (1, 8, 8)),
    (PositiveConcaveLinearNet(64, 10, width=12, activation="sigmoid"), (1, 8, 8)),
    (PositiveConcaveConvNet(1, 10, widths=(3, 4), image_size=8), (1, 8, 8)),
    (nn.Sequential(nn.Linear(5, 6), nn.ReLU(), PositiveConcaveLinear(6, 7), nn.Linear(7, 3)), (5,)),
    (RivalNet("subdeq-nonnegative", 64, 10, width=12), (1, 8, 8)),
    (RivalNet("subdeq-bounded", 64, 10, width=12), (1, 8, 8)),
    (RivalNet("mondeq", 64, 10, width=12), (1, 8, 8)),
    (RivalConvNet("mondeq", 1, 10, widths=[3], image_size=8), (1, 8, 8)),
    (RivalConvNet("subdeq-nonnegative", 1, 10, widths=[3], image_size=8), (1, 8, 8)),
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


EXACT = {"injection": "given", "solver": Auto(tol=1e-11, max_steps=5000, on_failure="ignore"), "dtype": torch.float64}
LAYERS = [
    lambda: PositiveConcaveLinear(5, 5, **EXACT),
    lambda: SubhomogeneousLinear(5, 5, "tanh+1.7", normalize=float("inf"), initial_radius=3.0, **EXACT),
    lambda: SubhomogeneousLinear(5, 5, "(tanh+1.2)^0.3", normalize=2.0, initial_radius=3.0, **EXACT),
    lambda: SubhomogeneousLinear(5, 5, weights="signed_bounded", initial_radius=3.0, **EXACT),
    lambda: MonotoneLinear(5, 5, "tanh", margin=0.3, **EXACT),
    lambda: MonotoneLinear(5, 5, "relu", margin=1.0, **EXACT),
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


@pytest.mark.parametrize(("weight", "kind"), [(0.75, "bounded gain"), (-3.0, "monotone")])
def test_shift_of_the_fixed_point_in_closed_form(weight: float, kind: str) -> None:
    """z = w z + b with slope 1: dz = db/(1 - w), and both bounds are exact."""
    layer = MonotoneLinear(1, 1, "identity", margin=0.25, **EXACT)
    with torch.no_grad():
        layer.recurrent.weight = torch.full((1, 1), weight).double()
    assert layer.certificate().kind == kind
    b = torch.ones(1, 1).double()
    box = propagate(layer, Interval(b - 0.1, b + 0.1))
    low, high = 0.9 / (1 - weight), 1.1 / (1 - weight)
    assert low - 2e-3 <= box.lower.item() <= low
    assert high <= box.upper.item() <= high + 2e-3


@given(st.integers(0, 10_000))
def test_thompson_distance_of_two_injections(seed: int) -> None:
    torch.manual_seed(seed)
    layer = SubhomogeneousLinear(4, 4, "tanh+1.7", normalize=2.0, initial_radius=3.0, **EXACT)
    chain = trace(layer.cell)
    centre = torch.rand(50, 4, dtype=torch.float64)
    box = Interval(centre * torch.rand(50, 4), centre * (1 + torch.rand(50, 4)))
    bound = _thompson_distance(chain, box, centre)
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
        propagate(PlainLinear(5, 5, initial_radius=9.0, **EXACT), Interval(b, b))


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
