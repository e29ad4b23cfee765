import math

import pytest
import torch

from perron.infinite_width.activations import clip_abs, hard_tanh, scalar_function, transformed, two_slopes
from perron.infinite_width.moments import gaussian_moments, hermite_coefficients, quadrature

ONE = torch.ones((), dtype=torch.float64)
NAMES = ["linear", "relu", "leaky_relu(0.2)", "tanh", "sigmoid", "erf", "swish", "gelu", "softplus", "hard_tanh"]
MADE = [
    two_slopes(1.3, -0.4),
    hard_tanh(0.7, 1.2),
    clip_abs(0.5, 1.1, 0.3),
    transformed(scalar_function("swish"), 2, 0.5, 1),
]


@pytest.mark.parametrize("phi", [*map(scalar_function, NAMES), *MADE], ids=str)
def test_slopes_are_derivatives(phi) -> None:
    x = torch.linspace(-3, 3, 61, dtype=torch.float64) + 0.0123
    numeric = (phi.value(x + 1e-6) - phi.value(x - 1e-6)) / 2e-6
    torch.testing.assert_close(phi.slope(x), numeric, rtol=1e-7, atol=1e-8)


def test_moments_in_closed_form() -> None:
    relu = gaussian_moments(scalar_function("relu"), 4 * ONE)
    assert float(relu.mean) == pytest.approx(2 / math.sqrt(2 * math.pi), abs=1e-14)
    assert float(relu.second) == pytest.approx(4 * (0.5 - 0.5 / math.pi), abs=1e-13)
    assert float(relu.slope) == pytest.approx(0.5, abs=1e-14)
    assert float(relu.curvature) == pytest.approx(1 / (2 * math.sqrt(2 * math.pi)), abs=1e-14)
    assert float(relu.energy) == pytest.approx(0.5, abs=1e-14)
    clip = gaussian_moments(hard_tanh(1.0, 1.3), ONE)
    inside = math.erf(1.3 / math.sqrt(2))
    assert float(clip.energy) == pytest.approx(inside, abs=1e-14)
    assert float(clip.slope) == pytest.approx(inside, abs=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_spread_is_the_derivative_of_the_second_moment(name: str) -> None:
    variance = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    m = gaussian_moments(scalar_function(name), variance, shift=0.1 * ONE)
    (slope,) = torch.autograd.grad(m.second, variance)
    assert float(slope) == pytest.approx(float(m.spread.detach()), abs=1e-12)


@pytest.mark.parametrize("name", ["tanh", "relu", "gelu", "hard_tanh"])
def test_parseval(name: str) -> None:
    phi = scalar_function(name)
    c = hermite_coefficients(phi, ONE, 128)
    x, w = quadrature(ONE, phi.kinks)
    square = (w * phi.value(x) ** 2).sum()
    assert 0 <= float(square - c.square().sum()) + 1e-13 <= 2e-3


def test_variances_of_many_samples_have_panels_of_their_own() -> None:
    phi, variance = hard_tanh(1.0, 0.7), torch.tensor([0.1, 1.0, 9.0], dtype=torch.float64)
    together = gaussian_moments(phi, variance)
    for k, v in enumerate(variance):
        assert float(together.second[k]) == pytest.approx(float(gaussian_moments(phi, v).second), rel=1e-13)


def test_wrong_functions_are_refused() -> None:
    for name in ("relu7", "leaky_relu(x)", "leaky_relu(nan)"):
        with pytest.raises(ValueError, match="relu"):
            scalar_function(name)
    for make in (
        lambda: hard_tanh(1.0, 0.0),
        lambda: two_slopes(math.inf, 1.0),
        lambda: clip_abs(1.0, 1.0, math.nan),
        lambda: transformed(scalar_function("tanh"), 1.0, 0.0, 0.0),
    ):
        with pytest.raises(ValueError, match="must be"):
            make()
