"""Circular convolutions whose symmetric part is bounded by construction, as a module and as a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from perron.cells import reading
from perron.cells.affine import AffineStep
from perron.cells.affine_map import largest
from perron.cells.convolution import ConvolutionStep
from perron.cells.refusal import Refusal
from perron.cells.step import known

__all__ = ["MonotoneConvolution2d", "MonotoneConvolutionStep", "transposed_kernel", "wrap"]


def transposed_kernel(kernel: Tensor) -> Tensor:
    """The kernel of A^T, where A is the circular convolution with `kernel`, (out, in, height, width), both odd."""
    return kernel.transpose(0, 1).flip(2, 3)


def wrap(v: Tensor, kernel: Tensor) -> Tensor:
    """A (batch, channels, height, width) tensor, padded circularly so that a convolution keeps its size."""
    rows, columns = (k // 2 for k in kernel.shape[2:])
    return F.pad(v, (columns, columns, rows, rows), mode="circular")


class MonotoneConvolution2d(nn.Module):
    """W v = (1 - m) v - A^T A v + B v - B^T v with circular convolutions A and B: I - W has the margin m for all of them.

    Source: Winston, Kolter, "Monotone operator equilibrium networks", NeurIPS 2020 (arXiv 2006.08591), section 4.

    Args:
        features: channels of input and output.
        kernel_size: of A and B; odd.
        margin: m, positive and finite.

    Shape:
        input and output (batch, features, height, width), each side at least (kernel_size - 1)/2; `a` and `b` (features,
        features, kernel_size, kernel_size).

    Raises:
        ValueError: kernel_size is even or not positive, or the margin is out of range.

    >>> MonotoneConvolution2d(4, 3)(torch.randn(2, 4, 5, 5)).shape
    torch.Size([2, 4, 5, 5])
    """

    def __init__(
        self,
        features: int,
        kernel_size: int = 3,
        *,
        margin: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive, so that the size is kept, got {kernel_size}")
        if not 0 < margin < float("inf"):
            raise ValueError(f"margin must be positive and finite, got {margin}")
        self.features, self.kernel_size, self.margin = features, kernel_size, margin
        shape = (features, features, kernel_size, kernel_size)
        self.a = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.b = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A and B uniform as the weights of nn.Conv2d."""
        bound = max(self.a[:1].numel(), 1) ** -0.5
        for kernel in (self.a, self.b):
            kernel.uniform_(-bound, bound)

    def forward(self, v: Tensor) -> Tensor:
        image = F.conv2d(wrap(v, self.a), self.a)
        skew = self.b - transposed_kernel(self.b)
        symmetric = F.conv2d(wrap(image, self.a), transposed_kernel(self.a))
        return (1 - self.margin) * v - symmetric + F.conv2d(wrap(v, skew), skew)

    def extra_repr(self) -> str:
        return f"{self.features}, kernel_size={self.kernel_size}, margin={self.margin}"


@known
@dataclass(frozen=True, kw_only=True)
class MonotoneConvolutionStep(AffineStep):
    """A = c I - K^T K + S with circular convolutions, `weights` their kernels (K, S), of which S is antisymmetric.

    Attributes:
        identity: c, exact in the precision of the weights, so that every precision multiplies with the same number.
        unfolded: whether the convolutions are evaluated as matrix products.
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
        step = ConvolutionStep(
            weights=(kernel,), stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, unfolded=self.unfolded
        )
        return step.apply(wrap(v, kernel), None)

    def magnitude(self) -> Self:
        return replace(self, weights=tuple(w.abs() for w in self.weights), absolute=True)

    @property
    def signs(self) -> None:
        return None

    def keeps_positive(self) -> bool:
        return False

    def underflow(self, dtype: torch.dtype) -> Tensor | float:
        # What K v loses passes through K^T.
        back = largest(self.weights[0].detach().double().abs().sum((0, 2, 3)))
        return super().underflow(dtype) * (1 + 2 * back)

    def largest_row(self) -> Tensor:
        k, skew = (w.flatten(2).sum(2) for w in self.weights)
        ones = k.new_ones(k.shape[1])
        return largest(k.t() @ (k @ ones) + skew @ ones) + abs(self.identity) + self.underflow(torch.float64)

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

    def resolvent(self, state: Tensor, *, transposed: bool = False) -> Callable[[Tensor], Tensor]:
        modes = self.frequencies(*state.shape[2:])
        inverse = torch.linalg.inv(2 * torch.eye(modes.shape[-1], dtype=modes.dtype, device=modes.device) - modes)
        inverse = inverse.mH if transposed else inverse

        def solve(r: Tensor) -> Tensor:
            image = torch.einsum("hwij,bjhw->bihw", inverse, torch.fft.rfft2(r))
            return torch.fft.irfft2(image, s=r.shape[2:])

        return solve

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

    def rigorous(self) -> Self | None:
        if super().rigorous() is None:
            return None
        if self.weights[0].device.type == "cpu":
            return replace(self, unfolded=True)
        return self if self.weights[0].dtype == torch.float64 else None


@reading.reads(MonotoneConvolution2d)
def monotone_convolution_step(module: MonotoneConvolution2d, path: str) -> AffineStep:
    b = module.b
    square = b.dim() == 4 and b.shape[0] == b.shape[1] and b.layout == torch.strided
    working = torch.float64 if module.a.dtype == torch.float64 else torch.float32
    identity = float(torch.tensor(1 - module.margin, dtype=working))
    # b(i, j) - b(j, i) and b(j, i) - b(i, j) round alike: antisymmetric in any precision.
    return MonotoneConvolutionStep(weights=(module.a, b - transposed_kernel(b) if square else b), identity=identity)
