"""Average pooling as a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perron.cells import reading
from perron.cells.affine import AffineStep
from perron.cells.affine_map import AffineMap
from perron.cells.convolution import sides
from perron.cells.refusal import Refusal
from perron.cells.step import known

__all__ = ["PoolStep"]


@known
@dataclass(frozen=True, kw_only=True)
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

    def channels(self) -> tuple[AffineMap, ...]:
        # The identity on constants, or less at a border that counts.
        return ()

    def keeps_positive(self) -> bool:
        # torch lets no window lie in the padding alone.
        return True


@reading.reads(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
def average_pool_step(module: nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d, path: str) -> AffineStep:
    if getattr(module, "divisor_override", None) is not None:
        raise Refusal("average pooling with divisor_override is not verified")
    dims = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}[type(module)]
    kernel, stride, padding = (sides(s, dims) for s in (module.kernel_size, module.stride, module.padding))
    return PoolStep(
        weights=(),
        kernel=kernel,
        stride=stride,
        padding=padding,
        ceil_mode=module.ceil_mode,
        count_include_pad=module.count_include_pad,
    )
