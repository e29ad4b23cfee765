import copy
import inspect

import mpmath
import pytest
import torch
from torch import nn

from perron.cells import trace
from perron.gradients import JacobianFree
from perron.nn import (
    Activate,
    DiagonalLowRank,
    Equilibrium,
    Inject,
    MonotoneConv2d,
    MonotoneLinear,
    PositiveConcaveConv1d,
    PositiveConcaveConv2d,
    PositiveConcaveConv3d,
    PositiveConcaveLinear,
    SparseLinear,
    SubhomogeneousConv2d,
    SubhomogeneousLinear,
    UnconstrainedConv2d,
    UnconstrainedLinear,
)
from perron.nn.equilibrium import positive_injection
from perron.nn.recurrent import RecurrentOptions
from perron.solvers import Picard
from problems import long_picard

LAYERS = [
    (PositiveConcaveLinear, (4,)),
    (PositiveConcaveConv1d, (4, 9)),
    (PositiveConcaveConv2d, (4, 6, 5)),
    (PositiveConcaveConv3d, (4, 3, 4, 3)),
]
ALL = [
    *LAYERS,
    (SubhomogeneousLinear, (4,)),
    (SubhomogeneousConv2d, (4, 6, 5)),
    (MonotoneLinear, (4,)),
    (MonotoneConv2d, (4, 6, 5)),
    (UnconstrainedLinear, (4,)),
    (UnconstrainedConv2d, (4, 6, 5)),
]


@pytest.mark.parametrize(("kind", "shape"), LAYERS)
@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
@pytest.mark.parametrize("injection", ["inside", "pre", "given"])
def test_every_layer_is_certified_and_right(kind, shape, activation, injection) -> None:
    layer = kind(4, 4, activation=activation, injection=injection)
    x = torch.randn(3, *shape)
    x = x.abs() + 0.1 if injection == "given" else x
    solution = layer.solve(x)
    assert layer.certificate()
    assert solution.certified
    assert solution.converged.all()
    exact = long_picard(trace(layer.cell), layer.injected(x))
    assert ((solution.lower.double() <= exact) & (exact <= solution.upper.double())).all()
    value = layer(x)
    assert value.shape == x.shape
    value.sum().backward()
    assert layer.last_solution.adjoint.certified
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


@pytest.mark.parametrize(("kind", "shape"), ALL)
def test_injection_mode_changes_only_the_affine_map(kind, shape) -> None:
    layer = kind(4, 4)
    x = torch.randn(2, *shape)
    given = kind(4, 4, injection="given")
    given.cell.load_state_dict(layer.cell.state_dict())
    torch.testing.assert_close(given(layer.injected(x)), layer(x))


@pytest.mark.parametrize(("kind", "shape"), ALL)
def test_non_contiguous_strided_and_expanded_inputs(kind, shape) -> None:
    layer = kind(4, 4)
    big = torch.randn(6, *shape)
    for view in (
        big[::2],
        big.flip(0)[:3],
        big.transpose(1, -1).contiguous().transpose(1, -1),
        big[:1].expand(3, *shape),
    ):
        torch.testing.assert_close(layer(view), layer(view.contiguous()), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("kind", "shape"), ALL)
def test_wrong_inputs_are_named(kind, shape) -> None:
    layer = kind(4, 4)
    with pytest.raises(ValueError, match=r"\(batch, 4.*got \(3, 5"):
        layer(torch.randn(3, 5, *shape[1:]))
    with pytest.raises(ValueError, match="batch"):
        layer(torch.randn(4))
    with pytest.raises(TypeError, match="int64"):
        layer(torch.ones(3, *shape, dtype=torch.long))
    with pytest.raises(TypeError, match="float64"):
        layer(torch.randn(3, *shape, dtype=torch.float64))
    assert layer(torch.randn(0, *shape)).shape == (0, *shape)
    x = torch.randn(3, *shape)
    x.view(3, -1)[1, 2] = torch.nan
    layer.solver = Picard(on_failure="ignore")
    assert layer.solve(x).converged.tolist() == [True, False, True]


@pytest.mark.parametrize(("kind", "shape"), LAYERS)
def test_negative_given_injections_are_named(kind, shape) -> None:
    given = kind(4, 4, injection="given")
    x = torch.rand(3, *shape) + 0.1
    x.view(3, -1)[1, 2] = -0.25
    with pytest.raises(ValueError, match=r"-0\.25 at index \[1"):
        given(x)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="must equal"):
        PositiveConcaveLinear(3, 4, injection="pre")
    with pytest.raises(ValueError, match="inside"):
        PositiveConcaveLinear(3, 4, injection="outside")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="odd"):
        PositiveConcaveConv2d(3, 4, 2)
    with pytest.raises(ValueError, match="gelu"):
        PositiveConcaveLinear(3, 4, "gelu")
    with pytest.raises(ValueError, match="initial_radius"):
        PositiveConcaveLinear(3, 4, initial_radius=float("nan"))


@pytest.mark.parametrize(("kind", "shape"), ALL)
def test_constructors_show_every_option_and_take_no_other(kind, shape) -> None:
    parameters = inspect.signature(kind).parameters
    assert all(p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in parameters.values())
    assert list(parameters)[: 3 + (len(shape) > 1)][-1] == "activation"
    assert parameters.keys() >= {"injection", "bias", "solver", "gradient", "device", "dtype"}
    given = {k: p.default for k, p in parameters.items() if p.default is not p.empty}
    torch.manual_seed(0)
    plain = kind(4, 4)
    torch.manual_seed(0)
    layer = kind(4, 4, **given)
    assert repr(layer) == repr(plain)
    for a, b in zip(layer.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(TypeError, match=rf"{kind.__name__} has no option 'biass'; it has .*\bbias\b"):
        kind(4, 4, biass=False)
    assert kind(4, 4, bias=False).input.bias is None
    assert isinstance(kind(4, 4, gradient=JacobianFree()).gradient, JacobianFree)
    assert inspect.getdoc(kind)


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        (PositiveConcaveConv3d, {"constraint": "square", "weight_norm": False, "initial_radius": 0.9}),
        (
            SubhomogeneousConv2d,
            {"normalize": None, "normalize_dim": None, "weights": "nonnegative", "initial_radius": 0.9},
        ),
        (MonotoneLinear, {"margin": 0.1}),
        (UnconstrainedLinear, {"initial_radius": 0.9}),
    ],
)
def test_the_records_of_options_hold_what_constructors_take(kind, own) -> None:
    module = inspect.getmodule(kind)
    (record,) = (v for k, v in vars(module).items() if k.endswith("Options") and k != "RecurrentOptions")
    named = {p.name: p.default for p in inspect.signature(kind).parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert named.keys() == record.__annotations__.keys()
    assert {k: v for k, v in named.items() if k not in RecurrentOptions.__annotations__} == own


@pytest.mark.parametrize(("kind", "shape"), ALL)
def test_parts_are_found_wherever_they_stand(kind, shape) -> None:
    layer = kind(4, 4)
    assert layer.recurrent is layer.cell[0]
    layer.cell = nn.Sequential(layer.recurrent, nn.Identity(), *list(layer.cell)[1:])
    assert f"activation={layer.activation.name!r}" in repr(layer)
    layer.cell = nn.Sequential(layer.recurrent, Inject())
    with pytest.raises(AttributeError, match="activation"):
        _ = layer.activation


def test_zero_and_huge_weights() -> None:
    layer = PositiveConcaveLinear(3, 4, solver=Picard(max_steps=2000))
    x = torch.randn(5, 3)
    layer.cell[0].weight = torch.zeros(4, 4)
    torch.testing.assert_close(layer(x), torch.tanh(layer.injected(x)), rtol=1e-4, atol=0)
    layer.cell[0].weight = torch.full((4, 4), 1e8)
    solution = layer.solve(x)
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, torch.ones(5, 4), rtol=1e-4, atol=0)


def test_torch_conventions() -> None:
    layer = PositiveConcaveLinear(3, 4, dtype=torch.float64, device="cpu")
    assert layer.weight.dtype == torch.float64
    assert "3, 4, activation='tanh'" in repr(layer)
    before = layer.weight.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(before, layer.weight)
    radius = float(torch.linalg.eigvals(PositiveConcaveLinear(3, 200).weight.detach()).abs().max())
    assert radius == pytest.approx(0.9, rel=0.05)
    assert set(layer.state_dict()) == {"cell.0.parametrizations.weight.original", "input.weight", "input.bias"}
    twin = copy.deepcopy(layer)
    assert twin.last_solution is None


def test_the_last_solution_is_detached() -> None:
    layer = PositiveConcaveLinear(3, 4)
    layer(torch.randn(2, 3, requires_grad=True))
    solution = layer.last_solution
    assert not solution.value.requires_grad
    assert not solution.lower.requires_grad
    assert solution.adjoint is None


@pytest.mark.parametrize("structure", ["sparse", "diagonal and low rank"])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_structured_cells_have_the_same_certificates(structure, activation) -> None:
    n = 30
    if structure == "sparse":
        matrix = SparseLinear((torch.rand(n, n) < 0.2).nonzero().t(), n)
        with torch.no_grad():
            matrix.weight.uniform_(0, 0.2)
    else:
        matrix = DiagonalLowRank(n, 3)
    layer = Equilibrium(nn.Sequential(matrix, Inject(), Activate(activation)), injection="softplus")
    assert layer.certificate()
    x = torch.randn(6, n)
    solution = layer.solve(x)
    assert solution.certified
    assert solution.converged.all()
    exact = long_picard(trace(layer.cell), layer.injected(x))
    assert ((solution.lower.double() <= exact) & (exact <= solution.upper.double())).all()
    layer(x).sum().backward()
    assert layer.last_solution.adjoint.certified
    assert all(p.grad is not None for p in matrix.parameters())
    with torch.no_grad():
        next(matrix.parameters())[0] = -0.1
    assert layer.certificate().kind != "positive concave", "a negative weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_softplus_injection_is_softplus_everywhere(dtype: torch.dtype) -> None:
    """Not the identity beyond some threshold, where a box of injections would miss what is computed."""
    u = torch.finfo(dtype).eps / 2
    thresholds = torch.tensor([4.0, 8.0, 7.99, 8.01, 0.0, 17.7, -16.0, -17.0, -200.0, 1e4, 1e30], dtype=dtype)
    b = torch.cat([thresholds, torch.nextafter(thresholds, thresholds * 2), torch.linspace(-18, 12, 400, dtype=dtype)])
    with mpmath.workdps(50):
        exact = [max(mpmath.log1p(mpmath.exp(5 * mpmath.mpf(v))) / 5, mpmath.mpf(2) ** -123) for v in b.tolist()]
    for v, found, softplus in zip(b.tolist(), positive_injection(b, "softplus").tolist(), exact, strict=True):
        assert abs(found - softplus) <= 100 * u * softplus, v
    around = positive_injection(8 + torch.linspace(-1e-9, 1e-9, 2001, dtype=torch.float64), "softplus")
    assert (around.diff() >= -4e-15).all()


def test_derivatives_of_the_softplus_injection() -> None:
    b = torch.tensor([-30.0, -3.0, -0.1, 0.0, 0.2, 3.999, 4.001, 7.999, 8.001, 50.0], dtype=torch.float64)
    slope = torch.sigmoid(5 * b).where(b > -17, torch.zeros_like(b))
    found = torch.func.vmap(torch.func.grad(lambda v: positive_injection(v, "softplus")))(b)
    torch.testing.assert_close(found, slope, rtol=1e-12, atol=1e-17)
    forward = torch.func.jvp(lambda v: positive_injection(v, "softplus"), (b,), (torch.ones_like(b),))[1]
    torch.testing.assert_close(forward, slope, rtol=1e-12, atol=1e-17)
    second = torch.func.vmap(torch.func.grad(torch.func.grad(lambda v: positive_injection(v, "softplus"))))(b)
    torch.testing.assert_close(second, 5 * slope * torch.sigmoid(-5 * b), rtol=1e-9, atol=1e-14)
