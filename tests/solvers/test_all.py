"""What holds for every solver."""

from dataclasses import replace
from fractions import Fraction

import pytest
import soundness
import torch
from exact import ExactCell
from hypothesis import given, settings
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from perron.cells import as_map, trace
from perron.nn import Equilibrium, Inject, PositiveConcaveConv2d, PositiveConcaveLinear
from perron.solvers import (
    Anderson,
    Auto,
    Broyden,
    ConvergenceWarning,
    FixedPointProblem,
    IterativeSolver,
    Newton,
    Picard,
)
from perron.theory import PositiveConcave
from problems import dense_layer, dense_problems, truth

SOLVERS = {
    "auto": Auto(),
    "picard": Picard(),
    "anderson": Anderson(),
    "broyden": Broyden(),
    "newton": Newton(),
    "batched": Newton(linear="batched"),
    "chord": Newton(linear="chord"),
    "krylov": Newton(linear="krylov"),
    "bfloat16 steps": Auto(step_dtype=torch.bfloat16),
    "bfloat16 factors": Newton(step_dtype=torch.bfloat16, linear="batched"),
    "bfloat16 chord": Newton(step_dtype=torch.bfloat16, linear="chord"),
}


@pytest.fixture(params=list(SOLVERS))
def solver(request):
    return SOLVERS[request.param]


@pytest.mark.parametrize("name", list(SOLVERS))
def test_enclosures_hold(name: str) -> None:
    @settings(max_examples=15)
    @given(dense_problems())
    def check(problem) -> None:
        layer, b = problem
        layer.solver = replace(SOLVERS[name], tol=1e-5, max_steps=2000, on_failure="ignore")
        solution = layer.solve(b)
        exact = truth(layer, b)
        assert solution.certified
        assert solution.proof_dtype == torch.float64
        assert (solution.lower.double() <= exact * (1 + 1e-12)).all()
        assert (exact * (1 - 1e-12) <= solution.upper.double()).all()
        error = ((solution.value.double() - exact).abs() / exact).amax(1)
        assert (error <= solution.error_bound + 1e-12).all()
        assert (solution.error_bound[solution.converged] <= 1e-5).all()

    check()


@pytest.mark.parametrize("name", list(soundness.SOLVERS))
def test_soundness_at_scale(name: str) -> None:
    """A part of `make soundness`; more of it runs in the slow tests."""
    result = soundness.measure(100, seed=4, solver=name)
    assert sum(result[wrong] for wrong in soundness.FALSE) == 0, result["findings"]
    assert not [f for f in result["findings"] if f["what"] == "exception in problem"], result["findings"]
    assert result["samples"] + result["refused"] >= 90
    assert result["proven"] > 0.7 * result["samples"]
    assert result["without_truth"] < 0.05 * result["samples"]


def test_soundness_at_scale_can_fail(monkeypatch) -> None:
    """Enclosures and bounds that are a little too tight are seen on half of the samples and more."""
    solve = IterativeSolver.solve

    def optimistic(self, problem, z0=None):
        s = solve(self, problem, z0)
        if s.lower is None:
            return s
        middle, reach = (s.lower + s.upper) / 2, 0.2 * (s.upper - s.lower)
        return replace(s, lower=middle - reach, upper=middle + reach, error_bound=0.1 * s.error_bound)

    monkeypatch.setattr(IterativeSolver, "solve", optimistic)
    result = soundness.measure(60, seed=4)
    assert result["misses"] > 0
    assert result["bound_below_error"] > 0
    assert result["findings"][0]["sample"] < 60


def test_truth_has_its_closed_form() -> None:
    """z = W z + b with the inverse of a two by two matrix that is nearly singular, and far below float64's digits."""
    a, c = 1 - 2.0**-40, 2.0**-45
    layer = dense_layer(torch.tensor([[a, c], [0.0, 0.5]], dtype=torch.float64), "relu")
    b = torch.tensor([[1.0, 2.0], [1e-160, 1e150], [5e-324, 1e-300]], dtype=torch.float64)
    truth = ExactCell(trace(layer.cell), b.shape[1:]).truth(b, torch.ones_like(b), concave=True)
    for k, (first, second) in enumerate(b.tolist()):
        z2 = 2 * Fraction(second)
        z1 = (Fraction(first) + Fraction(c) * z2) * 2**40
        for exact, high, low in zip((z1, z2), truth.high[k].tolist(), truth.low[k].tolist(), strict=True):
            assert abs(Fraction(high) + Fraction(low) - exact) <= max(exact / 2**100, Fraction(5e-324))
    assert not truth.falls_below(truth.high - truth.low.abs()).any()
    # One unit in the last place above is above.
    above = torch.nextafter(truth.high, torch.full_like(b, torch.inf))
    assert truth.falls_below(torch.nextafter(above, above * 2)).all()


def test_layers_of_all_kinds(solver) -> None:
    composed = nn.Sequential(nn.Linear(4, 6), nn.Softsign(), nn.Linear(6, 4), nn.Tanh())
    cell = nn.Sequential(*composed[:3], Inject(), composed[3])
    with torch.no_grad():
        for p in cell.parameters():
            p.abs_()
    for layer, x in (
        (PositiveConcaveLinear(5, 7, solver=solver), torch.randn(6, 5)),
        (PositiveConcaveLinear(5, 7, "erf", solver=solver), torch.randn(6, 5)),
        (PositiveConcaveConv2d(2, 3, solver=solver), torch.randn(3, 2, 6, 5)),
        (Equilibrium(cell, injection="softplus", solver=solver), torch.randn(6, 4)),
    ):
        solution = layer.solve(x)
        with torch.no_grad():
            exact = truth(layer, layer.injected(x))
        assert solution.certified
        assert solution.converged.all()
        assert ((solution.lower.double() <= exact) & (exact <= solution.upper.double())).all()
        value = layer(x.clone().requires_grad_())
        torch.testing.assert_close(value.double(), exact, rtol=2e-4, atol=0)
        value.sum().backward()


def test_bad_samples_leave_their_neighbours_alone(solver) -> None:
    layer = dense_layer(torch.rand(9, 9) / 9, "tanh", solver=replace(solver, on_failure="ignore"))
    b = torch.rand(6, 9) + 0.1
    alone = layer.solve(b).value
    b[1], b[4] = torch.nan, torch.inf
    solution = layer.solve(b)
    good = [0, 2, 3, 5]
    torch.testing.assert_close(solution.value[good], alone[good], rtol=2e-4, atol=0)
    assert solution.converged[good].all()
    assert not solution.converged[[1, 4]].any()
    assert solution.value[1].isnan().all()
    assert not solution.certified
    assert solution.proven.tolist() == [True, False, True, True, False, True]
    layer.solver = replace(solver, steps=30, on_failure="ignore")
    assert not layer.solve(b).proven[[1, 4]].any(), "a bounded activation makes something finite of inf"


@pytest.mark.parametrize("make", [Auto, Anderson, Broyden, Newton])
def test_samples_that_leave_after_one_coarse_step(make) -> None:
    """What is measured of bfloat16 steps is float64 from the first step on."""
    layer = dense_layer(0.1028 * torch.ones(1, 1, dtype=torch.float64), "erf")
    layer.solver = make(tol=1e-8, step_dtype=torch.bfloat16, max_steps=8, on_failure="ignore")
    b = torch.tensor([[2e-7], [6e-5], [4e-2], [4e-4], [6e-2], [3e-4], [3e-10], [2e-8], [2e-9], [7e-6]]).double()
    solution = layer.solve(b)
    exact = truth(layer, b)
    assert ((solution.lower <= exact * (1 + 1e-12)) & (exact * (1 - 1e-12) <= solution.upper)).all()


@pytest.mark.parametrize("n", [0, 1])
def test_small_batches(solver, n: int) -> None:
    layer = PositiveConcaveLinear(5, 7, solver=solver)
    x = torch.randn(n, 5, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == (n, 5)
    opaque = Equilibrium(Rotation(), solver=solver)
    assert opaque(torch.randn(n, 4)).shape == (n, 4)


def test_strided_inputs(solver) -> None:
    layer = PositiveConcaveLinear(5, 7, solver=solver)
    x = torch.randn(5, 12).t()[::2]
    torch.testing.assert_close(layer(x), layer(x.contiguous()), rtol=2e-4, atol=0)


class Rotation(nn.Module):
    """A contraction by 0.9 whose eigenvalues lie around a circle: no structure to use."""

    def __init__(self) -> None:
        super().__init__()
        self.evaluations = 0

    def forward(self, z, x):
        self.evaluations += 1
        return 0.9 * z.roll(1, 1) + x


def test_maps_without_structure(solver) -> None:
    cell = Rotation()
    layer = Equilibrium(cell, solver=replace(solver, tol=1e-6))
    x = torch.randn(3, 4)
    solution = layer.solve(x)
    torch.testing.assert_close(solution.value, 0.9 * solution.value.roll(1, 1) + x, rtol=1e-4, atol=1e-4)
    assert solution.stopping == "residual"
    assert solution.lower is None
    assert not solution.certified
    assert solution.error_bound.isinf().all()
    assert solution.converged.all()


@pytest.mark.parametrize("name", ["anderson", "broyden", "newton", "auto"])
def test_acceleration_needs_fewer_evaluations_and_is_safe(name: str) -> None:
    cell = Rotation()
    layer = Equilibrium(cell, solver=replace(SOLVERS[name], tol=1e-6))
    solution = layer.solve(torch.randn(8, 4))
    assert solution.converged.all()
    # Picard takes about 130.
    assert cell.evaluations <= 60


def test_divergence_is_reported(solver) -> None:
    class Growing(nn.Module):
        def forward(self, z, x):
            return 2 * z.abs() + z.square() + x

    layer = Equilibrium(Growing(), solver=replace(solver, max_steps=30))
    with pytest.warns(ConvergenceWarning, match=type(solver).__name__):
        solution = layer.solve(torch.ones(2, 2))
    assert not solution.converged.any()


def test_a_wrong_shape_is_named(solver) -> None:
    class Widening(nn.Module):
        def forward(self, z, x):
            return torch.cat([z, x], 1)

    with pytest.raises(ValueError, match="equal shapes"):
        Equilibrium(Widening(), solver=solver).solve(torch.ones(2, 2))


def test_warm_starts_change_the_cost_and_not_the_proof(solver) -> None:
    layer = PositiveConcaveLinear(6, 30, solver=solver)
    x = torch.randn(8, 6)
    cold = layer.solve(x)
    exact = truth(layer, layer.injected(x).detach())
    for z0 in (cold.value, cold.value * 0, cold.value * 100, torch.full_like(cold.value, torch.nan)):
        warm = layer.solve(x, z0=z0)
        assert warm.certified
        assert warm.converged.all()
        assert ((warm.lower.double() <= exact) & (exact <= warm.upper.double())).all()
    with pytest.raises(ValueError, match="z0 must have the shape"):
        layer.solve(x, z0=cold.value[:3])


def test_a_good_guess_saves_steps() -> None:
    weight = torch.rand(64, 64)
    weight /= torch.linalg.eigvals(weight).abs().max()
    b = 0.05 * nn.functional.softplus(torch.randn(8, 64), beta=5)
    layer = dense_layer(weight, "tanh", solver=Anderson())
    cold = layer.solve(b)
    assert layer.solve(b * 1.001, z0=cold.value).steps.max() <= cold.steps.min() / 2


def test_moving_average_of_fixed_points() -> None:
    layer = Equilibrium(Rotation(), solver=Picard(), warm_start=0.5)
    x = torch.randn(1, 4).expand(6, 4)
    first = layer(x)
    steps = layer.last_solution.steps.clone()
    layer(x)
    assert (layer.last_solution.steps < steps).all()
    torch.testing.assert_close(layer.mean, first[0], rtol=1e-3, atol=1e-3)
    assert "mean" not in layer.state_dict()
    layer.eval()
    before = layer.mean.clone()
    layer(-x)
    torch.testing.assert_close(layer.mean, before)
    assert torch.isfinite(layer(torch.randn(2, 7))).all(), "another shape starts anew"


class Waits(TorchDispatchMode):
    """Counts the operations for which the host waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.count += name in {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select"}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["auto", "picard", "anderson", "broyden", "batched", "chord"])
@pytest.mark.parametrize("steps", [5, 9])
def test_fixed_steps_wait_for_nothing_and_tell_their_error(name: str, steps: int) -> None:
    weight = torch.rand(40, 40)
    weight /= torch.linalg.eigvals(weight).abs().max()
    layer = dense_layer(weight, "tanh")
    b = 0.3 * nn.functional.softplus(torch.randn(8, 40), beta=5)
    problem = FixedPointProblem(map=trace(layer.cell), injection=b, theory=PositiveConcave())
    solver = replace(SOLVERS[name], steps=steps, on_failure="ignore")
    with torch.no_grad(), Waits() as waits:
        solution = solver.solve(problem)
    assert waits.count == 0
    assert (solution.steps == steps).all()
    exact = truth(layer, b)
    proven = solution.proven
    assert proven.all() or steps < 9
    error = ((solution.value.double() - exact).abs() / exact).amax(1)
    assert (error <= solution.error_bound + 1e-12).all()
    assert ((solution.lower.double() <= exact) & (exact <= solution.upper.double()))[proven].all()


def test_fixed_steps_of_maps_without_structure(solver) -> None:
    layer = Equilibrium(Rotation(), solver=replace(solver, steps=7, on_failure="ignore"))
    solution = layer.solve(torch.randn(3, 4))
    assert (solution.steps >= 7).all()
    if not isinstance(solver, Newton):
        assert layer.cell.evaluations == 7


def test_the_host_rarely_waits() -> None:
    """Residual stopping on 130 steps: looks are foreseen from the rate."""
    layer = Equilibrium(Rotation(), solver=Picard(tol=1e-6))
    problem = FixedPointProblem(map=as_map(layer.cell)[0], injection=torch.randn(8, 4))
    with torch.no_grad(), Waits() as waits:
        solution = Picard(tol=1e-6).solve(problem)
    assert solution.converged.all()
    assert waits.count <= solution.steps.max() / 4


def test_options_are_checked() -> None:
    for wrong in (
        lambda: Anderson(window=0),
        lambda: Broyden(memory=0),
        lambda: Newton(linear="lu"),
        lambda: Auto(steps=4),
        lambda: Anderson(tol=0),
        lambda: Broyden(proof_dtype=torch.bfloat16),
    ):
        with pytest.raises(ValueError, match="must be"):
            wrong()
    with pytest.raises(TypeError):
        Anderson(windows=3)


def test_without_proof_nothing_is_certified(solver) -> None:
    layer = PositiveConcaveLinear(5, 7, solver=replace(solver, proof_dtype=None))
    x = torch.randn(4, 5)
    solution = layer.solve(x)
    assert solution.converged.all()
    assert not solution.certified
    assert solution.proof_dtype is None
    assert not solution.proven.any()
    exact = truth(layer, layer.injected(x).detach())
    torch.testing.assert_close(solution.value.double(), exact, rtol=3e-4, atol=0)


def test_stopping_by_residual(solver) -> None:
    layer = PositiveConcaveLinear(5, 7, solver=replace(solver, stop="residual", tol=1e-6))
    x = torch.randn(4, 5)
    solution = layer.solve(x)
    assert solution.stopping == "residual"
    torch.testing.assert_close(solution.value.double(), truth(layer, layer.injected(x).detach()), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("max_steps", [3, 4, 5, 8])
def test_few_steps_still_enclose(solver, max_steps: int) -> None:
    layer = dense_layer(torch.rand(8, 8), "tanh", solver=replace(solver, max_steps=max_steps, on_failure="ignore"))
    b = torch.rand(4, 8) + 0.01
    solution = layer.solve(b)
    exact = truth(layer, b)
    assert solution.stopping == "enclosure"
    proven = solution.proven
    assert ((solution.lower.double() <= exact) & (exact <= solution.upper.double()))[proven].all()


def test_nothing_is_uncertified_in_an_empty_batch(solver) -> None:
    solution = PositiveConcaveLinear(5, 7, solver=solver).solve(torch.randn(0, 5))
    assert solution.stopping == "enclosure"
    assert solution.certified


def test_a_solve_of_its_own_under_autocast(solver) -> None:
    """Autocast must not reach the products of a proof."""
    layer = dense_layer(torch.rand(30, 30) / 20, "tanh")
    b = torch.rand(6, 30) + 0.01
    problem = FixedPointProblem(map=trace(layer.cell), injection=b, theory=PositiveConcave())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        solution = solver.solve(problem)
    exact = truth(layer, b)
    assert solution.converged.all()
    assert ((solution.lower.double() <= exact) & (exact <= solution.upper.double())).all()


def test_fixed_steps_of_maps_without_structure_wait_for_nothing() -> None:
    problem = FixedPointProblem(map=as_map(Rotation())[0], injection=torch.randn(3, 4))
    with torch.no_grad(), Waits() as waits:
        Auto(steps=7, on_failure="ignore").solve(problem)
    assert waits.count == 0


@pytest.mark.parametrize("make", [Auto, Anderson, Newton])
def test_enough_fixed_steps_prove_every_sample(make) -> None:
    """On maps far from rank one a good candidate must not be lost between the steps and the proof."""
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        weight = 0.02 * torch.rand(80, 80, generator=generator) ** 2
        weight += torch.block_diag(*torch.rand(4, 20, 20, generator=generator))
        b = nn.functional.softplus(2 * torch.randn(64, 80, generator=generator) - 1.5, beta=5)
        weight *= 0.9 / torch.linalg.eigvals(weight).abs().max()
        layer = dense_layer(weight, "tanh", solver=make(steps=24))
        assert layer.solve(b).converged.all()


@pytest.mark.parametrize("make", [Auto, Picard, Anderson])
def test_without_proof_a_solve_takes_no_more_steps(make) -> None:
    """In float32 the bounds must still be able to close to the tolerance."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(60, 60, generator=generator) / 30 + torch.diag(torch.rand(60, generator=generator)) / 4
    layer = dense_layer(0.7 * weight, "tanh")
    b = 0.01 + torch.rand(32, 60, generator=generator)
    steps = []
    for dtype in (torch.float64, None):
        layer.solver = make(tol=2e-5, proof_dtype=dtype)
        solution = layer.solve(b)
        assert solution.converged.all()
        assert solution.certified == (dtype is not None)
        steps.append(float(solution.steps.double().mean()))
    assert steps[1] <= steps[0] + 2


@pytest.mark.parametrize("make", [Auto, Anderson, Broyden, Newton, Picard])
def test_every_sample_gets_an_enclosure_where_f_grows_from_small_values(make) -> None:
    """From b to values a million times as large Picard's residual grows with its iterates, and no method may stand in its way."""
    weight = torch.rand(12, 12) * (torch.rand(12, 12) < 0.3)
    weight *= 3 / torch.linalg.eigvals(weight).abs().max()
    b = 10 ** (-6 * torch.rand(10, 12))
    for steps in ((Inject(), nn.Tanh()), (nn.Tanh(), Inject())):
        layer = Equilibrium(nn.Sequential(nn.Linear(12, 12, bias=False), *steps), solver=make(max_steps=120))
        with torch.no_grad():
            layer.cell[0].weight.copy_(weight)
        solution = layer.solve(b)
        assert solution.certified
        assert solution.converged.all()
