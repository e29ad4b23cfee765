"""Affine steps of a cell, v -> A v + c: each with its transpose, its gradient and what the proofs need of it.

`plainly()` gives the step in a form whose sums are plain sums of products, each product once, in whatever order: only
such sums obey the rounding bound of `perron.rounding`. Libraries may compute convolutions by transforms, which cancel.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import torch.nn.grad
from torch import Tensor, nn
from torch.nn.utils import parametrize

from perron.rounding import flushes_subnormals, gamma
from perron.structured import (
    DiagonalLowRank,
    MonotoneConvolution2d,
    SparseLinear,
    SparsePattern,
    sparse_product,
    transposed_kernel,
    wrap,
)

__all__ = [
    "AFFINE_MODULES",
    "AffineStep",
    "ConvolutionStep",
    "DenseStep",
    "DiagonalLowRankStep",
    "MaskStep",
    "MonotoneConvolutionStep",
    "PoolStep",
    "Refusal",
    "SparseStep",
    "affine_step",
    "check_rounding",
    "full_float32",
]

_PRECISIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Bytes of unfolded input that a plain convolution works on at a time: about a core's second-level cache.
_PATCH_BYTES = 2**20
# By these oneDNN lets every float32 product be computed in bfloat16.
_FAST_MATH = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")


@torch.compiler.assume_constant_result
def full_float32() -> bool:
    """Whether no setting of torch or oneDNN lets float32 products on the CPU have shorter mantissas."""
    if any(os.environ.get(name, "STRICT").upper() != "STRICT" for name in _FAST_MATH):
        return False
    library: Any = torch.backends.mkldnn
    if not hasattr(library, "matmul"):
        return torch.get_float32_matmul_precision() == "highest"
    # The older functions set these, too, and raise where the newer settings disagree with them.
    settings = (library, library.matmul, library.conv)
    return all(s.fp32_precision in ("none", "ieee") for s in settings)


class Refusal(ValueError):
    """Why a cell's structure, or a proof about it, could not be verified."""


def check_rounding() -> None:
    """Raise Refusal where no rounding bound holds."""
    if flushes_subnormals():
        raise Refusal(
            "subnormal numbers count as zero (torch.set_flush_denormal), and no rounding bound allows for that"
        )


@dataclass(frozen=True)
class AffineStep(ABC):
    """v -> A v + c on (batch, ...) tensors; A is given by `weights` (none for pooling), c by `bias`."""

    weights: tuple[Tensor, ...]
    bias: Tensor | None

    @property
    @abstractmethod
    def terms(self) -> int:
        """Products in the longest sum of A v, or of A^T g."""

    @abstractmethod
    def apply(self, v: Tensor, bias: Tensor | None) -> Tensor:
        """A v + bias."""

    @abstractmethod
    def transpose(self, g: Tensor, shape: torch.Size) -> Tensor:
        """A^T g, where A acts on tensors of `shape`."""

    @abstractmethod
    def sizes(self) -> dict[str, tuple[int, int]]:
        """What A takes and gives: "features" (the last dimension), "channels" (the second), "dimensions" with the batch.

        What is not named may be anything, and stays as it is but for `growth`.

        Raises:
            Refusal: the tensors of this step do not fit each other.
        """

    def growth(self) -> tuple[int, ...]:
        """What A adds to each side of an image, whatever its size.

        Raises:
            Refusal: that depends on the size.
        """
        return ()

    @abstractmethod
    def positive(self) -> bool:
        """Whether A v > 0 for every v > 0, as far as can be told."""

    @abstractmethod
    def largest_row(self) -> Tensor:
        """A scalar: the largest row sum of an A >= 0, with the rounding of at most `terms` + 8 operations."""

    def row_sums(self) -> Tensor:
        """A float64 scalar: at least the largest sum of |A_ij| over a row, of the very tensors, rounding included."""
        found = self.exact().magnitude().largest_row()
        return found * (1 + 2 * gamma(self.terms + 12, torch.float64))

    def exact(self) -> AffineStep:
        """The same step in float64, which holds every weight exactly: what bounds are computed from."""
        return self.rebind([t.detach().double() for t in self.tensors])

    def check_tensors(self) -> None:
        """Raise Refusal unless the tensors hold real floating-point numbers in one precision, in memory."""
        self.check_arithmetic()
        for t in self.tensors:
            if t.device.type == "meta":
                raise Refusal("a weight of the cell is on the meta device and has no values")
            if t.layout != torch.strided:
                raise Refusal(f"a weight of the cell has the layout {t.layout}; use perron.nn.SparseLinear")
            if t.dtype not in _PRECISIONS:
                raise Refusal(f"a weight of the cell is {t.dtype}; only real floating-point numbers are verified")

    def check_arithmetic(self) -> None:
        """Raise Refusal where a tensor computes in a way of its own, as quantised ones do."""
        for t in self.tensors:
            if type(t) not in (Tensor, nn.Parameter):
                raise Refusal(f"a weight of the cell is a {type(t).__name__}, whose arithmetic is not known")

    def check_bias(self, features: int) -> None:
        """Raise Refusal where the bias would broadcast, or does not fit."""
        if self.bias is not None and self.bias.shape != (features,):
            raise Refusal(f"a bias of shape {tuple(self.bias.shape)} does not fit {features} outputs")

    def underflow(self, dtype: torch.dtype) -> Tensor | float:
        """What underflow adds at most to the error of an entry of A v + c, computed in this precision."""
        return 2 * (self.terms + 2) * torch.finfo(dtype).tiny

    def __call__(self, v: Tensor) -> Tensor:
        return self.apply(v, self.bias)

    def linear(self, v: Tensor) -> Tensor:
        """A v."""
        return self.apply(v, None)

    def magnitude(self) -> AffineStep:
        """|A| v + |c|, or more."""
        return self.rebind([t.abs() for t in self.tensors])

    @property
    def signs(self) -> tuple[Tensor, ...] | None:
        """Tensors such that A >= 0 if all of them are; None where A may have negative entries all the same."""
        return self.weights

    def margin(self) -> float:
        """A rigorous lower bound on min v^T (I - A) v / |v|^2; -inf where none is known."""
        return -math.inf

    def norm(self) -> float:
        """A bound on the Euclidean norm of A, as far as a step with a `margin` needs it."""
        return math.inf

    def over(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds of A v + c for lower <= v <= upper, rounding included: |A| acts on the radius. For float64, plain sums."""
        centre = (lower + upper) / 2
        # Rounded up: the box must stay inside centre +/- radius.
        radius = torch.maximum(upper - centre, centre - lower) * (1 + 1e-15)
        magnitude = self.magnitude()
        slack = 4 * gamma(self.terms + 8, lower.dtype) * magnitude(centre.abs() + radius)
        spread = magnitude.linear(radius) + slack + self.underflow(lower.dtype)
        middle = self(centre)
        return middle - spread, middle + spread

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.weights if self.bias is None else (*self.weights, self.bias)

    def rebind(self, tensors: Sequence[Tensor]) -> AffineStep:
        """The same step with other `tensors`."""
        count = len(self.weights)
        return replace(self, weights=tuple(tensors[:count]), bias=None if self.bias is None else tensors[count])

    def gradients(self, v: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """Gradients of <y, A v + c> for `tensors`; differentiable."""
        found = torch.func.vjp(lambda *w: replace(self, weights=w).linear(v), *self.weights)[1](y)
        return (*found, *self._bias_gradient(y))

    def _bias_gradient(self, y: Tensor) -> tuple[Tensor, ...]:
        if self.bias is None:
            return ()
        return (y.sum([0, *range(2, y.dim())]),)

    def plainly(self) -> AffineStep | None:
        """A step with plain sums in the precision of its tensors, or None if this device offers none."""
        # On other devices float32 products may be computed with shorter mantissas.
        dtype = self.tensors[0].dtype if self.tensors else torch.float64
        exact = dtype == torch.float64 or (
            dtype == torch.float32 and all(t.device.type == "cpu" for t in self.tensors) and full_float32()
        )
        return self if exact else None

    @property
    def per_sample(self) -> bool:
        """Whether every sample has an A of its own: then `weights` have a batch dimension."""
        return False

    def select(self, index: Tensor) -> AffineStep:
        """The step for these samples only."""
        return self

    def channels(self) -> tuple[AffineStep, ...]:
        """Steps on features, float64, whose product M bounds an A >= 0 on constants over space, w >= 0: A w <= M w.

        Each with at most `terms` + 2 roundings, those of its own weights included.

        Raises:
            Refusal: no such bound is known.
        """
        raise Refusal(f"the spectral radius of a {type(self).__name__} is not bounded here")


@dataclass(frozen=True)
class DenseStep(AffineStep):
    """A is a matrix (out, in)."""

    @property
    def weight(self) -> Tensor:
        return self.weights[0]

    @property
    def terms(self) -> int:
        return max(self.weight.shape)

    def apply(self, v: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(v, self.weight, bias)

    def transpose(self, g: Tensor, shape: torch.Size) -> Tensor:
        return g @ self.weight

    def sizes(self) -> dict[str, tuple[int, int]]:
        if self.weight.dim() != 2:
            raise Refusal(f"a linear map needs a matrix, and its weight has shape {tuple(self.weight.shape)}")
        self.check_bias(self.weight.shape[0])
        return {"features": (self.weight.shape[1], self.weight.shape[0])}

    def largest_row(self) -> Tensor:
        return _largest(self.weight.sum(1))

    def margin(self) -> float:
        """From the eigenvalues of S = I - (W + W^T)/2 in float64; a Cholesky factorisation proves them.

        S is computed with an entrywise error of at most 2 u |S_ij|, since the diagonal of W + W^T is exact. A
        factorisation of T = S - t I that ends has T + E = R^T R with |E_ij| <= g/(1 - g) sqrt(T_ii T_jj), g =
        gamma(n + 1) (Higham 2002, theorem 10.3 and its proof), so T >= -g/(1 - g) tr(T), and t less that is a margin.
        """
        weight = self.weight.detach().double()
        n = len(weight)
        if weight.dim() != 2 or weight.shape[1] != n or n == 0 or not bool(torch.isfinite(weight).all()):
            return -math.inf
        eye = torch.eye(n, dtype=torch.float64, device=weight.device)
        symmetric = eye - (weight + weight.t()) / 2
        size = float(symmetric.norm())
        if not 0 < size < math.inf:
            return 0.0 if size == 0 else -math.inf
        t = float(torch.linalg.eigvalsh(symmetric)[0]) - (n * n + 16) * 2.0**-53 * size
        shifted = symmetric - t * eye
        if int(torch.linalg.cholesky_ex(shifted)[1]):
            return -math.inf
        # The subtraction of t rounds the diagonal once more; underflow is far below the last term.
        trace = float(shifted.diagonal().sum())
        return t - (2 * gamma(n + 4, torch.float64) * trace + 8 * 2.0**-53 * size + 1e-290)

    def norm(self) -> float:
        # Of Frobenius; squares that underflow add less than the last term.
        found = float(self.weight.detach().double().norm())
        return found * (1 + 2 * gamma(self.weight.numel() + 8, torch.float64)) + 1e-140

    def gradients(self, v: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        if v.dim() != 2:
            return super().gradients(v, y)
        return (y.t() @ v, *self._bias_gradient(y))

    def _bias_gradient(self, y: Tensor) -> tuple[Tensor, ...]:
        return () if self.bias is None else (y.flatten(0, -2).sum(0),)

    def channels(self) -> tuple[AffineStep, ...]:
        return (replace(self.exact(), bias=None),)

    def positive(self) -> bool:
        return bool((self.weight.amax(1) > 0).all()) if self.weight.numel() else False


@dataclass(frozen=True)
class SparseStep(AffineStep):
    """A is a CSR matrix; `weights` holds its entries."""

    pattern: SparsePattern

    @property
    def terms(self) -> int:
        return max(self.pattern.longest_row, self.pattern.t().longest_row)

    def sizes(self) -> dict[str, tuple[int, int]]:
        (values,) = self.weights
        fault = self.pattern.fault()
        if fault is None and values.shape != self.pattern.columns.shape:
            fault = f"{tuple(values.shape)} values for {len(self.pattern.columns)} entries"
        if fault is None and values.device != self.pattern.columns.device:
            fault = f"values on {values.device}, indices on {self.pattern.columns.device}"
        if fault is not None:
            raise Refusal(f"the pattern of a sparse map is broken: {fault}")
        self.check_bias(self.pattern.shape[0])
        return {"features": (self.pattern.shape[1], self.pattern.shape[0])}

    def apply(self, v: Tensor, bias: Tensor | None) -> Tensor:
        y = sparse_product(self.pattern, self.weights[0], v)
        return y if bias is None else y + bias

    def transpose(self, g: Tensor, shape: torch.Size) -> Tensor:
        return sparse_product(self.pattern.t(), self.weights[0], g)

    def largest_row(self) -> Tensor:
        return _largest(self._rows(self.weights[0]))

    def _rows(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.pattern.shape[0]).index_add_(0, self.pattern.row_of_entry(), values)

    def channels(self) -> tuple[AffineStep, ...]:
        return (replace(self.exact(), bias=None),)

    def positive(self) -> bool:
        return bool((self._rows((self.weights[0] > 0).double()) > 0).all())


@dataclass(frozen=True)
class DiagonalLowRankStep(AffineStep):
    """A = diag(d) + L R^T; `weights` is (d, L, R)."""

    @property
    def terms(self) -> int:
        features, rank = self.weights[1].shape
        return features + rank + 1

    def apply(self, v: Tensor, bias: Tensor | None) -> Tensor:
        diagonal, left, right = self.weights
        y = v * diagonal + (v @ right) @ left.t()
        return y if bias is None else y + bias

    def transpose(self, g: Tensor, shape: torch.Size) -> Tensor:
        diagonal, left, right = self.weights
        return g * diagonal + (g @ left) @ right.t()

    def sizes(self) -> dict[str, tuple[int, int]]:
        shapes = [tuple(w.shape) for w in self.weights]
        diagonal, left, right = self.weights
        if diagonal.dim() != 1 or left.dim() != 2 or left.shape[0] != len(diagonal) or left.shape != right.shape:
            raise Refusal(f"a diagonal, left and right factor of shapes {shapes} do not fit each other")
        self.check_bias(len(diagonal))
        return {"features": (len(diagonal), len(diagonal))}

    def underflow(self, dtype: torch.dtype) -> Tensor | float:
        # What R^T v loses passes through L.
        left = self.weights[1].detach().double().abs()
        return super().underflow(dtype) * (1 + 2 * _largest(left.sum(1)))

    def largest_row(self) -> Tensor:
        diagonal, left, right = self.weights
        return _largest(diagonal + left @ right.sum(0)) + self.underflow(torch.float64)

    def channels(self) -> tuple[AffineStep, ...]:
        return (replace(self.exact(), bias=None),)

    def positive(self) -> bool:
        diagonal, left, right = self.exact().weights
        return bool(((diagonal > 0) | (left @ right.sum(0) > 0)).all())


@dataclass(frozen=True)
class ConvolutionStep(AffineStep):
    """A is a convolution with zero padding. `unfolded` evaluates it as a plain matrix product (CPU, one group)."""

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    unfolded: bool = False

    @property
    def kernel(self) -> tuple[int, ...]:
        return tuple(self.weights[0].shape[2:])

    @property
    def terms(self) -> int:
        outputs, inputs = self.weights[0].shape[:2]
        return max(inputs, outputs // self.groups) * math.prod(self.kernel)

    def sizes(self) -> dict[str, tuple[int, int]]:
        shape, dims = self.weights[0].shape, len(self.stride)
        if (
            len(shape) != dims + 2
            or len(self.dilation) != dims
            or not (isinstance(self.padding, str) or len(self.padding) == dims)
        ):
            raise Refusal(f"a kernel of shape {tuple(shape)} does not fit a convolution over {dims} dimensions")
        if self.groups < 1 or shape[0] % self.groups:
            raise Refusal(f"{shape[0]} output channels cannot be divided into {self.groups} groups")
        self.check_bias(shape[0])
        return {"channels": (shape[1] * self.groups, shape[0]), "dimensions": (dims + 2, dims + 2)}

    def growth(self) -> tuple[int, ...]:
        if set(self.stride) != {1}:
            raise Refusal(f"a convolution of stride {self.stride} does not keep the size of every image")
        return tuple(
            sum(pads) - d * (k - 1) for pads, d, k in zip(self._pads(), self.dilation, self.kernel, strict=True)
        )

    def apply(self, v: Tensor, bias: Tensor | None) -> Tensor:
        if v.dim() != len(self.kernel) + 2:
            # torch would take a batch without channels for one image of as many channels, and mix the samples.
            raise ValueError(f"a convolution needs (batch, channels, ...), got a state of shape {tuple(v.shape)}")
        if self.unfolded:
            return self._unfold_and_multiply(v, bias)
        conv: Any = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel) - 1]
        arguments = (v, self.weights[0], bias, self.stride, self.padding, self.dilation, self.groups)
        if v.is_cuda and v.dtype == torch.float64:
            # cuDNN may choose transforms that break the rounding bound; the native path is a plain product.
            with torch.backends.cudnn.flags(enabled=False):
                return conv(*arguments)
        return conv(*arguments)

    def _pads(self) -> list[tuple[int, int]]:
        if self.padding == "valid":
            return [(0, 0)] * len(self.kernel)
        if isinstance(self.padding, str):
            totals = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
            return [(t // 2, t - t // 2) for t in totals]
        return [(p, p) for p in self.padding]

    def _unfold_and_multiply(self, v: Tensor, bias: Tensor | None) -> Tensor:
        weight = self.weights[0].flatten(1)
        v = F.pad(v, [p for pair in reversed(self._pads()) for p in pair])
        sizes = [
            (n - d * (k - 1) - 1) // s + 1
            for n, k, s, d in zip(v.shape[2:], self.kernel, self.stride, self.dilation, strict=True)
        ]
        out = v.new_empty(len(v), len(weight), *sizes)
        pixels = math.prod(sizes)
        chunk = max(1, _PATCH_BYTES // max(1, weight.shape[1] * pixels * v.element_size()))
        space = v.stride()[2:]
        strides = (
            *v.stride()[:2],
            *(s * d for s, d in zip(space, self.dilation, strict=True)),
            *(s * t for s, t in zip(space, self.stride, strict=True)),
        )
        for start in range(0, len(v), chunk):
            part = v[start : start + chunk]
            # Every pixel's receptive field as a view; reshape copies it into one matrix per sample.
            fields = part.as_strided((*part.shape[:2], *self.kernel, *sizes), strides, part.storage_offset())
            columns = fields.reshape(len(part), weight.shape[1], pixels)
            torch.matmul(weight, columns, out=out[start : start + chunk].flatten(2))
        return out if bias is None else out + bias.reshape(-1, *[1] * len(sizes))

    def transpose(self, g: Tensor, shape: torch.Size) -> Tensor:
        if isinstance(self.padding, str):
            return torch.func.vjp(self.linear, g.new_zeros((g.shape[0], *shape[1:])))[1](g)[0]
        transposed: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(self.kernel) - 1]
        extra = [
            n + 2 * p - d * (k - 1) - 1 - (m - 1) * s
            for n, m, k, s, p, d in zip(
                shape[2:], g.shape[2:], self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        ]
        with torch.backends.cudnn.flags(enabled=not (g.is_cuda and g.dtype == torch.float64)):
            return transposed(g, self.weights[0], None, self.stride, self.padding, extra, self.groups, self.dilation)

    def largest_row(self) -> Tensor:
        return _largest(self.weights[0].flatten(1).sum(1))

    def gradients(self, v: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        if isinstance(self.padding, str):
            return super().gradients(v, y)
        gradient: Any = (torch.nn.grad.conv1d_weight, torch.nn.grad.conv2d_weight, torch.nn.grad.conv3d_weight)[
            len(self.kernel) - 1
        ]
        of_weight = gradient(v, self.weights[0].shape, y, self.stride, self.padding, self.dilation, self.groups)
        return (of_weight, *self._bias_gradient(y))

    def plainly(self) -> AffineStep | None:
        if super().plainly() is None:
            return None
        weight = self.weights[0]
        if weight.device.type == "cpu" and self.groups == 1:
            return replace(self, unfolded=True)
        return self if weight.dtype == torch.float64 else None

    def keeps_shape(self) -> bool:
        """Whether the kernel is odd, padded by half of it with zeros, of stride 1, undilated and in one group."""
        same = not isinstance(self.padding, str) and all(
            k % 2 == 1 and p == (k - 1) // 2 for k, p in zip(self.kernel, self.padding, strict=True)
        )
        return same and set(self.stride) == {1} and set(self.dilation) == {1} and self.groups == 1

    def channels(self) -> tuple[AffineStep, ...]:
        if self.groups != 1 or set(self.stride) != {1}:
            raise Refusal("the spectral radius of a grouped or strided convolution is not bounded here")
        return (DenseStep((self.exact().weights[0].flatten(2).sum(2),), None),)

    def positive(self) -> bool:
        # The tap at `padding` meets an input pixel at every output pixel, the border included.
        if isinstance(self.padding, str) or set(self.stride) != {1} or set(self.dilation) != {1}:
            return False
        if any(2 * p > k - 1 for p, k in zip(self.padding, self.kernel, strict=True)):
            return False
        at: tuple[Any, ...] = (slice(None), slice(None), *self.padding)
        tap = self.weights[0][at]
        return bool((tap.amax(1) > 0).all()) if tap.numel() else False


@dataclass(frozen=True)
class MonotoneConvolutionStep(AffineStep):
    """A = c I - K^T K + S with circular convolutions, `weights` their kernels (K, S), of which S is antisymmetric.

    Attributes:
        identity: c, exact in the precision of the weights, so that every precision multiplies with the same number.
        unfolded: whether the convolutions are evaluated as plain matrix products.
        absolute: whether it stands for |c| I + |K|^T |K| + |S| instead, which bounds |A|.
    """

    identity: float
    unfolded: bool = False
    absolute: bool = False

    @property
    def terms(self) -> int:
        k, skew = self.weights
        return k[:1].numel() + k[:, :1].numel() + skew[:1].numel() + 8

    def sizes(self) -> dict[str, tuple[int, int]]:
        k, skew = self.weights
        features = k.shape[1] if k.dim() == 4 else -1
        odd = all(n % 2 == 1 for w in self.weights for n in w.shape[2:])
        if k.dim() != 4 or skew.shape[:2] != (features, features) or skew.dim() != 4 or not odd:
            raise Refusal(f"kernels of shapes {tuple(k.shape)} and {tuple(skew.shape)} are not those of this form")
        return {"channels": (features, features), "dimensions": (4, 4)}

    def apply(self, v: Tensor, bias: Tensor | None) -> Tensor:
        return self._apply(v, 1)

    def transpose(self, g: Tensor, shape: torch.Size) -> Tensor:
        return self._apply(g, -1)

    def _apply(self, v: Tensor, sign: int) -> Tensor:
        k, skew = self.weights
        symmetric = self._convolve(self._convolve(v, k), transposed_kernel(k))
        if self.absolute:
            return abs(self.identity) * v + symmetric + self._convolve(v, skew)
        return self.identity * v - symmetric + sign * self._convolve(v, skew)

    def _convolve(self, v: Tensor, kernel: Tensor) -> Tensor:
        step = ConvolutionStep((kernel,), None, (1, 1), (0, 0), (1, 1), 1, self.unfolded)
        return step.apply(wrap(v, kernel), None)

    def magnitude(self) -> AffineStep:
        return replace(self, weights=tuple(w.abs() for w in self.weights), absolute=True)

    @property
    def signs(self) -> None:
        return None

    def positive(self) -> bool:
        return False

    def underflow(self, dtype: torch.dtype) -> Tensor | float:
        # What K v loses passes through K^T.
        back = _largest(self.weights[0].detach().double().abs().sum((0, 2, 3)))
        return super().underflow(dtype) * (1 + 2 * back)

    def largest_row(self) -> Tensor:
        k, skew = (w.flatten(2).sum(2) for w in self.weights)
        ones = k.new_ones(k.shape[1])
        return _largest(k.t() @ (k @ ones) + skew @ ones) + abs(self.identity) + self.underflow(torch.float64)

    def margin(self) -> float:
        """v^T (I - A) v = (1 - c) |v|^2 + |K v|^2 - v^T S v, and the last is 0 for an S that is antisymmetric."""
        k, skew = (w.detach() for w in self.weights)
        finite = math.isfinite(self.identity) and bool(torch.isfinite(k).all() & torch.isfinite(skew).all())
        if not finite or not torch.equal(skew, -transposed_kernel(skew)):
            return -math.inf
        return math.nextafter(1 - self.identity, -math.inf)

    def norm(self) -> float:
        # The bound of |A| is symmetric: its largest row sum bounds its norm.
        return float(self.row_sums())

    def frequencies(self, rows: int, columns: int) -> Tensor:
        """A on every Fourier mode of real (rows, columns) images: (rows, columns // 2 + 1, features, features)."""
        k, skew = (self._on_modes(w, rows, columns) for w in self.weights)
        return self.identity * torch.eye(k.shape[-1], dtype=k.dtype, device=k.device) - k.mH @ k + skew

    @staticmethod
    def _on_modes(kernel: Tensor, rows: int, columns: int) -> Tensor:
        height, width = kernel.shape[2:]
        row = (height // 2 - torch.arange(height, device=kernel.device)) % rows
        column = (width // 2 - torch.arange(width, device=kernel.device)) % columns
        # On images smaller than the kernel several taps meet.
        image = kernel.new_zeros(*kernel.shape[:2], rows * columns)
        image.index_add_(2, (row[:, None] * columns + column).flatten(), kernel.flatten(2))
        return torch.fft.rfft2(image.view(*kernel.shape[:2], rows, columns)).permute(2, 3, 0, 1)

    def plainly(self) -> AffineStep | None:
        if super().plainly() is None:
            return None
        if self.weights[0].device.type == "cpu":
            return replace(self, unfolded=True)
        return self if self.weights[0].dtype == torch.float64 else None


@dataclass(frozen=True)
class MaskStep(AffineStep):
    """A is diagonal; `weights` holds the diagonal of every sample, (batch, ...).

    Attributes:
        scale: what the entries of every mask that may be drawn are at most.
    """

    scale: float

    @property
    def terms(self) -> int:
        return 1

    def apply(self, v: Tensor, bias: Tensor | None) -> Tensor:
        (mask,) = self.weights
        if v.shape != mask.shape:
            # Broadcasting would give one sample the mask of another.
            raise ValueError(f"a mask drawn for states of shape {tuple(mask.shape)} met one of {tuple(v.shape)}")
        return v * mask

    def transpose(self, g: Tensor, shape: torch.Size) -> Tensor:
        return self.apply(g, None)

    def sizes(self) -> dict[str, tuple[int, int]]:
        return {}

    def largest_row(self) -> Tensor:
        # Of every mask, not only of the one that was drawn.
        return _largest(self.weights[0]).double().clamp_min(self.scale)

    def channels(self) -> tuple[AffineStep, ...]:
        raise Refusal("the spectral radius under dropout is not bounded here")

    @property
    def per_sample(self) -> bool:
        return True

    def select(self, index: Tensor) -> AffineStep:
        return replace(self, weights=(self.weights[0][index],))

    def positive(self) -> bool:
        return False


@dataclass(frozen=True)
class PoolStep(AffineStep):
    """A averages over windows, with the arguments of torch's average pooling."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    ceil_mode: bool
    count_include_pad: bool

    @property
    def terms(self) -> int:
        return math.prod(self.kernel)

    def sizes(self) -> dict[str, tuple[int, int]]:
        return {"dimensions": (len(self.kernel) + 2, len(self.kernel) + 2)}

    def growth(self) -> tuple[int, ...]:
        if set(self.stride) != {1}:
            raise Refusal(f"a pooling of stride {self.stride} does not keep the size of every image")
        return tuple(2 * p - (k - 1) for p, k in zip(self.padding, self.kernel, strict=True))

    def apply(self, v: Tensor, bias: Tensor | None) -> Tensor:
        pool: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(self.kernel) - 1]
        return pool(v, self.kernel, self.stride, self.padding, self.ceil_mode, self.count_include_pad)

    def transpose(self, g: Tensor, shape: torch.Size) -> Tensor:
        return torch.func.vjp(self.linear, g.new_zeros((g.shape[0], *shape[1:])))[1](g)[0]

    def gradients(self, v: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return ()

    def largest_row(self) -> Tensor:
        return torch.ones((), dtype=torch.float64)

    def channels(self) -> tuple[AffineStep, ...]:
        # The identity on constants, or less at a border that counts.
        return ()

    def positive(self) -> bool:
        # torch lets no window lie in the padding alone.
        return True


def _largest(sums: Tensor) -> Tensor:
    return sums.detach().max() if sums.numel() else sums.detach().new_zeros(())


# -------------------------------------------------------------------------------------------------------------- modules


def _linear(module: nn.Module) -> AffineStep:
    assert isinstance(module, nn.Linear)
    return DenseStep((module.weight,), module.bias)


def _sparse(module: nn.Module) -> AffineStep:
    assert isinstance(module, SparseLinear)
    return SparseStep((module.weight,), module.bias, module.pattern)


def _diagonal_low_rank(module: nn.Module) -> AffineStep:
    assert isinstance(module, DiagonalLowRank)
    return DiagonalLowRankStep((module.diagonal, module.left, module.right), module.bias)


def _convolution(module: nn.Module) -> AffineStep:
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    if module.padding_mode != "zeros":
        raise Refusal(f"padding_mode={module.padding_mode!r} is not verified; use 'zeros'")
    dims = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[parametrize.type_before_parametrizations(module)]  # type: ignore[index]
    padding = module.padding if isinstance(module.padding, str) else _sides(module.padding, dims)
    stride, dilation = _sides(module.stride, dims), _sides(module.dilation, dims)
    return ConvolutionStep((module.weight,), module.bias, stride, padding, dilation, module.groups)


def _monotone_convolution(module: nn.Module) -> AffineStep:
    assert isinstance(module, MonotoneConvolution2d)
    b = module.b
    square = b.dim() == 4 and b.shape[0] == b.shape[1] and b.layout == torch.strided
    working = torch.float64 if module.a.dtype == torch.float64 else torch.float32
    identity = float(torch.tensor(1 - module.margin, dtype=working))
    # b(i, j) - b(j, i) and b(j, i) - b(i, j) round alike: antisymmetric in any precision.
    return MonotoneConvolutionStep((module.a, b - transposed_kernel(b) if square else b), None, identity)


def _average_pool(module: nn.Module) -> AffineStep:
    assert isinstance(module, nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d)
    if getattr(module, "divisor_override", None) is not None:
        raise Refusal("average pooling with divisor_override is not verified")
    dims = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}[type(module)]
    kernel, stride, padding = (_sides(s, dims) for s in (module.kernel_size, module.stride, module.padding))
    return PoolStep((), None, kernel, stride, padding, module.ceil_mode, module.count_include_pad)


def _sides(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """One number for each side, as torch reads such arguments."""
    sides = (value,) * dims if isinstance(value, int) else tuple(value)
    sides = sides * dims if len(sides) == 1 else sides
    if len(sides) != dims:
        raise Refusal(f"{value} does not name one number for each of {dims} dimensions")
    return sides


AFFINE_MODULES: dict[type[nn.Module], Callable[[nn.Module], AffineStep]] = {
    nn.Linear: _linear,
    SparseLinear: _sparse,
    DiagonalLowRank: _diagonal_low_rank,
    MonotoneConvolution2d: _monotone_convolution,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.AvgPool1d: _average_pool,
    nn.AvgPool2d: _average_pool,
    nn.AvgPool3d: _average_pool,
}


def affine_step(module: nn.Module) -> AffineStep:
    """A Linear, SparseLinear, DiagonalLowRank, convolution or AvgPool module as a step; its tensors stay attached.

    Raises:
        Refusal: what it computes is not known.
    """
    step = AFFINE_MODULES[parametrize.type_before_parametrizations(module)](module)
    if not torch.compiler.is_compiling():
        step.check_arithmetic()
    return step
