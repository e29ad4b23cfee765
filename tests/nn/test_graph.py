import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from perron import certify
from perron.activations import Activation
from perron.cells import Refusal
from perron.gradients import JacobianFree
from perron.nn import GraphEquilibrium
from perron.nn.graph import normalized_adjacency
from perron.solvers import Auto, Picard
from problems import below_one, fractions

PATH = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
VARIANTS = [
    {"activation": "tanh"},
    {"activation": "tanh", "injection": "outside"},
    {"activation": "softsign", "alpha": 0.3},
    {"activation": "sigmoid"},
    {"activation": "tanh+1.2", "injection": "outside", "normalize": float("inf")},
    {"activation": "tanh+1.2", "normalize": 2.0},
]


def dense_adjacency(edge_index: Tensor, weight: Tensor | None, nodes: int) -> Tensor:
    """Written down again, with a dense matrix."""
    a = torch.eye(nodes, dtype=torch.float64)
    for k in range(edge_index.shape[1]):
        a[edge_index[1, k], edge_index[0, k]] += 1.0 if weight is None else float(weight[k])
    scale = a.sum(1).rsqrt()
    return scale[:, None] * a * scale


def reference(layer: GraphEquilibrium, x: Tensor, a: Tensor) -> Tensor:
    b = layer.alpha * layer.positive(x.double())
    z = torch.zeros_like(b)
    for _ in range(2000):
        v = (1 - layer.alpha) * a @ z
        z = layer.activation(v + b) if layer.place == "inside" else layer.activation(v) + b
        if layer.normalize is not None:
            z = z / torch.linalg.vector_norm(z, layer.normalize.p, dim=1, keepdim=True)
    return z


@given(st.integers(0, 10_000), st.booleans())
def test_the_adjacency_is_the_dense_one(seed: int, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    nodes = 1 + seed % 9
    edges = torch.randint(0, nodes, (2, seed % 30), generator=generator)
    weight = torch.rand(edges.shape[1], generator=generator) if weighted else None
    pattern, values = normalized_adjacency(edges, weight, nodes, dtype=torch.float64)
    torch.testing.assert_close(pattern.matrix(values).to_dense(), dense_adjacency(edges, weight, nodes))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_values_enclosures_and_certificates(options) -> None:
    torch.manual_seed(0)
    edges = torch.randint(0, 30, (2, 80))
    weight = torch.rand(80)
    x = torch.randn(30, 4)
    layer = GraphEquilibrium(**options)
    certificate = layer.certificate()
    assert certificate.kind == ("subhomogeneous" if "normalize" in options else "positive concave")
    solution = layer.solve(x, edges, weight)
    assert solution.certified
    assert solution.converged.all()
    exact = reference(layer, x, dense_adjacency(edges, weight, 30))
    torch.testing.assert_close(layer(x, edges, weight).double(), exact, rtol=1e-3, atol=1e-5)
    state = exact.t() if layer.normalize is None else exact.t().unsqueeze(0)
    assert (solution.lower.double() <= state * (1 + 1e-6)).all()
    assert (state * (1 - 1e-6) <= solution.upper.double()).all()
    assert layer.certificate().kind == certificate.kind
    assert certify(torch.nn.ModuleList([layer]))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_gradients(options) -> None:
    torch.manual_seed(0)
    layer = GraphEquilibrium(**options, solver=Auto(tol=1e-12, max_steps=2000))
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: layer(t, PATH), (x,), eps=1e-6, atol=1e-7)


def test_far_nodes_hear_of_each_other() -> None:
    """A path of 60 nodes: the value at one end depends on the other one; no number of layers is to be chosen."""
    nodes = 60
    chain = torch.stack([torch.arange(nodes - 1), torch.arange(1, nodes)])
    edges = torch.cat([chain, chain.flip(0)], 1)
    layer = GraphEquilibrium("tanh", alpha=0.01, solver=Auto(tol=1e-10, max_steps=5000))
    x = torch.full((nodes, 1), -1.0, dtype=torch.float64).requires_grad_()
    layer(x, edges)[-1, 0].backward()
    assert float(x.grad[0, 0]) > 0


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_gradients_of_edge_weights(options) -> None:
    torch.manual_seed(0)
    layer = GraphEquilibrium(**options, solver=Auto(tol=1e-12, max_steps=2000, on_failure="ignore"))
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    edges = torch.cat([PATH, PATH[:, :1]], 1)
    weight = (0.5 + torch.rand(5, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda t, w: layer(t, edges, w), (x, weight), eps=1e-6, atol=1e-7)
    assert torch.autograd.gradgradcheck(lambda t, w: layer(t, edges, w), (x, weight), fast_mode=True)
    layer.gradient = JacobianFree()
    (found,) = torch.autograd.grad(layer(x, edges, weight).sum(), weight)
    assert (found != 0).all()


def test_the_pattern_is_remembered_and_every_change_is_noticed() -> None:
    layer = GraphEquilibrium("tanh")
    x, edges, weight = torch.randn(3, 2), PATH.clone(), torch.ones(4)
    first = layer(x, edges, weight)
    pattern, _ = layer._adjacency.last
    layer(x, edges, weight)
    assert layer._adjacency.last[0] is pattern
    torch.testing.assert_close(layer(x, edges.clone()), first)
    assert layer._adjacency.last[0] is pattern
    half = torch.full((4,), 0.5)
    layer(x, edges, half)
    value = layer(x, edges, half.clone().requires_grad_())
    torch.testing.assert_close(value, layer(x, edges, half))
    assert value.requires_grad
    for write in (
        lambda: weight.__setitem__(0, 5.0),
        lambda: weight.data.__setitem__(1, 3.0),
        lambda: weight.numpy().__setitem__(2, 7.0),
        lambda: edges.__setitem__((1, 0), 2),
        lambda: edges.data.__setitem__((0, 1), 0),
        lambda: edges.numpy().__setitem__((0, 2), 0),
    ):
        before = layer(x, edges, weight)
        write()
        after = layer(x, edges, weight)
        assert not torch.equal(after, before)
        exact = reference(layer, x, dense_adjacency(edges, weight, 3))
        torch.testing.assert_close(after.double(), exact, rtol=1e-3, atol=1e-5)
    copied = copy.deepcopy(layer)
    assert copied._adjacency.last is None
    torch.testing.assert_close(copied(x, edges), layer(x, edges))


def test_edges_made_in_inference_mode() -> None:
    layer = GraphEquilibrium("tanh")
    with torch.inference_mode():
        edges, weight = PATH.clone(), torch.ones(4)
        expected = layer(torch.ones(3, 2), edges, weight)
    x = torch.ones(3, 2, requires_grad=True)
    value = layer(x, edges, weight)
    torch.testing.assert_close(value.detach(), expected.clone())
    value.sum().backward()
    assert (x.grad != 0).all()
    assert layer.certificate()


def test_a_million_edges_without_a_dense_matrix() -> None:
    torch.manual_seed(0)
    nodes = 100_000
    edges = torch.randint(0, nodes, (2, 1_000_000))
    layer = GraphEquilibrium("tanh", solver=Picard(tol=1e-3))
    # A dense matrix would be 40 GB.
    assert layer.solve(torch.randn(nodes, 2), edges).certified


def test_hard_inputs() -> None:
    layer = GraphEquilibrium("tanh", solver=Auto(on_failure="ignore"))
    none = torch.zeros(2, 0, dtype=torch.long)
    assert layer(torch.randn(3, 2), none).shape == (3, 2)
    assert layer(torch.randn(3, 0), PATH).shape == (3, 0)
    x = torch.randn(3, 2)
    x[1, 0] = float("nan")
    solution = layer.solve(x, PATH)
    assert solution.proven.tolist() == [False, True]
    assert layer(torch.randn(3, 2, dtype=torch.float16), PATH).dtype == torch.float16
    tiny = GraphEquilibrium("tanh", alpha=1e-30, solver=Auto(max_steps=2000, on_failure="ignore"))
    tiny.solve(torch.full((3, 2), -1e3), PATH)
    b, _ = tiny._problem(torch.full((3, 2), -1e3), PATH, None)
    assert (b > 0).all()
    for arguments, word in (
        ((torch.randn(3), PATH), "nodes, channels"),
        ((torch.randn(2, 2), PATH), "nodes 0 to 2"),
        ((torch.randn(3, 2), PATH.float()), "integer"),
        ((torch.randn(3, 2), PATH, torch.tensor([1.0, 1, 1, -1])), "nonnegative"),
        ((torch.randn(3, 2), PATH, torch.ones(3)), "edge_weight"),
    ):
        with pytest.raises(ValueError, match=word):
            layer(*arguments)
    with pytest.raises(TypeError, match="floating"):
        layer(torch.ones(3, 2, dtype=torch.long), PATH)
    for options in ({"alpha": 0.0}, {"alpha": 1.5}, {"injection": "before"}):
        with pytest.raises(ValueError, match="must be"):
            GraphEquilibrium("tanh", **options)


def test_certificates_are_about_the_matrix_that_is_multiplied_with() -> None:
    """1 - alpha and the adjacency are rounded to float32: with alpha = 2e-8 the radius of that matrix is above 1."""
    for alpha in (2e-8, 5e-8):
        layer = GraphEquilibrium("relu", alpha=alpha, solver=Picard(max_steps=3, on_failure="ignore"))
        assert not layer.certificate(), "no graph is known yet"
        refused = 0
        for seed in range(20):
            torch.manual_seed(seed)
            nodes = 2 + seed % 5
            edges = (torch.rand(nodes, nodes) < 0.5).nonzero().t()
            layer.solve(torch.rand(nodes, 1), edges)
            _, chain = layer._problem(torch.rand(nodes, 1), edges, None)
            refused += not below_one(fractions(chain.steps[0].linear(torch.eye(nodes)).t()))
            if layer.certificate():
                assert below_one(fractions(chain.steps[0].linear(torch.eye(nodes)).t()))
        assert refused > 3 or alpha > 2e-8
    layer = GraphEquilibrium("relu", alpha=1e-6)
    assert layer.certificate()
    layer.solve(torch.rand(3, 2), PATH)
    assert layer.certificate()


def test_assigned_alphas_and_activations_of_somebody_are_refused() -> None:
    layer = GraphEquilibrium("tanh+1.2")
    layer.alpha = -1.0
    with pytest.raises(Refusal, match="alpha"):
        layer.solve(torch.rand(3, 2), PATH)
    lie = Activation(
        name="tanh",
        function=lambda v: 10 * v,
        derivative=torch.ones_like,
        at_zero=0.0,
        supremum=1.0,
        asymptotic_slope=0.0,
        slope_at_zero=1.0,
    )
    with pytest.raises(Refusal, match="facts"):
        GraphEquilibrium(lie)


def test_degrees_that_overflow_are_refused() -> None:
    weight = torch.tensor([1.0, 1.5e308, 1.0, 1.5e308], dtype=torch.float64)
    edges = torch.tensor([[0, 0, 1, 2], [1, 1, 2, 1]])
    with pytest.raises(ValueError, match="add up to more"):
        GraphEquilibrium("tanh").solve(torch.ones(3, 1, dtype=torch.float64), edges, weight)


@pytest.mark.parametrize("normalize", [None, 2.0])
def test_a_first_guess_has_the_shape_of_x(normalize: float | None) -> None:
    layer = GraphEquilibrium("tanh+1.2", normalize=normalize)
    x, path = torch.randn(3, 5), torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    guess = torch.ones(3, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x, path, z0=guess), layer(x, path), rtol=2e-4, atol=0)
    for call in (layer, layer.solve):
        for wrong, got in ((1.0, "1.0"), (torch.ones(5, 3), r"\(5, 3\)"), (torch.ones(3, 5, 1), r"\(3, 5, 1\)")):
            with pytest.raises(ValueError, match=rf"z0 must have the shape of x, \(3, 5\), got {got}"):
                call(x, path, z0=wrong)
