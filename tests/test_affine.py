"""Every affine step against the dense matrix of the module it was read from."""

import pytest
import torch
from torch import nn

from perron.affine import DenseStep, affine_step, full_float32
from perron.nn import PositiveConcaveLinear
from perron.solvers import Auto, Compiled, Picard
from perron.structured import DiagonalLowRank, MonotoneConvolution2d, SparseLinear

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
    plain = step.plainly()
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
    step = affine_step(nn.Conv2d(1, 1, 3, padding=1, bias=False)).plainly()
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
    layer = PositiveConcaveLinear(4, 6, solver=Picard(tol=1e-3, verify=torch.float32))
    x = torch.randn(3, 4)
    assert layer.solve(x).precision == torch.float32
    (REDUCED | ELSEWHERE)[setting]()
    assert full_float32() == (setting in ELSEWHERE)
    for solver in (Auto(), Picard(tol=1e-3, verify=torch.float32), Compiled(backend="eager")):
        layer.solver = solver
        solution = layer.solve(x)
        assert solution.certified
        expected = torch.float32 if setting in ELSEWHERE and solver.verify == torch.float32 else torch.float64
        assert solution.precision == expected
        layer(x).sum().backward()
        assert layer.last_solution.adjoint.certified


def test_fast_math_of_the_library_never_proves(monkeypatch: pytest.MonkeyPatch) -> None:
    assert full_float32()
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    assert not full_float32()
    assert DenseStep((torch.rand(2, 2),), None).plainly() is None
