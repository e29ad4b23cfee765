import pickle

import pytest
import torch
import torch.nn.functional as F

from perron import certify
from perron.infinite_width import (
    ExplicitEquivalent,
    GaussianEquilibrium,
    explicit_ck,
    explicit_equivalent,
    implicit_kernels,
    match_explicit,
)
from perron.nn import PositiveConcaveLinear


def inputs(n: int = 40, p: int = 30) -> torch.Tensor:
    torch.manual_seed(0)
    return F.normalize(torch.randn(n, p, dtype=torch.float64))


@pytest.mark.parametrize("name", ["tanh", "relu"])
def test_features_approach_the_kernel_like_one_over_the_root_of_the_width(name: str) -> None:
    x = inputs()
    wanted = implicit_kernels(x, name, 0.3, 0.7).ck
    errors = []
    for width in (100, 1600):
        found = []
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            layer = GaussianEquilibrium(30, width, name, generator=generator).double()
            z = layer(x).detach()
            assert bool(layer.last_solution.converged.all())
            net, match = explicit_equivalent(layer, x, generator=generator)
            y = net(x).detach()
            found.append(torch.stack([(z @ z.t() - wanted).norm(), (y @ y.t() - wanted).norm()]) / wanted.norm())
        errors.append(torch.stack(found).mean(0))
    ratio = errors[1] / errors[0]
    # A quarter, but for chance.
    assert bool(((ratio > 0.15) & (ratio < 0.4)).all())
    assert float(match.residuals.abs().max()) < 1e-9
    assert torch.equal(net.weights[0], layer.B)


def test_explicit_features_have_the_kernel_of_their_activations() -> None:
    x = inputs()
    layers = match_explicit("relu", 0.3, 0.7).activations
    net = ExplicitEquivalent(30, 6000, layers).double()
    z = net(x).detach()
    wanted = explicit_ck(x, layers)
    assert float((z @ z.t() - wanted).norm() / wanted.norm()) < 0.12


def test_a_gaussian_layer_is_a_layer() -> None:
    layer = GaussianEquilibrium(5, 16, "relu")
    x = torch.randn(3, 5, requires_grad=True)
    layer(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert not certify(layer)
    again = GaussianEquilibrium(5, 16, "relu")
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))
    assert layer(torch.zeros(0, 5)).shape == (0, 16)
    with pytest.raises(ValueError, match=r"\(batch, 5\)"):
        layer(torch.randn(3, 4))
    with pytest.raises(ValueError, match="width"):
        GaussianEquilibrium(5, 0)


def test_other_layers_have_no_equivalent() -> None:
    with pytest.raises(ValueError, match="nonnegative weights"):
        explicit_equivalent(PositiveConcaveLinear(5, 5), torch.randn(3, 5))
    layer = GaussianEquilibrium(5, 16)
    with pytest.raises(ValueError, match="data must be"):
        explicit_equivalent(layer, torch.randn(3, 4))
    wide, _ = explicit_equivalent(layer, torch.randn(3, 5), width=32)
    assert wide(torch.randn(3, 5)).shape == (3, 32)
    for wrong in ((5, 0, ["relu"]), (5, 4, []), (5, 4, ["relu"], -1.0)):
        with pytest.raises(ValueError, match="positive"):
            ExplicitEquivalent(*wrong)
    with pytest.raises(ValueError, match="input_weight"):
        ExplicitEquivalent(5, 4, ["relu"], input_weight=torch.zeros(5, 4))
    with pytest.raises(ValueError, match="batch, 5"):
        wide(torch.randn(2, 3, 5))
    assert "hard_tanh" in repr(wide)
    state = pickle.loads(pickle.dumps(wide.state_dict()))
    assert set(state) == {"weights.0"}
