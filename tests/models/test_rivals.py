import pytest
import torch

from perron.models import CORES, RivalNet, matched_width, parameter_count
from perron.nn import Equilibrium, NeuralODE, PlainLinear, PositiveConcaveLinear


@pytest.mark.parametrize("core", list(CORES))
def test_every_core_trains_and_has_the_parameters_asked_for(core: str) -> None:
    torch.manual_seed(0)
    width = matched_width(core, 5000, 64, 10)
    net = RivalNet(core, 64, 10, width=width)
    assert abs(parameter_count(net) - 5000) <= 150
    x, y = torch.rand(16, 1, 8, 8), torch.randint(0, 10, (16,))
    torch.nn.functional.cross_entropy(net(x), y).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    layers = [m for m in net.modules() if isinstance(m, Equilibrium)]
    assert len(layers) == (core not in ("node", "anode", "explicit", "no-equilibrium"))
    assert all(m.last_solution.converged.all() for m in layers)


def test_the_twin_without_equilibrium_is_the_layer_with_zero_weights() -> None:
    torch.manual_seed(0)
    twin = RivalNet("no-equilibrium", 64, 10, width=20)
    layer = PositiveConcaveLinear(20, 20, injection="pre")
    with torch.no_grad():
        layer.recurrent.weight = torch.zeros(20, 20)
    x = torch.randn(8, 20)
    torch.testing.assert_close(twin[3](x), layer(x), rtol=1e-4, atol=1e-6)


def test_an_unknown_core_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="mondeq"):
        RivalNet("lstm")


def test_ode_against_the_exact_flow() -> None:
    """dz/dt = -tanh z: sinh z(1) = sinh z(0) / e."""
    block = NeuralODE(3, rtol=1e-9, atol=1e-9).double()
    with torch.no_grad():
        block.inner.weight.copy_(-torch.eye(3))
        block.inner.bias.zero_()
    x = torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(block(x), torch.asinh(torch.sinh(x) / torch.e), rtol=1e-7, atol=1e-8)
    assert block.evaluations > 6
    with pytest.raises(ValueError, match="augment"):
        NeuralODE(3, augment=-1)
    assert NeuralODE(3, augment=2)(torch.randn(4, 3)).shape == (4, 3)


def test_a_plain_layer_is_certified_by_its_weights_or_not_at_all() -> None:
    torch.manual_seed(0)
    layer = PlainLinear(4, 8, initial_radius=8.0)
    assert not layer.certificate()
    small = PlainLinear(4, 8, initial_radius=0.1)
    assert small.certificate().kind == "bounded gain"
    assert small.solve(-torch.randn(3, 4)).certified
    assert PlainLinear(8, 8, injection="given", initial_radius=0.1).solve(-torch.rand(3, 8)).certified
