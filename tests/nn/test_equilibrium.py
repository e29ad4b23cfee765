"""Cells that nobody has read: one system, starts, gradients of all they depend on, and what is said of their failures."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from perron.cells import as_map
from perron.gradients import Implicit, JacobianFree, Phantom
from perron.nn import Equilibrium, Inject, PositiveConcaveLinear, UnconstrainedLinear
from perron.solvers import (
    Anderson,
    Auto,
    Broyden,
    ConvergenceError,
    ConvergenceWarning,
    FixedPointProblem,
    Newton,
    Picard,
)
from problems import dense_layer

SOLVERS = [Auto(), Picard(), Anderson(), Broyden(), Newton()]


def residuals(cell: nn.Module, z: Tensor, x: Tensor) -> Tensor:
    """(batch,) |f(z) - z| / |f(z)| in the largest entry, of the whole batch together."""
    with torch.no_grad():
        y = cell(z, x)
    return (y - z).abs().flatten(1).amax(1) / y.abs().flatten(1).amax(1)


class Normalised(nn.Module):
    """Batch statistics inside the cell."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.BatchNorm1d(width)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.linear(z)) + x)


class Mean(nn.Module):
    """tanh(W z + V mean(z) + x)."""

    def __init__(self, width: int = 8, scale: float = 1.3) -> None:
        super().__init__()
        self.w, self.v = (nn.Parameter(scale * torch.randn(width, width) / width**0.5) for _ in range(2))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ self.w.t() + z.mean(0) @ self.v.t() + x)


class Attention(nn.Module):
    """Attention over the batch."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        weights = torch.softmax(3 * self.q(z) @ self.k(z).t(), 1)
        return torch.tanh(3 * weights @ self.v(z) + x)


class Nodes(nn.Module):
    """A z with the nodes of a graph in dimension 0."""

    def __init__(self, nodes: int = 12) -> None:
        super().__init__()
        a = torch.rand(nodes, nodes)
        self.register_buffer("a", 0.97 * a / a.sum(1, keepdim=True))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.a @ z + x)


class Context(nn.Module):
    """Looks up what belongs to a sample by its place in the batch."""

    def __init__(self, rows: int = 12, width: int = 8) -> None:
        super().__init__()
        self.context = nn.Parameter(torch.randn(rows, width))
        self.rate = nn.Parameter(torch.linspace(0.1, 0.95, rows).view(-1, 1))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.rate[: len(z)] * torch.tanh(z) + self.context[: len(z)] + x


COUPLED = [Normalised, Mean, Attention, Nodes, Context]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("make", COUPLED)
def test_the_residual_reported_is_that_of_the_returned_batch(make, solver) -> None:
    for seed in range(2):
        torch.manual_seed(seed)
        cell = make()
        layer = Equilibrium(cell, solver=solver, injection="free")
        x = torch.randn(12, 8) * torch.logspace(-1, 1, 12).view(-1, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            solution = layer.solve(x)
        true = residuals(copy.deepcopy(cell), solution.value, x).max()
        torch.testing.assert_close(solution.residual, true.expand(12), rtol=1e-2, atol=1e-6)
        assert solution.converged.all() == (true <= 1e-4), "one system: all or nobody"
        assert len(solution.steps.unique()) == 1


@pytest.mark.parametrize("solver", [Auto(), Picard()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("make", [Mean, Attention])
def test_twenty_coupled_systems_are_never_called_converged_when_they_are_not(make, solver) -> None:
    converged = 0
    for seed in range(20):
        torch.manual_seed(seed)
        cell, x = make(), torch.randn(16, 8)
        layer = Equilibrium(cell, solver=solver, injection="free")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            value = layer(x)
        if layer.last_solution.converged.any():
            converged += 1
            assert residuals(cell, value, x).max() <= 1.01e-4
    assert converged


def test_a_small_sample_is_not_hidden_by_a_large_one() -> None:
    """z = r z + x: the rate of the small sample is the slow one."""

    def cell(z: Tensor, x: Tensor) -> Tensor:
        return torch.tensor([[0.1], [0.9]]) * z + x + 0 * z.mean()

    x = torch.tensor([[1e6, 2e6], [1e-3, 2e-3]])
    for solver in SOLVERS:
        solution = Equilibrium(cell, injection="free", solver=solver).solve(x)
        assert solution.converged.all()
        exact = x / torch.tensor([[0.9], [0.1]])
        torch.testing.assert_close(solution.value, exact, rtol=2e-3, atol=0)


def test_a_solver_called_by_itself_takes_an_unread_cell_as_one_system_too() -> None:
    cell, x = Nodes(), torch.randn(12, 8)
    solution = Auto().solve(FixedPointProblem(map=as_map(cell)[0], injection=x))
    assert solution.value.shape == x.shape
    assert solution.converged.shape == (12,)
    assert residuals(cell, solution.value, x).max() <= 1e-4
    fixed = Auto(steps=9, on_failure="ignore").solve(FixedPointProblem(map=as_map(cell)[0], injection=x))
    assert (fixed.steps == 9).all()
    torch.testing.assert_close(fixed.residual, residuals(cell, fixed.value, x).max().expand(12))


@pytest.mark.parametrize("make", COUPLED)
def test_gradients_of_coupled_samples(make) -> None:
    torch.manual_seed(0)
    cell = make() if make in (Nodes, Context, Normalised) else make(width=8)
    with torch.no_grad():
        for p in cell.parameters():
            p.mul_(0.3)
    layer = Equilibrium(cell, injection="free", solver=Auto(tol=1e-12, max_steps=2000)).double()
    x = torch.randn(12, 8, dtype=torch.float64, requires_grad=True)
    parameters = dict(layer.named_parameters())

    def function(x: Tensor, *p: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(parameters, p, strict=True)), (x,))[:, :2]

    assert torch.autograd.gradcheck(function, (x, *parameters.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, *parameters.values()), fast_mode=True)
    layer(x).sum().backward()
    adjoint = layer.last_solution.adjoint
    assert adjoint.converged.shape == (12,)


def test_vmap_solves_as_many_systems() -> None:
    torch.manual_seed(0)
    layer = Equilibrium(Mean(scale=0.4), injection="free", solver=Auto(tol=1e-7))
    x = torch.randn(3, 5, 8)
    found = torch.func.vmap(layer)(x)
    assert layer.last_solution.value.shape == (15, 8)
    torch.testing.assert_close(found, torch.stack([layer(v) for v in x]), rtol=1e-4, atol=1e-5)
    loss = torch.func.vmap(torch.func.grad(lambda v: layer(v).square().sum()))(x)
    for k in range(3):
        v = x[k].clone().requires_grad_()
        (one,) = torch.autograd.grad(layer(v).square().sum(), v)
        torch.testing.assert_close(loss[k], one, rtol=1e-3, atol=1e-4)


def test_a_compiled_network_with_an_unread_cell() -> None:
    torch._dynamo.reset()
    layer = Equilibrium(Mean(scale=0.3), injection="free")
    net = nn.Sequential(nn.Linear(4, 8), layer)
    x = torch.randn(3, 4)
    gradients = []
    for model in (net, torch.compile(net, backend="eager")):
        net.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------------------------- declared independent


def test_samples_that_are_declared_independent_may_leave() -> None:
    def cell(z: Tensor, x: Tensor) -> Tensor:
        return x * torch.sin(z) + 1

    x = torch.linspace(-0.01, -0.99, 16).view(-1, 1).expand(16, 3)
    alone = Equilibrium(cell, injection="free", independent=True, solver=Picard()).solve(x)
    together = Equilibrium(cell, injection="free", solver=Picard()).solve(x)
    assert len(alone.steps.unique()) > 1
    assert len(together.steps.unique()) == 1
    torch.testing.assert_close(alone.value, together.value, rtol=1e-2, atol=0)


@pytest.mark.parametrize("make", COUPLED)
def test_a_false_declaration_of_independence_is_refused(make) -> None:
    layer = Equilibrium(make(), injection="free", independent=True)
    for call in (layer, layer.solve):
        with pytest.raises(ValueError, match=r"independent=True.*sample"):
            call(torch.randn(12, 8))


def test_independence_is_compared_once_and_again_in_another_mode() -> None:
    cell = Normalised()
    layer = Equilibrium(cell, injection="free", independent=True, solver=Auto(on_failure="ignore")).eval()
    x = torch.randn(6, 8)
    layer(x)
    cell.train()
    with pytest.raises(ValueError, match="independent=True"):
        layer(x)

    class Counted(nn.Module):
        evaluations = 0

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            type(self).evaluations += 1
            return 0.5 * z.sin() + x

    layer = Equilibrium(Counted(), injection="free", independent=True)
    with torch.no_grad():
        first = (layer(x), Counted.evaluations)[1]
        layer(x)
    assert Counted.evaluations - first == first - 6
    random = Equilibrium(lambda z, x: 0.5 * F.dropout(z, 0.5) + x, injection="free", independent=True)
    with pytest.raises(ValueError, match="two values"):
        random(x)


# ------------------------------------------------------------------------------------------------------------ gradients


def test_tensors_kept_on_the_cell_have_their_gradient() -> None:
    class Inner(nn.Module):
        scale: Tensor

        def forward(self, z: Tensor) -> Tensor:
            return torch.sin(z) * self.scale

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()
            self.register_buffer("shift", torch.zeros(3, dtype=torch.float64))
            self.unused = torch.ones(2, requires_grad=True) * 2
            self.last: Tensor | None = None

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            self.last = self.inner(z)
            return self.last + self.shift + x

    cell = Cell()
    layer = Equilibrium(cell, injection="free", solver=Auto(tol=1e-12))
    x, c, d = (torch.rand(n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 1, 1))

    def function(x: Tensor, c: Tensor, d: Tensor) -> Tensor:
        cell.inner.scale, cell.shift = 0.5 * c, d[0] * 2
        return layer(x)

    for _ in range(2):
        assert torch.autograd.gradcheck(function, (x, c, d))
        assert torch.autograd.gradgradcheck(function, (x, c, d), fast_mode=True)
    with torch.no_grad():
        function(x, c, d)


@pytest.mark.parametrize("where", ["closure", "list", "hidden module", "alias"])
def test_a_gradient_that_would_be_lost_is_refused(where: str) -> None:
    w = (0.1 * torch.eye(3)).requires_grad_()

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kept = [2 * w]
            self.hidden = [nn.Linear(3, 3)]
            self.p = nn.Parameter(w.detach())
            self.aliases = {"p": self.p}

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            if where == "closure":
                return z @ w + x
            if where == "list":
                return z @ self.kept[0] + x
            if where == "hidden module":
                return 0.1 * self.hidden[0](z) + x
            return z @ self.aliases["p"] + x

    layer = Equilibrium(Cell(), injection="free")
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="gradient would be lost"):
        layer(x)
    layer.solve(x)
    with torch.no_grad():
        layer(x)
    layer.gradient = Phantom(steps=3, damping=1.0)
    layer(x).sum().backward()
    if where == "closure":
        assert w.grad is not None


class Energy(nn.Module):
    """Gradient descent on an energy that the cell differentiates itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(0.5 * torch.randn(3, 3, dtype=torch.float64))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        with torch.enable_grad():
            z = z if z.requires_grad else z.detach().requires_grad_()
            energy = (z @ self.a).tanh().square().sum() + (z - x).square().sum()
            (slope,) = torch.autograd.grad(energy, z, create_graph=True)
            return z - 0.2 * slope


def test_a_cell_that_differentiates_an_energy_inside() -> None:
    torch.manual_seed(0)
    layer = Equilibrium(Energy(), injection="free", solver=Auto(tol=1e-12, max_steps=2000))
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, a: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"cell.a": a}, (x,))

    a = layer.cell.a
    assert torch.autograd.gradcheck(function, (x, a), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, a), fast_mode=True)
    assert not layer.last_solution.value.requires_grad


# ---------------------------------------------------------------------------------------------- the report of an adjoint


def test_an_adjoint_is_reported_with_its_own_solve() -> None:
    layer = PositiveConcaveLinear(4, 5)
    x = torch.randn(4, 4, requires_grad=True)
    first = layer(x).sum()
    layer(x[:2])
    first.backward()
    assert layer.last_solution.value.shape == (2, 5)
    assert layer.last_solution.adjoint is None
    exact = layer(x).sum()
    layer.gradient = JacobianFree()
    layer(x)
    exact.backward()
    assert layer.last_solution.adjoint is None
    layer.gradient = Implicit()
    value = layer(x).sum()
    value.backward(retain_graph=True)
    once = layer.last_solution.adjoint
    assert once.certified
    value.backward()
    assert layer.last_solution.adjoint is not once
    assert len(layer.last_solution.adjoint.steps) == 4
    other = layer(x).sum()
    layer.solve(x)
    other.backward()
    assert layer.last_solution.adjoint is None


@pytest.mark.parametrize(("independent", "unit"), [(False, "1 of 1 batches"), (True, "4 of 4 samples")])
def test_an_adjoint_that_fails_names_what_was_solved(independent: bool, unit: str) -> None:
    few = Auto(tol=1e-7, max_steps=5)
    layer = Equilibrium(
        lambda z, x: 0.9 * z.roll(1, 1).sin() + x, injection="free", solver=few, independent=independent
    )
    with pytest.warns(ConvergenceWarning, match=f"Auto: {unit} did not reach"):
        value = layer(torch.randn(4, 8).requires_grad_())
    with pytest.warns(ConvergenceWarning, match=f"adjoint: {unit} did not reach"):
        value.sum().backward()


def test_adjoints_of_shared_layers_of_double_backward_and_of_checkpoints() -> None:
    layer = PositiveConcaveLinear(5, 5)
    x = torch.randn(4, 5, requires_grad=True)
    layer(layer(x)[:3]).sum().backward()
    assert len(layer.last_solution.value) == len(layer.last_solution.adjoint.steps) == 3
    (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    slope.square().sum().backward()
    assert len(layer.last_solution.adjoint.steps) == 4
    for reentrant in (True, False):
        checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
        adjoint = layer.last_solution.adjoint
        assert adjoint is None or len(adjoint.steps) == 4


@pytest.mark.parametrize(
    "make", [lambda: PositiveConcaveLinear(3, 4), lambda: Equilibrium(Mean(4, 0.4), injection="free")]
)
def test_under_vmap_the_solution_is_that_of_the_whole_batch_and_so_is_its_adjoint(make) -> None:
    layer = make()
    x = torch.randn(2, 3, layer.in_features if hasattr(layer, "in_features") else 4)
    p = {k: torch.stack([v, 0.9 * v]).detach() for k, v in layer.named_parameters()}
    call = lambda p, x: torch.func.functional_call(layer, p, (x,))
    torch.func.vmap(call)(p, x)
    assert layer.last_solution.value.shape == (6, 4)
    assert layer.last_solution.steps.shape == (6,)
    torch.func.vmap(torch.func.grad(lambda p, x: call(p, x).sum()))(p, x)
    adjoint = layer.last_solution.adjoint
    assert adjoint is None or adjoint.steps.shape == (6,)
    torch.func.vmap(torch.func.grad(lambda x: layer(x).sum()))(x)
    assert layer.last_solution.adjoint.steps.shape == layer.last_solution.steps.shape == (6,)
    torch.func.jacrev(lambda x: layer(x).sum(0))(x[0])
    assert layer.last_solution.adjoint is None


# ------------------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_cell_without_parameters_has_the_precision_of_its_input(dtype: torch.dtype) -> None:
    solved = set()

    def cell(z: Tensor, x: Tensor) -> Tensor:
        solved.add(z.dtype)
        return 0.5 * z.cos() + x

    x = torch.randn(3, 2).to(dtype)
    for layer in (
        Equilibrium(cell, injection="free"),
        Equilibrium(nn.Sequential(nn.Tanh(), Inject()), injection="free"),
    ):
        assert layer(x).dtype == dtype
    assert solved == {torch.float64 if dtype == torch.float64 else torch.float32}


def test_buffers_count_for_the_precision() -> None:
    x = torch.randn(12, 8)
    layer = Equilibrium(Nodes(), injection="free")
    with pytest.raises(TypeError, match=r"layer\.to\(torch.float64\)"):
        layer(x.double())
    assert layer.to(torch.float64)(x.double()).dtype == torch.float64
    assert layer(x).dtype == torch.float64
    assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    layer = Equilibrium(Normalised(), injection="free", solver=Auto(on_failure="ignore")).to(torch.bfloat16)
    layer(x.bfloat16()).float().sum().backward()
    assert int(layer.cell.norm.num_batches_tracked) == 1
    assert layer.cell.linear.weight.grad.dtype == torch.bfloat16


# --------------------------------------------------------------------------------------------------------------- starts


class Sinkhorn(nn.Module):
    """u = a / (K (b / (K^T u))), whose fixed point from zero is zero."""

    def forward(self, u: Tensor, k: Tensor) -> Tensor:
        kernel = torch.exp(-torch.arange(9.0).view(3, 3).to(u) / 4)
        return (1 / 3) / ((1 / 3) / (u @ kernel) @ kernel.t()) + 0 * k


def test_a_trivial_fixed_point_at_the_start_is_not_called_converged() -> None:
    x = torch.zeros(2, 3)
    layer = Equilibrium(Sinkhorn(), injection="free")
    with pytest.warns(ConvergenceWarning, match="trivial.*z0="):
        assert not layer.solve(x).converged.any()
    with pytest.raises(ConvergenceError, match="z0="):
        Equilibrium(Sinkhorn(), injection="free", solver=Auto(on_failure="raise"))(x)
    for independent in (False, True):
        layer = Equilibrium(Sinkhorn(), injection="free", z0=1.0, independent=independent)
        solution = layer.solve(x)
        assert solution.converged.all()
        assert (solution.value > 0.1).all()
        x.requires_grad_()
        layer(x).sum().backward()
        assert x.grad.isfinite().all()
        x = x.detach()
    # Fixed points at the start that are no traps.
    for function, z0 in (
        (lambda z, x: torch.tanh(z @ (0.3 * torch.ones(3, 3)) + x), None),
        (lambda z, x: F.relu(2 * z + x - 1), None),
        (lambda z, x: 0 * z + 1, 1.0),
    ):
        assert Equilibrium(function, injection="free", z0=z0).solve(x).converged.all()


def test_a_start_outside_of_the_domain_is_named() -> None:
    layer = Equilibrium(lambda z, x: 0.5 * z.log() + 2 + x, injection="free")
    with pytest.warns(ConvergenceWarning, match="not finite where the solve starts.*z0="):
        layer.solve(torch.zeros(2, 3))
    assert Equilibrium(layer.cell, injection="free", z0=1.0).solve(torch.zeros(2, 3)).converged.all()


def test_inputs_that_are_not_finite_are_named() -> None:
    x = torch.zeros(2, 3)
    x[1, 1] = torch.nan
    with pytest.warns(ConvergenceWarning, match="injections are not finite"):
        assert not Equilibrium(Mean(3), injection="free").solve(x).converged.any()


def test_starts() -> None:
    seen: list[Tensor] = []

    def cell(z: Tensor, x: Tensor) -> Tensor:
        seen.append(z.clone())
        return z - 0.1 * (z**3 - z) + 0 * x

    x = torch.zeros(2, 3)
    for z0, sign in (
        (0.5, 1),
        (-0.5, -1),
        (torch.tensor([0.5, -0.5, 0.5]), torch.tensor([1.0, -1, 1])),
        (lambda b: b - 1, -1),
    ):
        layer = Equilibrium(cell, injection="free", z0=z0)
        torch.testing.assert_close(layer(x), torch.ones(2, 3) * sign, rtol=1e-2, atol=0)
        seen.clear()
        layer(x, z0=torch.full((2, 3), 0.5))
        assert (seen[-1] > 0).all(), "what the call says wins"
    assert "z0" not in layer.state_dict()
    layer = Equilibrium(Mean(3), injection="free", z0=torch.ones(3))
    assert layer.double().z0.dtype == torch.float64
    assert pickle.loads(pickle.dumps(Equilibrium(Mean(3), z0=1.0))).z0 == 1.0
    for wrong in (float("nan"), torch.tensor([1.0, torch.inf]), torch.ones(3, dtype=torch.long), "zero"):
        with pytest.raises(ValueError, match="z0 must be"):
            Equilibrium(cell, z0=wrong)
    for wrong in (torch.ones(4), torch.ones(2, 3), lambda b: b[:1], lambda b: 1.0):
        with pytest.raises(ValueError, match=r"z0.*(broadcast|must return)"):
            Equilibrium(cell, injection="free", z0=wrong)(x)


# ------------------------------------------------------------------------------------------------------------- messages


def test_what_cannot_be_a_cell_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"Sequential without Inject\(\)"):
        Equilibrium(nn.Sequential(nn.Linear(3, 3), nn.Tanh()))
    for wrong in (nn.Linear(3, 3), nn.Tanh, lambda z: z, 3, None, "tanh"):
        with pytest.raises(TypeError, match="the cell"):
            Equilibrium(wrong)
    with pytest.raises(TypeError, match="returned a tuple"):
        Equilibrium(lambda z, x: (z, x), injection="free")(torch.ones(2, 3))
    with pytest.raises(RuntimeError, match="inside the cell"):
        Inject()(torch.ones(2, 3))


def test_hooks_of_an_unread_sequential_run_and_nested_ones_inject() -> None:
    inner = nn.Sequential(nn.Linear(3, 3), Inject())
    inner.register_forward_hook(lambda module, arguments, output: 0.5 * torch.sin(output))

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return self.inner(z)

    x = torch.randn(2, 3)
    for cell in (inner, nn.Sequential(inner), Own()):
        z = Equilibrium(cell, injection="free", solver=Auto(tol=1e-6))(x)
        torch.testing.assert_close(z, 0.5 * torch.sin(inner[0](z) + x), rtol=1e-5, atol=1e-6)


def test_a_function_is_a_cell() -> None:
    layer = Equilibrium(lambda z, x: 0.5 * z.tanh() + x, injection="free")
    z = layer(torch.ones(2, 3, requires_grad=True))
    z.sum().backward()
    torch.testing.assert_close(z, 0.5 * z.tanh() + 1, rtol=1e-3, atol=0)
    assert layer.certificate().refusal == (
        "the module is a Function, which is not known to be nonnegative, nondecreasing and concave"
    )


@pytest.mark.parametrize(
    "layer", [UnconstrainedLinear(3, 3), Equilibrium(Mean(3), injection="free")], ids=["read", "unread"]
)
def test_what_is_no_input_is_named(layer: Equilibrium) -> None:
    x = torch.ones(2, 3)
    for call in (layer, layer.solve):
        with pytest.raises(TypeError, match=r"one tensor.*tuple"):
            call((x, x))
        with pytest.raises(TypeError, match=r"int64; use x\.float"):
            call(x.long())
        with pytest.raises(TypeError, match="view_as_real"):
            call(x + 1j)
        with pytest.raises(TypeError, match=r"ndarray; use torch\.as_tensor"):
            call(x.numpy())
        for guess in (torch.ones(3), 1.0):
            with pytest.raises(ValueError, match=r"z0 must have the shape of the injection, \(2, 3\)"):
                call(x, z0=guess)


@pytest.mark.parametrize("solver", ["anderson", Anderson, 1e-3])
def test_what_is_no_solver_is_named(solver: object) -> None:
    for layer in (lambda **k: Equilibrium(Mean(3), **k), lambda **k: UnconstrainedLinear(3, 3, **k)):
        with pytest.raises(TypeError, match=r"such as Auto\(tol=1e-6\), got"):
            layer(solver=solver)


def test_dropout_in_an_unread_cell_is_named() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.dropout = nn.Linear(8, 8), nn.Dropout(0.5)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return 0.5 * torch.tanh(self.dropout(self.linear(z))) + x

    layer = Equilibrium(Cell(), injection="free")
    with pytest.warns(ConvergenceWarning, match="two values at one point.*dropout"):
        assert not layer.solve(torch.randn(4, 8)).converged.any()
    assert layer.eval().solve(torch.randn(4, 8)).converged.all()


def test_an_injection_that_is_assigned_is_checked() -> None:
    # tanh(3 z - 1) has three fixed points.
    layer = dense_layer(torch.full((1, 1), 3.0), "tanh")
    with pytest.raises(ValueError, match="injection must be"):
        layer.injection = "none"
    layer.injection = "free"
    assert not copy.deepcopy(layer).solve(torch.tensor([[-1.0]])).certified
