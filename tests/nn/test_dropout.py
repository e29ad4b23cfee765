import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from perron import certify
from perron.cells import Activate, Inject, Normalize, VariationalDropout, as_map
from perron.constraints import nonnegative
from perron.nn import Equilibrium
from perron.solvers import Anderson, Auto, Broyden, Newton, Picard, Solver

N = 6


def _linear(scale: float = 0.9, signed: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(N, N, bias=False)
    with torch.no_grad():
        linear.weight.uniform_(-1 if signed else 0, 1).mul_(scale / linear.weight.abs().sum(1).max())
    return linear


def _layer(solver: Solver | None = None, *, p: float = 0.5, place: int = 0, scale: float = 0.9) -> Equilibrium:
    parts = [nonnegative(_linear(scale)), Inject(), Activate("tanh")]
    parts.insert(place, VariationalDropout(p))
    return Equilibrium(nn.Sequential(*parts), injection="softplus", solver=solver)


def _unrolled(layer: Equilibrium, b: Tensor, steps: int = 400) -> Tensor:
    """The fixed point under the masks of the last batch, float64, with autograd through every step."""
    (mask,) = [m.mask for m in layer.cell if isinstance(m, VariationalDropout)]
    place = [isinstance(m, VariationalDropout) for m in layer.cell].index(True)
    z = torch.zeros_like(b)
    for _ in range(steps):
        v = z * mask.double() if place == 0 else z
        v = v @ layer.cell[1 - min(place, 1)].weight.double().t()
        v = v * mask.double() if place == 1 else v
        z = torch.tanh(v + b)
    return z


@pytest.mark.parametrize(
    "solver", [Picard(), Auto(), Anderson(), Broyden(), Newton(), Auto(steps=20, on_failure="ignore")]
)
@pytest.mark.parametrize("place", [0, 1])
def test_enclosures_hold_under_the_masks_that_were_drawn(solver: Solver, place: int):
    layer = _layer(solver, place=place, scale=3.0)
    x = torch.randn(40, N)
    solution = layer.solve(x)
    z = _unrolled(layer, layer.injected(x).detach().double())
    assert solution.certified
    assert bool((solution.lower <= z).all())
    assert bool((z <= solution.upper).all())
    assert bool(((solution.value - z).abs() / z <= solution.error_bound[:, None]).all())


def test_a_solve_that_goes_on_with_few_samples_keeps_their_masks():
    # Most samples are done at once, the others are selected.
    layer = _layer(Picard(tol=1e-6, max_steps=3000), scale=40.0)
    x = torch.cat([torch.full((30, N), 20.0), torch.full((3, N), -9.0)])
    solution = layer.solve(x)
    z = _unrolled(layer, layer.injected(x).detach().double(), 3000)
    assert solution.steps.unique().numel() > 1
    assert bool(((solution.value - z).abs() <= 1e-5 * z + 1e-30).all())


def test_gradients_are_those_of_the_masked_map():
    layer = _layer(Picard(tol=1e-12, max_steps=3000)).double()
    x = torch.randn(5, N, dtype=torch.float64, requires_grad=True)
    z = layer(x)
    found = torch.autograd.grad(z.square().sum(), [x, *layer.parameters()])
    assert layer.last_solution.adjoint.certified
    wanted = torch.autograd.grad(_unrolled(layer, layer.injected(x)).square().sum(), [x, *layer.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-10) for a, b in zip(found, wanted, strict=True))


def test_masks_change_with_every_batch_and_do_nothing_in_evaluation():
    layer = _layer()
    x = torch.randn(4, N)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    layer.eval()
    plain = Equilibrium(nn.Sequential(*list(layer.cell)[1:]), injection="softplus")
    assert torch.equal(layer(x), plain(x))
    layer.train()
    assert pickle.loads(pickle.dumps(layer.cell[0])).mask is None
    assert copy.deepcopy(layer).cell[0].p == 0.5


def test_share_and_scale_of_the_masks():
    dropout = VariationalDropout(0.3)
    dropout.draw(torch.empty(200, 200))
    assert abs(float((dropout.mask == 0).double().mean()) - 0.3) < 0.01
    assert torch.allclose(dropout.mask[dropout.mask > 0], torch.tensor(1 / 0.7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [0.1, 0.3, 0.7, 0.9])
def test_the_bound_of_the_masks_covers_their_rounding(p: float, dtype: torch.dtype) -> None:
    dropout = VariationalDropout(p)
    dropout.draw(torch.empty(50, 50, dtype=dtype))
    assert float(dropout.step().row_sums().double()) >= float(dropout.mask.double().max())


def test_certificates_hold_for_every_mask():
    bounded = _layer()
    assert bounded.certificate()
    bounded.solve(torch.randn(2, N))
    assert bounded.certificate()
    # Before dropout the gain is 0.9, with it up to 1.8.
    signed = nn.Sequential(VariationalDropout(0.5), _linear(0.9, True), Inject(), Activate("tanh"))
    assert not Equilibrium(signed, injection="free").certificate()
    assert Equilibrium(signed.eval(), injection="free").certificate().kind == "bounded gain"
    signed = nn.Sequential(VariationalDropout(0.1), _linear(0.89, True), Inject(), Activate("tanh"))
    assert Equilibrium(signed, injection="free").certificate().kind == "bounded gain"
    # Unbounded: the asymptotic map is scaled by the mask.
    relu = nn.Sequential(VariationalDropout(0.5), nonnegative(_linear(0.9)), Inject(), Activate("relu"))
    layer = Equilibrium(relu, injection="softplus")
    assert layer.certificate().kind != "positive concave"
    assert "dropout" in str(layer.certificate())
    # A zero of the mask at the end is a zero of f.
    last = nn.Sequential(nonnegative(_linear()), Inject(), Activate("tanh"), VariationalDropout(0.5))
    assert not Equilibrium(last, injection="softplus").certificate()


def test_signed_cells_are_proven_sample_by_sample_under_their_masks():
    cell = nn.Sequential(VariationalDropout(0.2), _linear(0.6, True), Inject(), Activate("tanh"))
    layer = Equilibrium(cell, injection="free")
    x = torch.randn(30, N)
    solution = layer.solve(x)
    z, mask = torch.zeros(30, N).double(), cell[0].mask.double()
    for _ in range(400):
        z = torch.tanh((z * mask) @ cell[1].weight.double().t() + x.double())
    assert solution.certified
    assert bool(((solution.lower <= z) & (z <= solution.upper)).all())


def test_what_cannot_carry_dropout_is_refused():
    for p in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"\[0, 1\)"):
            VariationalDropout(p)
    unknown = nn.Sequential(VariationalDropout(0.5), nn.Linear(N, N), nn.GELU(), Inject(), Activate("tanh"))
    with pytest.raises(ValueError, match="GELU"):
        Equilibrium(unknown)(torch.rand(2, N))
    wide = nn.Sequential(nn.Linear(N, 9), VariationalDropout(0.5), nn.Linear(9, N), Inject(), Activate("tanh"))
    with pytest.raises(ValueError, match="mask"):
        Equilibrium(wide, injection="free")(torch.randn(2, N))
    with pytest.raises((ValueError, RuntimeError)):
        torch.func.vmap(lambda t: _layer()(t), randomness="different")(torch.randn(3, 2, N))


def test_plain_dropout_is_refused_in_training_and_nothing_in_evaluation():
    cell = nn.Sequential(nn.Dropout(0.5), nonnegative(_linear()), Inject(), Activate("tanh"))
    assert "VariationalDropout" in certify(cell).refusal
    assert certify(cell.eval()).kind == "positive concave"


def test_empty_batch():
    layer = _layer()
    assert layer(torch.zeros(0, N)).shape == (0, N)


# ----------------------------------------------------------------------------------------------- weight normalisations


def test_weight_norm_keeps_a_certificate_as_long_as_its_gains_are_nonnegative():
    linear = parametrizations.weight_norm(_linear())
    layer = Equilibrium(nn.Sequential(linear, Inject(), Activate("tanh")), injection="softplus")
    assert layer.certificate().kind == "positive concave"
    assert layer.solve(torch.randn(4, N)).certified
    with torch.no_grad():
        linear.parametrizations.weight.original0[0] = -1.0
    assert layer.certificate().kind != "positive concave"


def test_spectral_norm_of_nonnegative_weights_keeps_the_certificate_and_of_signed_ones_gives_it():
    linear = parametrizations.spectral_norm(nonnegative(_linear(5.0)), n_power_iterations=20)
    layer = Equilibrium(nn.Sequential(linear, Inject(), Activate("tanh")), injection="softplus")
    assert layer.certificate().kind == "positive concave"
    solution = layer.solve(torch.randn(4, N))
    assert solution.certified

    class Below(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 0.95 * w

    signed = parametrizations.spectral_norm(_linear(5.0, True), n_power_iterations=50)
    nn.utils.parametrize.register_parametrization(signed, "weight", Below())
    layer = Equilibrium(nn.Sequential(signed, Inject(), Activate("tanh")), injection="free")
    for _ in range(5):
        layer(torch.randn(4, N))
    assert layer.eval().certificate().kind == "monotone operator"
    assert layer.solve(torch.randn(4, N)).certified


def test_one_solve_sees_one_weight_though_spectral_norm_moves_with_every_look():
    linear = parametrizations.spectral_norm(_linear(5.0))
    map, _ = as_map(nn.Sequential(linear, Inject(), Activate("tanh")))
    z, b = torch.rand(2, N), torch.rand(2, N)
    assert torch.equal(map(z, b), map(z, b))


def test_batch_statistics_and_division_by_them_are_refused_in_a_cell():
    cell = nn.Sequential(nonnegative(_linear()), Inject(), Activate("tanh"), nn.LayerNorm(N))
    assert "LayerNorm" in certify(cell).refusal
    cell = nn.Sequential(nonnegative(_linear()), Inject(), Activate("tanh+1.7"), Normalize())
    assert certify(cell).kind == "subhomogeneous"


def test_a_probability_assigned_out_of_range_is_refused():
    layer = _layer()
    layer.cell[0].p = 2.0
    assert "p = 2.0" in certify(layer).refusal
