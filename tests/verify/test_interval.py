import pytest
import torch
from torch import nn

from perron.affine import Refusal
from perron.models import PositiveConcaveConvNet, PositiveConcaveLinearNet
from perron.nn import Equilibrium, PositiveConcaveLinear
from perron.verify import Interval, certify_classes, propagate

NETS = [
    (PositiveConcaveLinearNet(64, 10, width=12), (1, 8, 8)),
    (PositiveConcaveLinearNet(64, 10, width=12, activation="sigmoid"), (1, 8, 8)),
    (PositiveConcaveConvNet(1, 10, widths=(3, 4), image_size=8), (1, 8, 8)),
    (nn.Sequential(nn.Linear(5, 6), nn.ReLU(), PositiveConcaveLinear(6, 7), nn.Linear(7, 3)), (5,)),
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
