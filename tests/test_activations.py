import math

import mpmath
import pytest
import torch

from perron.activations import ACTIVATIONS, get_activation

REFERENCE = {
    "tanh": mpmath.tanh,
    "softsign": lambda v: v / (1 + v),
    "relu6": lambda v: min(v, mpmath.mpf(6)),
    "sigmoid": lambda v: 1 / (1 + mpmath.exp(-v)),
    "one_minus_exp": lambda v: -mpmath.expm1(-v),
    "arctan": mpmath.atan,
    "erf": mpmath.erf,
    "log1p": mpmath.log1p,
    "sqrt_shift": lambda v: mpmath.sqrt(v + mpmath.mpf("0.25")),
    "relu": lambda v: v,
    "identity": lambda v: v,
}
GRID = torch.cat([torch.zeros(1), torch.logspace(-30, 6, 1500, dtype=torch.float64)])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_declared_facts(name: str) -> None:
    a = ACTIVATIONS[name]
    v = GRID.double()
    y = a(v)
    assert float(a(torch.zeros(1, dtype=torch.float64))) == a.at_zero
    assert (y >= 0).all()
    assert (y <= a.supremum).all()
    if a.bounded:
        assert float(a(torch.tensor(1e30, dtype=torch.float64))) == pytest.approx(a.supremum, rel=1e-12)
    assert float(a(torch.tensor(1e12, dtype=torch.float64))) / 1e12 == pytest.approx(a.asymptotic_slope, abs=1e-5)
    assert (y.diff() >= -1e-15 * y[1:]).all(), "not nondecreasing"
    middle = a((v[1:] + v[:-1]) / 2)
    assert (middle >= (y[1:] + y[:-1]) / 2 * (1 - 1e-14)).all(), "not concave"
    # Subhomogeneity, on which the rounding analysis rests.
    for t in (1.0000001, 1.5, 100.0):
        assert (a(t * v) <= t * y * (1 + 1e-14)).all()
    assert float(a.derivative(torch.zeros(1, dtype=torch.float64))) == pytest.approx(a.slope_at_zero, rel=1e-14)
    assert (a.derivative(v) <= a.slope_at_zero * (1 + 1e-14)).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_within_the_declared_ulps(name: str, dtype: torch.dtype) -> None:
    a = ACTIVATIONS[name]
    u = torch.finfo(dtype).eps / 2
    v = torch.logspace(-8, 3, 500, dtype=torch.float64).to(dtype)
    # Long enough for the vectorised kernels, and strided, for the scalar ones.
    for argument in (v, v[::2]):
        value, slope = a(argument), a.derivative(argument)
        with mpmath.workdps(50):
            for x, y, s in zip(argument.tolist(), value.tolist(), slope.tolist(), strict=True):
                exact = REFERENCE[name](mpmath.mpf(x))
                assert abs(y - exact) <= a.ulps / 2 * u * exact, (x, y)
                if name != "relu6":
                    derivative = mpmath.diff(REFERENCE[name], mpmath.mpf(x))
                    assert abs(s - derivative) <= a.ulps * u * a.slope_at_zero, (x, s)


@pytest.mark.parametrize("name", [n for n, a in ACTIVATIONS.items() if a.derivative_of_value is not None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_derivative_of_the_value(name: str, dtype: torch.dtype) -> None:
    a = ACTIVATIONS[name]
    assert a.derivative_of_value is not None
    values = a(torch.logspace(-8, 2, 400, dtype=torch.float64)).to(dtype)
    if name == "relu6":
        values = values[values < 6]
    slopes = a.derivative_of_value(values)
    assert (slopes.diff() <= 0).all(), "not nonincreasing"
    inverse = {
        "tanh": mpmath.atanh,
        "softsign": lambda s: s / (1 - s),
        "sigmoid": lambda s: mpmath.log(s / (1 - s)),
        "one_minus_exp": lambda s: -mpmath.log1p(-s),
        "arctan": mpmath.tan,
        "log1p": mpmath.expm1,
        "sqrt_shift": lambda s: s * s - mpmath.mpf("0.25"),
    }.get(name, lambda s: s)
    u = torch.finfo(dtype).eps / 2
    with mpmath.workdps(50):
        for s, slope in zip(values.tolist(), slopes.tolist(), strict=True):
            if s < a.supremum * (1 - 4 * u):
                exact = mpmath.diff(REFERENCE[name], inverse(mpmath.mpf(s)))
                assert abs(slope - exact) <= a.ulps * u * a.slope_at_zero, (s, slope)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivative_is_that_of_autograd(name: str) -> None:
    v = torch.rand(50, dtype=torch.float64).mul_(9).requires_grad_()
    a = ACTIVATIONS[name]
    (expected,) = torch.autograd.grad(a(v).sum(), v)
    torch.testing.assert_close(a.derivative(v.detach()), expected)


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="sigmoid"):
        get_activation("gelu")
    assert math.isinf(get_activation("log1p").supremum)
