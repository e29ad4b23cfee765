import math

import pytest
import torch

from perron.infinite_width import GaussianEquilibrium, mean_field
from perron.nn import Equilibrium, PositiveConcaveConv2d, PositiveConcaveLinear, SubhomogeneousLinear


@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_random_layers_approach_their_mean_field(activation: str) -> None:
    """Mean squared distance like 1/m: power -1/2 of the distance."""
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    distances = []
    for width in (100, 1600):
        torch.manual_seed(1)
        found = mean_field(PositiveConcaveLinear(6, width, activation), x)
        assert found.gain == pytest.approx(0.9, rel=0.02)
        assert torch.allclose(found.mean, found.value.mean(1))
        distances.append(float(found.distance.square().mean().sqrt()))
    power = math.log(distances[1] / distances[0]) / math.log(16)
    assert power == pytest.approx(-0.5, abs=0.1)


def test_mean_field_of_rank_one_weights_is_exact() -> None:
    layer = PositiveConcaveLinear(3, 10, constraint="projection", dtype=torch.float64)
    with torch.no_grad():
        layer.cell[0].weight = torch.full((10, 10), 0.07, dtype=torch.float64)
    found = mean_field(layer, torch.randn(4, 3, dtype=torch.float64))
    assert found.gain == pytest.approx(0.7)
    assert bool((found.distance < 1e-3).all())


def test_structure_is_seen() -> None:
    """W = 0.9 I: no entry sees another, and the mean field is far away."""
    layer = PositiveConcaveLinear(3, 10, constraint="projection", dtype=torch.float64)
    with torch.no_grad():
        layer.cell[0].weight = 0.9 * torch.eye(10, dtype=torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64)
    found = mean_field(layer, x)
    assert bool((found.distance > 0.02).all())
    mean = found.mean
    again = torch.tanh(found.gain * mean[:, None] + layer.injected(x)).mean(1)
    assert torch.allclose(again, mean, atol=1e-3)


def test_refusals() -> None:
    x = torch.randn(2, 3)
    for layer in (
        GaussianEquilibrium(3, 8),
        SubhomogeneousLinear(3, 8, "tanh+1.2", weights="signed"),
        Equilibrium(lambda z, b: torch.tanh(z + b)),
    ):
        with pytest.raises(ValueError, match="nowhere negative"):
            mean_field(layer, x)
    with pytest.raises(ValueError, match="nowhere negative"):
        mean_field(PositiveConcaveConv2d(1, 2, 3), torch.randn(1, 1, 4, 4))
