import pytest
import torch

from perron import certify
from perron.models import (
    CONVOLUTIONAL_CORES,
    CORES,
    BaselineConvNet,
    BaselineNet,
    SubhomogeneousConvNet,
    SubhomogeneousLinearNet,
    matched_width,
    parameter_count,
)
from perron.nn import Equilibrium, NeuralODE, PositiveConcaveLinear, UnconstrainedLinear


@pytest.mark.parametrize("core", list(CORES))
def test_every_core_trains_and_has_the_parameters_asked_for(core: str) -> None:
    torch.manual_seed(0)
    width = matched_width(lambda w: BaselineNet(core, 64, 10, width=w), 5000)
    net = BaselineNet(core, 64, 10, width=width)
    assert abs(parameter_count(net) - 5000) <= 150
    x, y = torch.rand(16, 1, 8, 8), torch.randint(0, 10, (16,))
    torch.nn.functional.cross_entropy(net(x), y).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    layers = [m for m in net.modules() if isinstance(m, Equilibrium)]
    assert len(layers) == (core not in ("node", "anode", "explicit", "no-equilibrium"))
    assert all(m.last_solution.converged.all() for m in layers)


@pytest.mark.parametrize("core", list(CONVOLUTIONAL_CORES))
def test_every_convolutional_core_trains_and_has_the_parameters_asked_for(core: str) -> None:
    torch.manual_seed(0)
    width = matched_width(lambda w: BaselineConvNet(core, 1, 10, widths=[w], image_size=8), 2500)
    net = BaselineConvNet(core, 1, 10, widths=[width], image_size=8)
    assert abs(parameter_count(net) - 2500) <= 300
    x, y = torch.rand(16, 1, 8, 8), torch.randint(0, 10, (16,))
    torch.nn.functional.cross_entropy(net(x), y).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    layers = [m for m in net.modules() if isinstance(m, Equilibrium)]
    assert len(layers) == (core not in ("explicit", "no-equilibrium"))
    assert all(m.last_solution.converged.all() for m in layers)
    several = BaselineConvNet(core, 3, 5, widths=[3, 4], image_size=8)
    assert several(torch.rand(2, 3, 8, 8)).shape == (2, 5)


@pytest.mark.parametrize("weights", ["signed", "nonnegative", "signed_bounded"])
def test_reference_subhomogeneous_networks(weights: str) -> None:
    torch.manual_seed(0)
    linear = SubhomogeneousLinearNet(weights=weights)
    # 784 x 87 + 87 x 87 weights and what stands around them: the paper's size.
    assert parameter_count(linear) == 76_918
    conv = SubhomogeneousConvNet(width=4, image_size=12, weights=weights)
    assert linear(torch.rand(4, 1, 28, 28)).shape == conv(torch.rand(4, 1, 12, 12)).shape == (4, 10)
    if weights == "signed":
        # Free weights are only certified while they are small.
        with torch.no_grad():
            for layer in (m for net in (linear, conv) for m in net.modules() if isinstance(m, Equilibrium)):
                layer.recurrent.weight.mul_(20)
    assert bool(certify(linear)) == bool(certify(conv)) == (weights != "signed")
    if weights != "signed_bounded":
        normalized = SubhomogeneousConvNet(
            width=4, image_size=12, activation="tanh+1.603", normalize=float("inf"), weights=weights
        )
        normalized(torch.rand(4, 1, 12, 12)).sum().backward()
        assert bool(certify(normalized)) == (weights == "nonnegative")
    with pytest.raises(ValueError, match="windows"):
        SubhomogeneousConvNet(image_size=4)


def test_the_twin_without_equilibrium_is_the_layer_with_zero_weights() -> None:
    torch.manual_seed(0)
    twin = BaselineNet("no-equilibrium", 64, 10, width=20)
    layer = PositiveConcaveLinear(20, 20, injection="pre")
    with torch.no_grad():
        layer.recurrent.weight = torch.zeros(20, 20)
    x = torch.randn(8, 20)
    torch.testing.assert_close(twin[3](x), layer(x), rtol=1e-4, atol=1e-6)


def test_an_unknown_core_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="mondeq"):
        BaselineNet("lstm")


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
    layer = UnconstrainedLinear(4, 8, initial_radius=8.0)
    assert not layer.certificate()
    small = UnconstrainedLinear(4, 8, initial_radius=0.1)
    assert small.certificate().kind == "bounded gain"
    assert small.solve(-torch.randn(3, 4)).certified
    assert UnconstrainedLinear(8, 8, injection="given", initial_radius=0.1).solve(-torch.rand(3, 8)).certified
