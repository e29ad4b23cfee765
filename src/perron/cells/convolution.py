"""Convolutions with zero padding, as steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import torch.nn.grad
from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import Self

from perron.cells import reading
from perron.cells.affine import AffineStep
from perron.cells.affine_map import AffineMap, largest
from perron.cells.dense import DenseStep
from perron.cells.refusal import Refusal
from perron.cells.step import known

__all__ = ["ConvolutionStep", "sides"]

# Bytes of unfolded input that an unfolded convolution works on at a time: about a core's second-level cache.
_PATCH_BYTES = 2**20


@known
@dataclass(frozen=True, kw_only=True)
class ConvolutionStep(AffineStep):
    """A is a convolution with zero padding. `unfolded` evaluates it as a matrix product (CPU, one group)."""

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
            # cuDNN may choose transforms that break the rounding bound; the native path is a sum of products.
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
        return largest(self.weights[0].flatten(1).sum(1))

    def gradients(self, v: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        if isinstance(self.padding, str):
            return super().gradients(v, y)
        gradient: Any = (torch.nn.grad.conv1d_weight, torch.nn.grad.conv2d_weight, torch.nn.grad.conv3d_weight)[
            len(self.kernel) - 1
        ]
        of_weight = gradient(v, self.weights[0].shape, y, self.stride, self.padding, self.dilation, self.groups)
        return (of_weight, *self._bias_gradient(y))

    def rigorous(self) -> Self | None:
        if super().rigorous() is None:
            return None
        weight = self.weights[0]
        if weight.device.type == "cpu" and self.groups == 1:
            return replace(self, unfolded=True)
        return self if weight.dtype == torch.float64 else None

    def kernel_of_same_shape(self) -> Tensor | None:
        same = not isinstance(self.padding, str) and all(
            k % 2 == 1 and p == (k - 1) // 2 for k, p in zip(self.kernel, self.padding, strict=True)
        )
        plain = set(self.stride) == {1} and set(self.dilation) == {1} and self.groups == 1
        return self.weights[0] if same and plain else None

    def channels(self) -> tuple[AffineMap, ...]:
        if self.groups != 1 or set(self.stride) != {1}:
            raise Refusal("the spectral radius of a grouped or strided convolution is not bounded here")
        return (DenseStep(weights=(self.exact().weights[0].flatten(2).sum(2),)),)

    def keeps_positive(self) -> bool:
        # The tap at `padding` meets an input pixel at every output pixel, the border included.
        if isinstance(self.padding, str) or set(self.stride) != {1} or set(self.dilation) != {1}:
            return False
        if any(2 * p > k - 1 for p, k in zip(self.padding, self.kernel, strict=True)):
            return False
        at: tuple[Any, ...] = (slice(None), slice(None), *self.padding)
        tap = self.weights[0][at]
        return bool((tap.amax(1) > 0).all()) if tap.numel() else False


@reading.reads(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution_step(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, path: str) -> AffineStep:
    if module.padding_mode != "zeros":
        raise Refusal(f"padding_mode={module.padding_mode!r} is not verified; use 'zeros'")
    dims = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[parametrize.type_before_parametrizations(module)]  # type: ignore[index]
    padding = module.padding if isinstance(module.padding, str) else sides(module.padding, dims)
    stride, dilation = sides(module.stride, dims), sides(module.dilation, dims)
    return ConvolutionStep(
        weights=(module.weight,),
        bias=module.bias,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=module.groups,
    )


def sides(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """One number for each side, as torch reads such arguments."""
    sides = (value,) * dims if isinstance(value, int) else tuple(value)
    sides = sides * dims if len(sides) == 1 else sides
    if len(sides) != dims:
        raise Refusal(f"{value} does not name one number for each of {dims} dimensions")
    return sides
