import math

import pytest
import torch
from torch import Tensor

from perron.infinite_width import (
    ScalarFunction,
    deep_classify,
    deep_ntk,
    depth_limit,
    explicit_ntk,
    gaussian_moments,
    optimal_activation,
    scalar_function,
    transformed,
)
from perron.infinite_width.depth import _UnitDual


def sphere(n: int, p: int, seed: int) -> Tensor:
    x = torch.randn(n, p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(x)


X, NEW = sphere(200, 5, 0), sphere(100, 5, 1)
Y = (X[:, 0] * X[:, 1] > -0.1).long()


def test_classes_of_activations() -> None:
    """Against the moments of ReLU and |x| by hand."""
    relu = depth_limit("relu")
    assert relu.kind == "majority vote"
    assert relu.mean == pytest.approx(1 / math.sqrt(math.pi), rel=1e-12)
    assert relu.energy == pytest.approx(1, rel=1e-12)
    centred = depth_limit("relu", centred=True)
    square = 0.5 - 0.5 / math.pi
    assert centred.slope**2 == pytest.approx(0.25 / square, rel=1e-12)
    assert centred.exponent == pytest.approx(-2 * math.log(0.25 / square) / math.log(0.5 / square), rel=1e-12)
    for name in ("tanh", "erf", "hard_tanh"):
        assert depth_limit(name).kind == "singular kernel"
    for name in ("sigmoid", "swish", "gelu", "softplus", "abs"):
        assert depth_limit(name).kind == "majority vote"
    assert depth_limit("abs", centred=True).kind == "nearest neighbour"
    cosine = ScalarFunction(name="cos", value=torch.cos, slope=lambda x: -torch.sin(x))
    assert depth_limit(cosine, centred=True).kind == "nearest neighbour"


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("name", ["relu", "tanh", "hard_tanh"])
def test_kernel_is_that_of_explicit_networks(name: str, depth: int) -> None:
    """`explicit_ntk` with centred activations of scale one."""
    x = sphere(20, 6, 2)
    rho = x @ x.t()
    rho.fill_diagonal_(1)
    phi = scalar_function(name)
    scale = float(gaussian_moments(phi, torch.ones((), dtype=torch.float64)).second) ** -0.5
    wanted = explicit_ntk(x, [transformed(phi, scale, 1.0, 0.0)] * depth)
    assert torch.allclose(deep_ntk(rho, name, depth, centred=True), wanted, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("phi", "centred"),
    [("tanh", False), ("relu", True), ("hard_tanh", False), (optimal_activation(3), False), ("gelu", True)],
)
def test_weights_solve_their_equation(phi: str | ScalarFunction, centred: bool) -> None:
    """psi(d(rho)) = A'^2 psi(rho), psi'(0) = 1, and the growth towards 1 that alpha says."""
    limit = depth_limit(phi, centred=centred)
    rho = torch.tensor([-0.95, -0.31, -0.29, -0.01, 1e-6, 0.04, 0.06, 0.2999, 0.3001, 0.9], dtype=torch.float64)
    mapped = _UnitDual(limit.phi, centred)(rho)
    assert torch.allclose(limit.weight(mapped), limit.slope**2 * limit.weight(rho), rtol=1e-11, atol=0)
    assert float(limit.weight(rho)[4]) == pytest.approx(1e-6, rel=1e-5)
    if phi == "hard_tanh":
        # The expansion of its dual ends too early to come near 1.
        with pytest.warns(UserWarning, match="nearly the same"):
            limit.weight(torch.tensor([1 - 1e-6], dtype=torch.float64))
        return
    near = limit.weight(torch.tensor([1 - 1e-6, 1 - 1e-2], dtype=torch.float64))
    grown = float((near[0] / near[1]).log()) / math.log(1e4)
    assert limit.exponent is not None
    assert grown == pytest.approx(limit.exponent / 2, rel=0.1)


@pytest.mark.parametrize(
    ("phi", "centred", "depths"),
    [
        ("relu", True, (4, 32, 256)),
        (optimal_activation(4), False, (1, 16, 64)),
        ("swish", False, (16, 32, 128)),
        ("sigmoid", False, (2, 8, 32)),
        ("abs", True, (1, 4, 8)),
    ],
)
def test_deep_networks_approach_their_limit(phi: str | ScalarFunction, centred: bool, depths: tuple[int, ...]) -> None:
    wanted = depth_limit(phi, centred=centred).classify(X, Y, NEW)
    apart = [float((deep_classify(X, Y, NEW, phi, d, centred=centred) != wanted).double().mean()) for d in depths]
    assert apart[2] <= 0.02
    assert apart[0] > apart[2]


def test_limit_classifiers() -> None:
    majority = depth_limit("relu").classify(X, Y, NEW)
    assert majority.shape == (100,)
    assert bool((majority == Y.bincount().argmax()).all())
    nearest = depth_limit("abs", centred=True).classify(X, Y, NEW)
    assert torch.equal(nearest, Y[(NEW @ X.t()).abs().argmax(1)])
    # A training input among the new ones keeps its label; labels that nobody has are not given.
    again = depth_limit("tanh").classify(X, 3 * Y, X)
    assert torch.equal(again, 3 * Y)
    assert set(depth_limit("abs", centred=True).classify(X, 3 * Y, NEW).tolist()) <= {0, 3}
    assert float(depth_limit("tanh").weight(torch.ones(1))) < math.inf


def test_odd_activations_turn_against_opposite_points() -> None:
    """h_3: the nearly opposite point speaks against its label, louder than a nearer one of the same class for it."""
    third = ScalarFunction(name="h3", value=lambda x: x**3 - 3 * x, slope=lambda x: 3 * x**2 - 3)
    angles = torch.tensor([3.1, 1.1, 1.3])
    x = torch.stack([angles.cos(), angles.sin()], 1)
    y, new = torch.tensor([0, 0, 1]), torch.tensor([[1.0, 0.0]])
    assert depth_limit(third).kind == "nearest neighbour"
    wanted = deep_classify(x, y, new, third, 3, penalty=0)
    assert torch.equal(depth_limit(third).classify(x, y, new), wanted)
    assert wanted.tolist() == [1]


@pytest.mark.parametrize("dimension", [1.0, 2.5, 10.0, 40.0])
def test_optimal_activations(dimension: float) -> None:
    limit = depth_limit(optimal_activation(dimension))
    assert limit.exponent == pytest.approx(dimension, rel=1e-9)
    phi = optimal_activation(2.0, degree=3)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(phi(x).sum(), x)
    assert torch.allclose(slope, phi.slope(x.detach()))


def test_misuse() -> None:
    limit = depth_limit("tanh")
    for call, message in (
        (lambda: depth_limit("linear"), "linear"),
        (
            lambda: depth_limit(
                ScalarFunction(name="one", value=torch.ones_like, slope=torch.zeros_like), centred=True
            ),
            "positive",
        ),
        (lambda: depth_limit("cube"), "unknown"),
        (lambda: depth_limit("relu").weight(torch.zeros(1)), "majority"),
        (lambda: limit.weight(torch.tensor([1.5])), "correlations"),
        (lambda: limit.weight(torch.tensor([math.nan])), "correlations"),
        (lambda: limit.classify(X, Y[:3], NEW), "y must be"),
        (lambda: limit.classify(X, Y - 1, NEW), "y must be"),
        (lambda: limit.classify(X, Y.double(), NEW), "y must be"),
        (lambda: limit.classify(X, Y, NEW[:, :2]), "features"),
        (lambda: limit.classify(X, Y, NEW * math.nan), "NaN"),
        (lambda: limit.classify(X, Y, NEW * 0), "zero"),
        (lambda: deep_ntk(torch.zeros(1), "relu", 0), "depth"),
        (lambda: deep_ntk(torch.full((1,), 2.0), "relu", 1), "correlations"),
        (lambda: deep_classify(X, Y, NEW, "abs", 40, centred=True), "underflows"),
        (lambda: optimal_activation(0.5), "dimension"),
        (lambda: optimal_activation(3, degree=1), "degree"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
