"""Every affine step against the dense matrix of the module it was read from."""

import copy
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from perron import certify
from perron.cells import (
    AffineStep,
    ConvolutionStep,
    DenseStep,
    DiagonalLowRank,
    DiagonalLowRankStep,
    MonotoneConvolution2d,
    MonotoneConvolutionStep,
    Refusal,
    SparseLinear,
    affine_step,
)
from perron.cells.circular import transposed_kernel
from perron.cells.step import full_float32
from perron.nn import Equilibrium, Inject, PositiveConcaveLinear
from perron.solvers import Auto, Compiled, Picard

EDGES = torch.tensor([[0, 0, 1, 3, 4, 4], [1, 4, 2, 3, 0, 4]])
STEPS = {
    "linear": (lambda: nn.Linear(5, 4), (5,)),
    "linear without bias": (lambda: nn.Linear(5, 5, bias=False), (5,)),
    "sparse": (lambda: SparseLinear(EDGES, 5, bias=True), (5,)),
    "sparse, not square": (lambda: SparseLinear(EDGES, 6, 5), (5,)),
    "diagonal and low rank": (lambda: DiagonalLowRank(5, 2, bias=True), (5,)),
    "rank 0": (lambda: DiagonalLowRank(5, 0), (5,)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, padding=1), (2, 7)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 5, 4)),
    "conv2d strided": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False), (2, 6, 5)),
    "conv2d dilated": (lambda: nn.Conv2d(2, 3, (3, 2), dilation=(2, 1)), (2, 7, 5)),
    "conv2d same": (lambda: nn.Conv2d(2, 3, (2, 3), padding="same"), (2, 4, 5)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2), (4, 4, 3)),
    "conv3d": (lambda: nn.Conv3d(2, 2, 3, padding=1), (2, 3, 4, 3)),
    "monotone conv2d": (lambda: MonotoneConvolution2d(2, 3), (2, 4, 5)),
    "monotone conv2d, small": (lambda: MonotoneConvolution2d(3, 3, margin=1.5), (3, 2, 1)),
    "pooling": (lambda: nn.AvgPool2d(3, 1, 1), (2, 4, 5)),
}


def build(name: str, dtype: torch.dtype = torch.float64):
    make, shape = STEPS[name]
    return make().to(dtype), torch.rand(3, *shape, dtype=dtype)


@pytest.mark.parametrize("name", STEPS)
def test_forward_transpose_and_gradients(name: str) -> None:
    module, v = build(name)
    step = affine_step(module)
    v.requires_grad_()
    expected = module(v)
    g = torch.rand_like(expected)
    parameters = list(module.parameters())
    of_v, *of_parameters = torch.autograd.grad(expected, [v, *parameters], g)
    detached = step.rebind([t.detach() for t in step.tensors])
    torch.testing.assert_close(detached(v.detach()), expected.detach())
    torch.testing.assert_close(detached.transpose(g, v.shape), of_v)
    # A step's tensors are the parameters, or made of them.
    found = torch.autograd.grad(step.tensors, parameters, detached.gradients(v.detach(), g)) if parameters else ()
    for ours, gradient in zip(found, of_parameters, strict=True):
        torch.testing.assert_close(ours, gradient)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plain_sums_agree_and_obey_the_rounding_bound(name: str, dtype: torch.dtype) -> None:
    module, v = build(name, dtype)
    step = affine_step(module).rebind([t.detach() for t in affine_step(module).tensors]).magnitude()
    plain = step.rigorous()
    if plain is None:
        assert "grouped" in name or name == "pooling"
        assert dtype == torch.float32
        return
    exact = step.rebind([t.double() for t in step.tensors])(v.double())
    u = torch.finfo(dtype).eps / 2
    assert ((plain(v).double() - exact).abs() <= 2 * (step.terms + 2) * u * exact).all()
    # Strided and offset inputs, and an empty batch.
    twice = torch.stack([v, v], dim=-1)[..., 1]
    torch.testing.assert_close(plain(twice), plain(v))
    assert plain(v[:0]).shape == (0, *exact.shape[1:])


@pytest.mark.parametrize("name", STEPS)
def test_row_sums_and_channels_bound_the_map(name: str) -> None:
    module, v = build(name)
    step = affine_step(module).rebind([t.detach() for t in affine_step(module).tensors]).magnitude()
    largest = step.linear(torch.ones_like(v)).max()
    assert step.row_sums() >= largest * (1 - 1e-12)
    if v.dim() == 2:
        torch.testing.assert_close(step.channels()[0].linear(v), step.linear(v))


def test_plain_convolution_keeps_small_entries_beside_huge_ones() -> None:
    """A transform would leave an error of the size of its largest input everywhere."""
    step = affine_step(nn.Conv2d(1, 1, 3, padding=1, bias=False)).rigorous()
    step = step.rebind([t.detach().abs() for t in step.tensors])
    image = torch.full((1, 1, 8, 8), 1e-3)
    image[0, 0, 0, 0] = 1e20
    exact = step.rebind([t.double() for t in step.tensors])(image.double())
    torch.testing.assert_close(step(image).double(), exact, rtol=1e-5, atol=0)


def test_sparse_product_differentiates_twice_and_under_vmap() -> None:
    module = SparseLinear(EDGES, 5).double()
    v = torch.rand(3, 5, dtype=torch.float64, requires_grad=True)
    values = module.weight.detach().clone().requires_grad_()

    def product(values, v):
        return torch.func.functional_call(module, {"weight": values}, (v,)).square()

    assert torch.autograd.gradcheck(product, (values, v), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(product, (values, v))
    per_sample = torch.func.vmap(torch.func.grad(lambda w, x: product(w, x[None]).sum()), in_dims=(None, 0))
    together = torch.func.grad(lambda w: product(w, v).sum())(values)
    torch.testing.assert_close(per_sample(values, v).sum(0), together)


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        (torch.tensor([[0, 5], [0, 0]]), "5 x 5"),
        (torch.tensor([[0, -1], [0, 0]]), "5 x 5"),
        (torch.tensor([[1, 1], [2, 2]]), "twice"),
        (torch.tensor([[0.0], [1.0]]), "integer"),
        (torch.tensor([0, 1]), "integer"),
    ],
)
def test_bad_patterns_are_refused(edges, message) -> None:
    with pytest.raises(ValueError, match=message):
        SparseLinear(edges, 5)


def test_an_empty_pattern_is_the_zero_map() -> None:
    module = SparseLinear(torch.zeros(2, 0, dtype=torch.long), 3)
    assert not module(torch.rand(2, 3)).any()


REDUCED = {
    "all": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "oneDNN": lambda: torch._C._set_fp32_precision_setter("mkldnn", "all", "bf16"),
    "oneDNN products": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "tf32"),
    "oneDNN convolutions": lambda: setattr(torch.backends.mkldnn.conv, "fp32_precision", "bf16"),
    "old": lambda: torch.set_float32_matmul_precision("medium"),
}
ELSEWHERE = {
    "CUDA products": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "CUDA": lambda: setattr(torch.backends.cudnn, "fp32_precision", "tf32"),
    "old CUDA": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
}
SETTINGS = [(backend, op) for backend in ("cuda", "mkldnn") for op in ("all", "matmul", "conv", "rnn")]


@pytest.fixture
def precision_settings():
    """Puts back what a test sets; oneDNN and CUDA inherit from what is set for all."""
    old = torch.get_float32_matmul_precision()
    places = [("generic", "all"), *SETTINGS]
    before = {place: torch._C._get_fp32_precision_getter(*place) for place in places}
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision(old)
    for place, value in before.items():
        torch._C._set_fp32_precision_setter(*place, value)


@pytest.mark.parametrize("setting", [*REDUCED, *ELSEWHERE])
def test_reduced_precision_never_proves_and_never_raises(setting: str, precision_settings: None) -> None:
    layer = PositiveConcaveLinear(4, 6, solver=Picard(tol=1e-3, proof_dtype=torch.float32))
    x = torch.randn(3, 4)
    assert layer.solve(x).proof_dtype == torch.float32
    (REDUCED | ELSEWHERE)[setting]()
    assert full_float32() == (setting in ELSEWHERE)
    for solver in (Auto(), Picard(tol=1e-3, proof_dtype=torch.float32), Compiled(backend="eager")):
        layer.solver = solver
        solution = layer.solve(x)
        assert solution.certified
        expected = torch.float32 if setting in ELSEWHERE and solver.proof_dtype == torch.float32 else torch.float64
        assert solution.proof_dtype == expected
        layer(x).sum().backward()
        assert layer.last_solution.adjoint.certified


def test_fast_math_of_the_library_never_proves(monkeypatch: pytest.MonkeyPatch) -> None:
    assert full_float32()
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    assert not full_float32()
    assert DenseStep(weights=(torch.rand(2, 2),)).rigorous() is None


# ----------------------------------------------------------------------------------- what bounds are made of, exactly


def exact_sum(numbers: Tensor) -> Fraction:
    return sum((abs(Fraction(x)) for x in numbers.flatten().tolist()), Fraction(0))


def exact_row_sum(step: AffineStep) -> Fraction:
    """The largest sum of |A_ij| over a row, or for products of weights of what bounds |A_ij|."""
    first = step.weights[0]
    if isinstance(step, DiagonalLowRankStep):
        diagonal, left, right = step.weights
        columns = [exact_sum(column) for column in right.t()]
        rows = [
            sum((abs(Fraction(x)) * c for x, c in zip(row, columns, strict=True)), Fraction(0)) for row in left.tolist()
        ]
        return max(abs(Fraction(d)) + row for d, row in zip(diagonal.tolist(), rows, strict=True))
    if isinstance(step, MonotoneConvolutionStep):
        k, skew = step.weights
        image = [exact_sum(row) for row in k]
        rows = [
            sum((exact_sum(k[o, i]) * image[o] for o in range(len(k))), exact_sum(skew[i])) for i in range(k.shape[1])
        ]
        return abs(Fraction(step.identity)) + max(rows)
    if isinstance(step, DenseStep | ConvolutionStep):
        return max(exact_sum(row) for row in first)
    rows = torch.repeat_interleave(step.pattern.rows.diff())
    return max(exact_sum(first[rows == row]) for row in range(step.pattern.shape[0]))


@pytest.mark.parametrize("name", [name for name in STEPS if name != "pooling"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_row_sums_are_those_of_the_very_weights(name: str, dtype: torch.dtype) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        module = STEPS[name][0]().to(dtype)
        step = affine_step(module).rebind([t.detach() for t in affine_step(module).tensors])
        exact, found = exact_row_sum(step), Fraction(float(step.row_sums()))
        assert exact <= found <= exact * (1 + Fraction(1, 10**12)) + Fraction(1, 10**290)


@pytest.mark.parametrize("name", [n for n in STEPS if not n.startswith(("pool", "diagonal", "rank", "monotone"))])
def test_terms_count_the_products_of_rows_and_of_columns(name: str) -> None:
    module, v = build(name)
    step = affine_step(module)
    step = step.rebind([torch.ones_like(t) for t in step.tensors])
    rows = step.linear(torch.ones_like(v))
    columns = step.transpose(torch.ones_like(rows), v.shape)
    assert max(float(rows.max()), float(columns.max())) <= step.terms


def test_terms_of_products_count_all_of_their_sums() -> None:
    module = MonotoneConvolution2d(2, 3)
    module.a = nn.Parameter(torch.rand(50, 2, 3, 3))
    assert affine_step(module).terms >= 2 * 9 + 50 * 9 + 2 * 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_margins_of_two_by_two_matrices(dtype: torch.dtype) -> None:
    """I - (W + W^T)/2 = [[1 - a, -c], [-c, 1 - a]] has the least eigenvalue 1 - a - |c|, c = (b + d)/2."""
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        gap = 10.0 ** -float(1 + 14 * torch.rand((), generator=generator))
        c = 2 * float(torch.rand((), generator=generator)) - 1
        skew = 10 * float(torch.rand((), generator=generator))
        weight = torch.tensor([[1 - abs(c) - gap, c + skew], [c - skew, 1 - abs(c) - gap]], dtype=dtype)
        a, b, d = (Fraction(float(x)) for x in (weight[0, 0], weight[0, 1], weight[1, 0]))
        exact = 1 - a - abs(b + d) / 2
        found = DenseStep(weights=(weight,)).margin()
        assert Fraction(found) <= exact
        assert found >= float(exact) - 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_margin_of_a_convolution_is_that_of_what_it_multiplies_with(dtype: torch.dtype) -> None:
    """1 - m is rounded: with m = 1e-20 it is 1, and for A = 0 z = relu(z + b) has no or many fixed points."""
    for m in (1e-20, 1e-9, 1e-3, 0.1, 1.5, 1e8):
        module = MonotoneConvolution2d(2, 3, margin=m).to(dtype)
        step = affine_step(module)
        assert Fraction(step.margin()) <= 1 - Fraction(step.identity)
        assert step.margin() >= (1 - step.identity) - 1e-15 * max(1, m)
        v = torch.rand(1, 2, 4, 4, dtype=dtype)
        torch.testing.assert_close(step(v), module(v))
    assert affine_step(MonotoneConvolution2d(2, 3, margin=1e-20)).margin() <= 0
    assert affine_step(MonotoneConvolution2d(2, 3, margin=1e-9)).margin() <= 0
    assert affine_step(MonotoneConvolution2d(2, 3, margin=1e-9).double()).margin() > 0


def test_only_antisymmetric_kernels_have_a_margin() -> None:
    step = affine_step(MonotoneConvolution2d(3, 3).to(torch.bfloat16))
    k, skew = step.weights
    assert torch.equal(skew, -transposed_kernel(skew))
    assert step.margin() > 0
    skew = skew.detach().clone()
    skew[0, 1, 0, 0] *= 1.01
    assert step.rebind([k, skew]).margin() == -math.inf


def test_what_underflows_inside_of_a_product_is_bounded() -> None:
    """R^T v is 1e-350, which is 0, and L R^T v is 1e-50, which is not."""
    one = torch.ones(1, 1, dtype=torch.float64)
    step = DiagonalLowRankStep(weights=(torch.zeros(1, dtype=torch.float64), 1e300 * one, 1e-200 * one))
    low, high = step.over(1e-150 * one, 1e-150 * one)
    assert float(low) <= 1e-50 <= float(high)
    assert float(step.underflow(torch.float64)) >= 1e-50


def test_convolutions_take_no_batch_for_channels() -> None:
    step = affine_step(nn.Conv1d(2, 2, 3, padding=1))
    with pytest.raises(ValueError, match="channels"):
        step(torch.rand(2, 5))


# ------------------------------------------------------------------------------------------------------------- patterns


def test_the_longest_row_is_that_of_the_loaded_pattern() -> None:
    module = SparseLinear(torch.stack([torch.arange(6), torch.arange(6)]), 6)
    other = SparseLinear(torch.stack([torch.zeros(6, dtype=torch.long), torch.arange(6)]), 6)
    assert affine_step(module).terms == 1
    module.load_state_dict(other.state_dict())
    assert affine_step(module).terms == 6
    assert module.pattern.t().longest_row == 1
    v = torch.rand(2, 6)
    torch.testing.assert_close(module(v), other(v))


def test_a_transpose_that_belongs_to_another_pattern_is_made_anew() -> None:
    module, state = SparseLinear(EDGES, 5), SparseLinear(EDGES, 5).state_dict()
    stale = SparseLinear(torch.tensor([[0, 1, 2, 3, 3, 4], [0, 0, 1, 0, 4, 1]]), 5)
    for name in ("transposed_row_pointers", "transposed_columns", "order"):
        state[name] = getattr(stale, name)
    module.load_state_dict(state)
    assert module.pattern.fault() is None
    step, eye = affine_step(module), torch.eye(5)
    torch.testing.assert_close(step.transpose(eye, eye.shape), step.linear(eye).t())


BREAK = {
    "columns out of range": lambda m: m.columns.fill_(7),
    "negative columns": lambda m: m.columns.fill_(-1),
    "pointers that fall": lambda m: m.row_pointers.copy_(m.row_pointers.flip(0)),
    "pointers that end early": lambda m: m.row_pointers.clamp_(max=3),
    "an entry twice": lambda m: m.columns.copy_(torch.tensor([1, 1, 2, 3, 0, 4])),
    "not sorted": lambda m: m.columns.copy_(torch.tensor([4, 1, 2, 3, 0, 4])),
    "another transpose": lambda m: m.transposed_columns.copy_(m.transposed_columns.flip(0)),
    "another order": lambda m: m.order.copy_(m.order.flip(0)),
    "no permutation": lambda m: m.order.fill_(0),
    "order out of range": lambda m: m.order.fill_(99),
    "transposed pointers": lambda m: m.transposed_row_pointers.clamp_(max=2),
    "values": lambda m: setattr(m, "weight", nn.Parameter(torch.rand(4))),
    "features": lambda m: setattr(m, "in_features", 4),
    "integers": lambda m: setattr(m, "columns", m.columns.int()),
}


@pytest.mark.parametrize("name", BREAK)
def test_broken_patterns_are_refused(name: str) -> None:
    module = SparseLinear(EDGES, 5)
    assert affine_step(module).sizes() == {"features": (5, 5)}
    BREAK[name](module)
    with pytest.raises(Refusal, match="pattern"):
        affine_step(module).sizes()


def test_broken_patterns_are_not_loaded() -> None:
    state = copy.deepcopy(SparseLinear(EDGES, 5).state_dict())
    state["columns"].fill_(7)
    with pytest.raises(RuntimeError, match="out of range"):
        SparseLinear(EDGES, 5).load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sparse_products_in_half_precision(dtype: torch.dtype) -> None:
    sparse = SparseLinear(torch.tensor([[0, 1, 1], [1, 0, 1]]), 2).to(dtype)
    x = torch.tensor([[1.0, 2.0], [0.5, -1.0]], dtype=dtype, requires_grad=True)
    dense = torch.zeros(2, 2)
    dense[0, 1], dense[1, 0], dense[1, 1] = sparse.weight.detach().float()
    y = sparse(x)
    torch.testing.assert_close(y.float(), x.detach().float() @ dense.t(), rtol=1e-2, atol=1e-2)
    y.sum().backward()
    torch.testing.assert_close(x.grad.float(), dense.sum(0).expand(2, 2), rtol=1e-2, atol=1e-2)


class Coarse(nn.Parameter):
    """A weight that multiplies with few digits, as quantised ones do."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear:
            return found.bfloat16().to(found.dtype)
        same = isinstance(found, Tensor) and isinstance(args[0], cls) and found.shape == args[0].shape
        return found.as_subclass(cls) if same else found


def test_weights_with_an_arithmetic_of_their_own_are_not_read() -> None:
    linear = nn.Linear(2, 2, bias=False)
    linear.weight = Coarse(torch.tensor([[0.5, 0.3], [0.2, 0.5]]))
    with pytest.raises(Refusal, match="a Coarse, whose arithmetic is not known"):
        affine_step(linear)
    with pytest.raises(Refusal, match="Coarse"):
        DenseStep(weights=(linear.weight,)).check()
    cell = nn.Sequential(linear, Inject(), nn.Tanh())
    assert "Coarse" in certify(cell).refusal
    solution = Equilibrium(cell, solver=Auto(tol=1e-2)).solve(torch.rand(3, 2))
    assert not solution.certified
    assert solution.converged.all()
