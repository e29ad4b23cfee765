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
COMPOSITE = {
    "tanh+1.2": lambda v: mpmath.tanh(v) + mpmath.mpf(1.2),
    "(tanh+1.2)^0.5": lambda v: (mpmath.tanh(v) + mpmath.mpf(1.2)) ** mpmath.mpf(0.5),
    "sigmoid^0.25": lambda v: (1 / (1 + mpmath.exp(-v))) ** mpmath.mpf(0.25),
    "softsign+1.5": lambda v: v / (1 + v) + mpmath.mpf(1.5),
    "(log1p+0.1)^0.3": lambda v: (mpmath.log1p(v) + mpmath.mpf(0.1)) ** mpmath.mpf(0.3),
    "(identity+1.2)^0.5": lambda v: (v + mpmath.mpf(1.2)) ** mpmath.mpf(0.5),
}
REFERENCE |= COMPOSITE
NAMES = [*ACTIVATIONS, *COMPOSITE]
GRID = torch.cat([torch.zeros(1), torch.logspace(-30, 6, 1500, dtype=torch.float64)])


@pytest.mark.parametrize("name", NAMES)
def test_declared_facts(name: str) -> None:
    a = get_activation(name)
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


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_within_the_declared_ulps(name: str, dtype: torch.dtype) -> None:
    a = get_activation(name)
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


def _whole_range(dtype: torch.dtype) -> torch.Tensor:
    """From subnormal to huge, densely in between, and on both sides of where torch's kernels branch."""
    info = torch.finfo(dtype)
    low, high = math.log10(info.tiny) - 6, math.log10(info.max)
    branches = [0.0, 0.5, 1.0, 6.0, 9.0, 19.0, 20.0, 37.0, 88.5, 104.0, 708.0, 710.0, 745.0, info.tiny, info.max]
    edges = torch.tensor(branches, dtype=dtype)
    nearby = [edges, torch.nextafter(edges, edges * 0), torch.nextafter(edges, edges * 2 + info.tiny)]
    v = [torch.logspace(low, high, 200, dtype=torch.float64), torch.logspace(-2, 3, 300, dtype=torch.float64)]
    v = torch.cat([*(t.to(dtype) for t in v), *nearby])
    return v[v.isfinite()].sort().values


ON_THE_LINE = {
    "softsign": lambda v: v / (1 + abs(v)),
    "softsign+1.5": lambda v: v / (1 + abs(v)) + mpmath.mpf(1.5),
    "relu": lambda v: max(v, mpmath.mpf(0)),
    "relu6": lambda v: min(max(v, mpmath.mpf(0)), mpmath.mpf(6)),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_over_the_whole_range_of_floats(name: str, dtype: torch.dtype) -> None:
    """The declared rounding, the supremum, and bounds, at subnormal to huge numbers of both signs."""
    a = get_activation(name)
    base, _, _ = a.inner or (a, 0.0, 1.0)
    u, tiny = torch.finfo(dtype).eps / 2, torch.finfo(dtype).tiny
    reference = ON_THE_LINE.get(name, REFERENCE[name])
    v = _whole_range(dtype)
    v = v if base.below_zero is None else torch.cat([-v.flip(0), v])
    value, (low, high) = a(v), a.over(v, v)
    known = ~low.isnan()
    assert known[v >= 0].all()
    assert known.all() or name == "(identity+1.2)^0.5"
    v, value, low, high = v[known], value[known], low[known], high[known]
    with mpmath.workdps(40):
        for x, y, below, above in zip(v.tolist(), value.tolist(), low.tolist(), high.tolist(), strict=True):
            exact = reference(mpmath.mpf(x))
            if a.inner is None or x >= 0:
                # Below zero a sum of two terms.
                terms = abs(exact) + (2 * base.at_zero if x < 0 else 0)
                assert abs(y - exact) <= a.ulps * u * terms + tiny, (x, y)
            assert below <= exact <= above, (x, below, above)
            assert exact <= a.supremum, x


@pytest.mark.parametrize("base", ["tanh", "arctan", "sigmoid"])
@pytest.mark.parametrize("power", [1.0, 0.7, 0.3])
def test_supremum_and_infimum_of_composites_are_rounded_outwards(base: str, power: float) -> None:
    top, bottom = {"tanh": (1, -1), "arctan": (mpmath.pi / 2, -mpmath.pi / 2), "sigmoid": (1, 0)}[base]
    with mpmath.workdps(40):
        for k in range(60):
            shift = 1.6 + 0.013 * k
            a = get_activation(f"({base}+{shift!r})^{power!r}")
            assert (top + mpmath.mpf(shift)) ** mpmath.mpf(power) <= a.supremum
            assert a.infimum <= (bottom + mpmath.mpf(shift)) ** mpmath.mpf(power)


@pytest.mark.parametrize("name", NAMES)
def test_bounds_of_boxes(name: str) -> None:
    a = get_activation(name)
    ends = 4 * torch.randn(2, 2000, dtype=torch.float64)
    lower, upper = ends.amin(0), ends.amax(0)
    low, high = a.over(lower, upper)
    known = ~low.isnan()
    assert (known == ~high.isnan()).all()
    assert known[lower >= 0].all()
    assert known.all() or a.below_zero is None
    for t in torch.linspace(0, 1, 9, dtype=torch.float64):
        value = a((lower + t * (upper - lower)).clamp(lower, upper))
        assert (low <= value)[known].all()
        assert (value <= high)[known].all()
    # Attained at both ends.
    torch.testing.assert_close(low[known], a(lower)[known], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(high[known], a(upper)[known], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [n for n, a in ACTIVATIONS.items() if a.derivative_of_value is not None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_derivative_of_the_value(name: str, dtype: torch.dtype) -> None:
    a = get_activation(name)
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


@pytest.mark.parametrize("name", NAMES)
def test_derivative_is_that_of_autograd(name: str) -> None:
    v = torch.rand(50, dtype=torch.float64).mul_(9).requires_grad_()
    a = get_activation(name)
    (expected,) = torch.autograd.grad(a(v).sum(), v)
    torch.testing.assert_close(a.derivative(v.detach()), expected)


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="sigmoid"):
        get_activation("gelu")
    assert math.isinf(get_activation("log1p").supremum)


@pytest.mark.parametrize(
    "text",
    [
        "tanh+",
        "+1.2",
        "gelu+1",
        "tanh+1.2^0.5",
        "tanh+1..2",
        "sigmoid^2",
        "sigmoid^0",
        "tanh^0.5",
        "(tanh+1",
        "tanh+-1",
    ],
)
def test_what_is_no_activation_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"activation"):
        get_activation(text)


def test_composites_are_the_same_object_each_time() -> None:
    assert get_activation("tanh + 1.2") is get_activation("tanh+1.2")


@pytest.mark.parametrize("name", [n for n in NAMES if not math.isnan(get_activation(n).infimum)])
def test_slopes_and_range_over_the_whole_line(name: str) -> None:
    a = get_activation(name)
    line = torch.cat([-GRID.double().flip(0), GRID.double()])
    y = a(line)
    assert (y >= a.infimum - 1e-12).all()
    assert (y <= a.supremum + 1e-12).all()
    generator = torch.Generator().manual_seed(0)
    ends = 4 * torch.randn(2, 500, generator=generator, dtype=torch.float64)
    lower, upper = ends.amin(0), ends.amax(0)
    top = a.steepest(lower, upper)
    for t in torch.linspace(0, 1, 40, dtype=torch.float64):
        v = (lower + t * (upper - lower)).requires_grad_()
        (slope,) = torch.autograd.grad(a(v).sum(), v)
        assert (slope <= top).all()
    # Sharp, too: the bound is met somewhere between the ends, up to what a power adds.
    assert (top <= a.slope_at_zero * (1 + 1e-6)).all() or a.inner is not None
