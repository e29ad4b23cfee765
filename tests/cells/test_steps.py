"""Every step against what it says of itself: a new one is a row here."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from perron._numerics.rounding import EXACT, Rounding
from perron.cells import (
    Activate,
    Clamp,
    DiagonalLowRank,
    Inject,
    Jacobian,
    MonotoneConvolution2d,
    Normalize,
    Refusal,
    SparseLinear,
    Step,
    VariationalDropout,
)
from perron.cells import step as protocol
from perron.cells.reading import READERS, step

DOUBLE = torch.float64
EDGES = torch.tensor([[0, 0, 1, 3, 4, 4], [1, 4, 2, 3, 0, 4]])


def dropout() -> VariationalDropout:
    module = VariationalDropout(0.5)
    module.draw(torch.ones(200, 5))
    return module


# A module, and the shape of a sample.
STEPS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dense": (lambda: nn.Linear(5, 4), (5,)),
    "sparse": (lambda: SparseLinear(EDGES, 5, bias=True), (5,)),
    "diagonal and low rank": (lambda: DiagonalLowRank(5, 2, bias=True), (5,)),
    "convolution": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 4, 3)),
    "circular": (lambda: MonotoneConvolution2d(2, 3), (2, 4, 3)),
    "pooling": (lambda: nn.AvgPool2d(3, 1, 1), (2, 4, 3)),
    "mask": (dropout, (5,)),
    "injection": (Inject, (5,)),
    "tanh": (nn.Tanh, (5,)),
    "relu6": (nn.ReLU6, (5,)),
    "shifted power": (lambda: Activate("(tanh+1.2)^0.5"), (5,)),
    "unbounded": (lambda: Activate("log1p"), (5,)),
    "largest value": (Normalize, (5,)),
    "norm of channels": (lambda: Normalize(2.0, dim=1), (3, 4)),
    "clamp": (lambda: Clamp(torch.tensor([-1.0, 0.0, -0.5, -math.inf, 0.0]), torch.linspace(0.2, 2, 5)), (5,)),
    "clamp above zero": (lambda: Clamp(0.25, 1.0), (5,)),
    "cap": (lambda: Clamp(upper=0.5), (2, 4, 3)),
}
SAMPLES = 200


def build(name: str, *, nonnegative: bool = False) -> tuple[Step, tuple[int, ...]]:
    torch.manual_seed(0)
    make, shape = STEPS[name]
    module = make().double()
    if nonnegative:
        with torch.no_grad():
            for p in () if isinstance(module, Clamp) else module.parameters():
                p.abs_()
    found = step(module, name)
    return found.rebind([t.detach().double() for t in found.tensors]), shape


def arguments(shape: tuple[int, ...], *, positive: bool = False) -> Tensor:
    v = torch.randn(SAMPLES, *shape, dtype=DOUBLE)
    return v.abs() + 1e-3 if positive else v


def test_every_step_has_a_row() -> None:
    assert {type(build(name)[0]) for name in STEPS} == protocol._KNOWN
    assert {type(make()) for make, _ in STEPS.values()} <= READERS.keys()


@pytest.mark.parametrize("name", STEPS)
def test_what_it_is_is_one_thing(name: str) -> None:
    found, shape = build(name)
    assert bool(found.affine) + found.elementwise + found.normalizes + found.injects == 1
    assert found.is_affine or not found.affine
    found.check()
    zero = torch.zeros(SAMPLES, *shape, dtype=DOUBLE)
    if found.keeps_zero:
        assert not found(zero, zero).any()
    assert found.name
    assert found.per_sample == (name == "mask")
    some = found.select(torch.tensor([3, 7]))
    v = arguments(shape)
    torch.testing.assert_close(some(v[[3, 7]], v[[3, 7]]), found(v, v)[[3, 7]], equal_nan=True)


@pytest.mark.parametrize("name", STEPS)
def test_gradients_and_jacobian_are_those_of_autograd(name: str) -> None:
    found, shape = build(name)
    v, b = (arguments(shape).requires_grad_() for _ in range(2))
    found = found.rebind([t.requires_grad_() for t in found.tensors])
    value = found(v, b)
    y = torch.randn_like(value)
    of_v, *of_tensors = torch.autograd.grad(value, (v, *found.tensors), y)
    for ours, theirs in zip(found.gradients(v, y), of_tensors, strict=True):
        torch.testing.assert_close(ours, theirs)
    if found.normalizes:
        with pytest.raises(Refusal):
            found.factors(v)
        return
    jacobian = Jacobian(found.factors(v))
    torch.testing.assert_close(jacobian.rmatvec(y), of_v)
    w = torch.randn_like(v)
    torch.testing.assert_close((y * jacobian.matvec(w)).sum(), (of_v * w).sum())


@pytest.mark.parametrize("name", STEPS)
def test_boxes_slopes_and_ranges_hold_what_they_say(name: str) -> None:
    found, shape = build(name)
    # Below zero nothing is known of some activations.
    above = name == "unbounded"
    lower = arguments(shape, positive=above)
    upper = lower + torch.rand_like(lower)
    b = arguments(shape)
    error = torch.full_like(lower, 1e-6)
    if found.normalizes:
        for ask in (lambda: found.over(lower, upper, b), lambda: found.reach(lower, upper, error, b)):
            with pytest.raises(Refusal):
                ask()
        assert found.largest_slope == math.inf
        return
    low, high = found.over(lower, upper, b)
    reach = found.reach(lower, upper, error, b)
    assert torch.equal(low, reach.lower)
    assert torch.equal(high, reach.upper)
    for share in (0.0, 1.0, None):
        v = lower + (torch.rand_like(lower) if share is None else share) * (upper - lower)
        value = found(v, b)
        assert (low <= value).all()
        assert (value <= high).all()
        # An argument that is off by its error.
        off = (found(v + error, b) - value).abs(), (found(v - error, b) - value).abs()
        assert (torch.maximum(*off) <= reach.error * (1 + 1e-6) + 1e-15).all()
        for factor, steep, flat in zip(found.factors(v), reach.steep, reach.flat, strict=True):
            one = torch.ones_like(v)
            assert (factor.matvec(one).abs() <= steep.matvec(one) * (1 + 1e-9)).all()
            if found.elementwise:
                assert (flat.diagonal() <= factor.diagonal() * (1 + 1e-9)).all()
    if (box := found.range(lower)) is not None:
        value = found(1e3 * lower, b)
        assert (box[0] <= value).all()
        assert (value <= box[1]).all()
    if found.elementwise and not above:
        x, y = 5 * lower, 5 * arguments(shape)
        assert ((found(x, b) - found(y, b)).abs() <= found.largest_slope * (x - y).abs() * (1 + 1e-9) + 1e-15).all()
        assert not found.nonexpansive or found.largest_slope <= 1 + 1e-12
        assert not found.projects or torch.equal(found(found(x, b), b), found(x, b))


@pytest.mark.parametrize("name", STEPS)
def test_what_it_says_of_the_orthant(name: str) -> None:
    found, shape = build(name, nonnegative=True)
    x, y, b = (arguments(shape, positive=True) for _ in range(3))
    value = found(x, b)
    assert (value <= found.supremum * (1 + 1e-12)).all()
    try:
        found.check_concave()
    except Refusal:
        assert name in ("circular", "largest value", "norm of channels", "clamp above zero")
    else:
        middle = found((x + y) / 2, b)
        assert (found(x, 0 * b) >= found.least).all()
        assert (2 * middle >= (value + found(y, b)) * (1 - 1e-9)).all()
        assert (found(x + y, b) >= value * (1 - 1e-9)).all()
        assert not found.positive(True, True) or (value > 0).all()
        if found.elementwise:
            far = 1e30 * torch.ones_like(x)
            assert (found(far, b) <= (found.asymptotic_slope + 1e-9) * far).all()
            flat, steep = (
                f.diagonal() for side in ("lower", "upper") for f in found.factors(x, side, Rounding(1e-12, 0.0))
            )
            slope = found.factors(x)[0].diagonal()
            assert (flat <= slope).all()
            assert (slope <= steep).all()
            larger = found.factors(x + y)[0].diagonal()
            assert (larger <= steep).all()
    try:
        mu, least = found.degree(1e-3)
    except Refusal:
        assert name == "circular"
        return
    assert (found(x, b) >= least * (1 - 1e-12)).all()
    # F(t x) <= t^mu F(x) for t >= 1, and Thompson's distance.
    for t in (1.1, 3.0):
        ratio = (found(t * x, b) / found(x, b))[found(x, b) > 0]
        assert float(ratio.log().abs().max()) <= mu * math.log(t) * (1 + 1e-9)
    if not found.injects and (found(x, b) > 0).all() and (found(y, b) > 0).all():
        apart = (x.log() - y.log()).abs().flatten(1).amax(1)
        after = (found(x, b).log() - found(y, b).log()).abs().flatten(1).amax(1)
        assert (after <= found.thompson(apart) * (1 + 1e-9) + 1e-12).all()


@pytest.mark.parametrize("name", [name for name in STEPS if name != "circular"])
def test_its_rounding_is_bounded(name: str) -> None:
    """In float32 against float64, on arguments with an error of their own."""
    found, shape = build(name, nonnegative=True)
    short = found.rebind([t.float() for t in found.tensors])
    exact, plain = short.rebind([t.double() for t in short.tensors]), short.rigorous()
    assert plain is not None
    v, b = (arguments(shape, positive=True).float() for _ in range(2))
    off = 1e-4
    for before in (EXACT, Rounding(off, 0.0)):
        moved = (v.double() * (1 + before.relative)).float()
        bound = plain.rounded(before, torch.float32, v[0].numel())
        relative = bound.relative + 2.0**-23 * (before is not EXACT)
        value = exact(v.double(), b.double())
        assert ((plain(moved, b).double() - value).abs() <= relative * value + bound.absolute).all()
