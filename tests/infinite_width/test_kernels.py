"""Kernels on data, against closed forms, plain iterations, quadrature in two dimensions, and finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from perron.infinite_width import (
    UnstableError,
    explicit_ck,
    explicit_kernels,
    explicit_ntk,
    hard_tanh,
    implicit_ck,
    implicit_kernels,
    implicit_ntk,
    scalar_function,
    solve_state,
    two_slopes,
)
from perron.infinite_width.dual import Dual
from perron.infinite_width.moments import quadrature
from perron.nn import PositiveConcaveLinear

NAMES = ["linear", "relu", "leaky_relu(0.2)", "erf", "tanh", "hard_tanh", "swish", "gelu", "softplus", "sigmoid"]


def inputs(n: int = 12, p: int = 9, unit: bool = True) -> Tensor:
    torch.manual_seed(0)
    x = torch.randn(n, p, dtype=torch.float64) / math.sqrt(p)
    return F.normalize(x) if unit else x


def by_quadrature(phi, q: Tensor, h: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """Both duals on a grid of the plane, entry by entry: slow, smooth functions only."""
    x, w = quadrature(torch.ones((), dtype=torch.float64), ())
    value, slope = torch.zeros_like(h), torch.zeros_like(h)
    for i in range(len(q)):
        for j in range(len(q)):
            rho = (h[i, j] / (q[i] * q[j]).sqrt()).clamp(-1, 1)
            u = q[i].sqrt() * x
            v = q[j].sqrt() * (rho * x[:, None] + (1 - rho**2).clamp_min(0).sqrt() * x)
            inner = w[:, None] * w
            value[i, j] = ((phi.value(u) - shift)[:, None] * (phi.value(v) - shift) * inner).sum()
            slope[i, j] = (phi.slope(u)[:, None] * phi.slope(v) * inner).sum()
    return value, slope


@pytest.mark.parametrize("name", ["erf", "tanh", "swish", "gelu", "softplus"])
@pytest.mark.parametrize("unit", [True, False])
def test_duals_against_quadrature_in_the_plane(name: str, unit: bool) -> None:
    x = inputs(4, 6, unit)
    h, phi = x @ x.t(), scalar_function(name)
    q = h.diagonal()
    dual = Dual(phi, q, torch.tensor(0.1, dtype=torch.float64), 0.99)
    value, slope = by_quadrature(phi, q, h, 0.1)
    rows = torch.arange(4)
    assert dual.error <= 1e-10
    torch.testing.assert_close(dual(rows, h), value, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(dual.of_slope(rows, h), slope, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(dual.second, value.diagonal(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(dual.energy, slope.diagonal(), rtol=1e-10, atol=1e-12)


def test_closed_forms_of_the_theory() -> None:
    x = inputs()
    h = x @ x.t()
    q, rows, none = h.diagonal(), torch.arange(len(x)), torch.zeros((), dtype=torch.float64)
    angle = torch.acos(h.clamp(-1, 1))
    relu = Dual(scalar_function("relu"), q, none)
    size = torch.outer(q, q).sqrt()
    wanted = size * (torch.sin(angle) + (math.pi - angle) * torch.cos(angle)) / (2 * math.pi)
    torch.testing.assert_close(relu(rows, h), wanted, rtol=1e-10, atol=1e-10)
    off = ~torch.eye(len(x), dtype=torch.bool)
    torch.testing.assert_close(
        relu.of_slope(rows, h)[off], ((math.pi - angle) / (2 * math.pi))[off], rtol=1e-10, atol=1e-10
    )
    erf = Dual(scalar_function("erf"), q, none)
    wide = torch.outer(1 + 2 * q, 1 + 2 * q).sqrt()
    torch.testing.assert_close(erf(rows, h), 2 / math.pi * torch.asin(2 * h / wide), rtol=1e-10, atol=1e-10)


@given(st.integers(0, 1000), st.floats(-1.5, 1.5), st.floats(-1.5, 1.5))
def test_two_slopes_against_their_expansion(seed: int, right: float, left: float) -> None:
    """The closed form and the Mehler series are two ways to the same number."""
    torch.manual_seed(seed)
    x = F.normalize(torch.randn(5, 12, dtype=torch.float64))
    h, rows, none = x @ x.t(), torch.arange(5), torch.zeros((), dtype=torch.float64)
    closed = Dual(two_slopes(right, left), h.diagonal(), none)
    series = Dual(two_slopes(right, left), h.diagonal(), none)
    series.closed = False
    series._expand(0.7)
    found = series._series(series.values, rows, h)
    small = h.abs() < 0.7
    torch.testing.assert_close(found[small], closed(rows, h)[small], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("unit", [True, False])
def test_the_kernel_is_the_fixed_point(name: str, unit: bool) -> None:
    x = inputs(unit=unit)
    found = implicit_kernels(x, name, 0.3, 0.7)
    s = x @ x.t()
    state = solve_state(name, 0.3, 0.7, float(s.diagonal().mean().sqrt()))
    h = 0.7 * s
    for _ in range(200):
        dual = Dual(state.phi, h.diagonal(), state.shift, 0.9999)
        g = dual(torch.arange(len(x)), h)
        g = torch.where(torch.eye(len(x), dtype=torch.bool), dual.second, g)
        h = 0.3 * g + 0.7 * s
    torch.testing.assert_close(found.ck, g, rtol=1e-9, atol=1e-10)
    assert found.residual <= 1e-11
    assert torch.allclose(found.ck, found.ck.t(), atol=1e-11)
    assert float(torch.linalg.eigvalsh(found.ck)[0]) > -1e-10
    for trained in ("Av", "ABv"):
        assert torch.allclose(found.ntk(trained), implicit_ntk(x, name, 0.3, 0.7, trained=trained))


def test_linear_kernels_in_closed_form() -> None:
    x = inputs(unit=False)
    s = x @ x.t()
    torch.testing.assert_close(implicit_ck(x, "linear", 0.4, 0.6), 0.6 * s / 0.6)
    torch.testing.assert_close(implicit_ntk(x, "linear", 0.4, 0.6), s / 0.6)
    torch.testing.assert_close(implicit_ntk(x, "linear", 0.4, 0.6, trained="ABv"), (s + 0.6 * s) / 0.6)
    torch.testing.assert_close(explicit_ck(x, ["linear", "linear"]), s)
    torch.testing.assert_close(explicit_ntk(x, ["linear", "linear"]), 3 * s)
    torch.testing.assert_close(explicit_ntk(x, ["linear", "linear"], train_input=False), 2 * s)


def test_blocks_of_rows_give_the_same_kernel(monkeypatch) -> None:
    x = inputs(unit=False)
    whole = implicit_kernels(x, "swish", 0.3, 0.7)
    monkeypatch.setattr("perron.infinite_width.kernels._BLOCK", 30)
    parts = implicit_kernels(x, "swish", 0.3, 0.7)
    torch.testing.assert_close(parts.ck, whole.ck, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(parts.slopes, whole.slopes, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(explicit_ck(x, ["swish"]), explicit_ck(x, ["swish"]))


@pytest.mark.parametrize("name", ["relu", "erf", "tanh", "swish"])
def test_gradients_with_respect_to_sa_and_the_inputs(name: str) -> None:
    x, weights = inputs(5, 7, unit=False), torch.randn(5, 5, dtype=torch.float64)

    def total(sa: Tensor, x: Tensor) -> Tensor:
        found = implicit_kernels(x, name, sa, 0.7)
        return (weights * (found.ck + found.ntk("ABv"))).sum()

    sa = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    ours = torch.autograd.grad(total(sa, x.requires_grad_()), (sa, x))
    x = x.detach()
    numeric = (total(sa.detach() + 1e-5, x) - total(sa.detach() - 1e-5, x)) / 2e-5
    assert float(ours[0]) == pytest.approx(float(numeric), rel=1e-6)
    step = torch.randn_like(x)
    moved = (total(sa.detach(), x + 1e-5 * step) - total(sa.detach(), x - 1e-5 * step)) / 2e-5
    assert float((ours[1] * step).sum()) == pytest.approx(float(moved), rel=1e-6)


def test_near_duplicates_are_told() -> None:
    x = inputs()
    x[1] = F.normalize(x[:1] + 1e-6 * x[1:2])[0]
    with pytest.warns(UserWarning, match="nearly the same"):
        found = implicit_kernels(x, "hard_tanh", 0.3, 0.7)
    assert 1e-6 < found.truncation < 1e-2
    closed = implicit_kernels(x, "relu", 0.3, 0.7)
    assert closed.truncation == 0
    assert float(closed.ck[0, 1]) == pytest.approx(float(closed.ck[0, 0]), rel=1e-5)


def test_layers_are_no_activations() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(TypeError, match="Nonnegative layers are not centred"):
        implicit_ck(x, PositiveConcaveLinear(4, 8), 0.3, 0.7)
    with pytest.raises(TypeError, match="ScalarFunction"):
        implicit_ntk(x, torch.tanh, 0.3, 0.7)


def test_misuse() -> None:
    x = inputs()
    for wrong, message in (
        (x[0], "samples, features"),
        (x[:0], "not empty"),
        (x.long(), "floating point"),
        (torch.where(x > 1, x, torch.nan), "NaN"),
        (x * (torch.arange(12) != 3)[:, None], "row 3 of X is zero"),
    ):
        with pytest.raises(ValueError, match=message):
            implicit_kernels(wrong, "tanh", 0.3, 0.7)
    with pytest.raises(ValueError, match="unknown activation"):
        implicit_ck(x, "positive", 0.3, 0.7)
    with pytest.raises(UnstableError, match="lower sa"):
        implicit_ck(x, "relu", 2.5, 0.7)
    with pytest.raises(ValueError, match="at least one"):
        explicit_kernels(x, [])
    with pytest.raises(ValueError, match="Av"):
        implicit_ntk(x, "tanh", 0.3, 0.7, trained="v")
    # Norms that differ so much that one sample has no finite variance.
    wild = torch.cat([x, 1e3 * x[:1]])
    assert implicit_ck(wild, "tanh", 0.3, 0.7).isfinite().all()


def test_a_single_sample_and_other_precisions() -> None:
    assert implicit_ck(inputs(1), "tanh", 0.3, 0.7).shape == (1, 1)
    assert implicit_ck(inputs().float(), "relu", 0.3, 0.7).dtype == torch.float64
    strided = inputs(24)[::2]
    torch.testing.assert_close(
        implicit_ck(strided, "relu", 0.3, 0.7), implicit_ck(strided.contiguous(), "relu", 0.3, 0.7)
    )


def test_explicit_kernels_against_wide_networks() -> None:
    x, width = inputs(6, 8), 8000
    layers = [hard_tanh(0.9, 1.1), scalar_function("relu")]
    ck, _ = explicit_kernels(x, layers)
    torch.manual_seed(1)
    z, tau2 = x, x.square().sum(1).mean()
    from perron.infinite_width import gaussian_moments

    for phi in layers:
        m = gaussian_moments(phi, tau2)
        z = (phi(z @ torch.randn(width, z.shape[1], dtype=torch.float64).t()) - m.mean) / width**0.5
        tau2 = m.second
    assert float((z @ z.t() - ck).norm() / ck.norm()) < 0.05
