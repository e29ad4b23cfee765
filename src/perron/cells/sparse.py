"""Sparse matrices (CSR), as a module and as a step.

The weights are ordinary parameters, so `perron.constraints.nonnegative` and optimisers treat them as any other.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from perron._numerics.transforms import VmapInfo, fold_vmap, refuse_nested_forward_mode
from perron.cells import reading
from perron.cells.affine import AffineStep
from perron.cells.affine_map import AffineMap, largest
from perron.cells.refusal import Refusal
from perron.cells.step import known

__all__ = ["SparseLinear", "SparsePattern", "SparseStep", "sparse_product"]


with warnings.catch_warnings():
    # torch announces once per process that CSR tensors are in beta; every use here is tested.
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), (1, 1))


@dataclass(frozen=True)
class SparsePattern:
    """Where a CSR matrix has entries, and where its transpose has them.

    Attributes:
        rows, columns: (rows + 1,) row pointers and (nnz,) column indices.
        transposed_rows, transposed_columns: the same of the transpose.
        order: (nnz,) `values[order]` are the values of the transpose.
        shape: (rows, columns).
        transposed: whether this is the view of the transpose.
    """

    rows: Tensor
    columns: Tensor
    transposed_rows: Tensor
    transposed_columns: Tensor
    order: Tensor
    shape: tuple[int, int]
    transposed: bool = False

    @classmethod
    def of(cls, rows: Tensor, columns: Tensor, shape: tuple[int, int]) -> SparsePattern:
        """The pattern of entries (rows[k], columns[k]), int64, sorted by row and then column, each once."""
        order = (columns * shape[0] + rows).argsort()
        return cls(
            _pointers(rows, shape[0]),
            columns,
            _pointers(columns[order], shape[1]),
            rows[order],
            order,
            shape,
        )

    @property
    def longest_row(self) -> int:
        """Entries in the fullest row of this view."""
        rows = self.transposed_rows if self.transposed else self.rows
        return int(rows.diff().max()) if len(rows) > 1 else 0

    def fault(self) -> str | None:
        """What is wrong with these indices, or None: entries sorted and in range, and the transpose that of this matrix."""
        rows, columns = self.shape
        fault = _fault(self.rows, self.columns, self.shape)
        if fault is not None:
            return fault
        count = len(self.columns)
        arrays = (self.transposed_rows, self.transposed_columns, self.order)
        if any(t.dtype != torch.long or t.device != self.rows.device for t in arrays):
            return "the arrays of the transpose are not int64 on the device of the others"
        if [len(t) for t in arrays] != [columns + 1, count, count]:
            return "the arrays of the transpose are too long or too short"
        in_range = bool(((self.order >= 0) & (self.order < count)).all())
        if not in_range or not bool((torch.bincount(self.order, minlength=count) == 1).all()):
            return "the order of the transpose is no permutation"
        of_row, of_column = self.row_of_entry()[self.order], self.columns[self.order]
        same = torch.equal(of_row, self.transposed_columns)
        same &= torch.equal(_pointers(of_column, columns), self.transposed_rows)
        if not same or not bool(((of_column * rows + of_row).diff() > 0).all()):
            return "the transpose is that of another pattern"
        return None

    def t(self) -> SparsePattern:
        return SparsePattern(
            self.rows,
            self.columns,
            self.transposed_rows,
            self.transposed_columns,
            self.order,
            self.shape,
            not self.transposed,
        )

    def matrix(self, values: Tensor) -> Tensor:
        """The CSR tensor with these values, given in the order of the untransposed matrix."""
        if self.transposed:
            parts = (self.transposed_rows, self.transposed_columns, values[self.order])
            return torch.sparse_csr_tensor(*parts, self.shape[::-1], check_invariants=False)
        return torch.sparse_csr_tensor(self.rows, self.columns, values, self.shape, check_invariants=False)

    def row_of_entry(self) -> Tensor:
        return torch.repeat_interleave(self.rows.diff())


class _Product(torch.autograd.Function):
    """v -> v W^T for a sparse W with the given values; differentiable any number of times."""

    @staticmethod
    def forward(pattern: SparsePattern, values: Tensor, v: Tensor) -> Tensor:
        # Sparse libraries have no products in half precision.
        dtype = torch.promote_types(v.dtype, torch.float32)
        return (pattern.matrix(values.to(dtype)) @ v.to(dtype).t()).t().contiguous().to(v.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.pattern, values, v = inputs
        ctx.save_for_backward(values, v)
        ctx.save_for_forward(values, v)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        values, v = ctx.saved_tensors
        of_values = _Sampled.apply(ctx.pattern, grad, v) if ctx.needs_input_grad[1] else None
        of_v = _Product.apply(ctx.pattern.t(), values, grad) if ctx.needs_input_grad[2] else None
        return None, of_values, of_v

    @staticmethod
    def jvp(ctx, _, values_tangent, v_tangent):  # type: ignore[no-untyped-def]
        values, v = ctx.saved_tensors
        parts = []
        if values_tangent is not None:
            parts.append(_Product.apply(ctx.pattern, values_tangent, v))
        if v_tangent is not None:
            parts.append(_Product.apply(ctx.pattern, values, v_tangent))
        return sum(parts[1:], parts[0])

    @staticmethod
    def vmap(info: VmapInfo, in_dims, pattern, values, v):  # type: ignore[no-untyped-def]
        return fold_vmap(lambda t, x: _Product.apply(pattern, t, x), info, in_dims[1:], (values, v), shared=(0,))


class _Sampled(torch.autograd.Function):
    """(y, v) -> sum over the batch of y_r v_c at the entries (r, c) of the pattern: the gradient of the values."""

    @staticmethod
    def forward(pattern: SparsePattern, y: Tensor, v: Tensor) -> Tensor:
        if pattern.transposed:
            y, v = v, y
        rows, columns = pattern.row_of_entry(), pattern.columns
        found = y.new_zeros(len(columns))
        # One sample at a time: the batch would need a (batch, nnz) tensor.
        for sample in range(len(y)):
            found += y[sample][rows] * v[sample][columns]
        return found

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.pattern, y, v = inputs
        ctx.save_for_backward(y, v)
        ctx.save_for_forward(y, v)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        y, v = ctx.saved_tensors
        return None, _Product.apply(ctx.pattern, grad, v), _Product.apply(ctx.pattern.t(), grad, y)

    @staticmethod
    def jvp(ctx, _, y_tangent, v_tangent):  # type: ignore[no-untyped-def]
        y, v = ctx.saved_tensors
        parts = []
        if y_tangent is not None:
            parts.append(_Sampled.apply(ctx.pattern, y_tangent, v))
        if v_tangent is not None:
            parts.append(_Sampled.apply(ctx.pattern, y, v_tangent))
        return sum(parts[1:], parts[0])

    @staticmethod
    def vmap(info: VmapInfo, in_dims, pattern, y, v):  # type: ignore[no-untyped-def]
        return fold_vmap(lambda a, b: _Sampled.apply(pattern, a, b), info, in_dims[1:], (y, v), shared=(0, 1))


def sparse_product(pattern: SparsePattern, values: Tensor, v: Tensor) -> Tensor:
    """v W^T, (..., columns) -> (..., rows)."""
    refuse_nested_forward_mode()
    if v.dim() == 2:
        return _Product.apply(pattern, values, v)
    return _Product.apply(pattern, values, v.flatten(0, -2)).unflatten(0, v.shape[:-1])


class SparseLinear(nn.Module):
    """y = x W^T (+ bias) with a sparse W whose pattern is fixed; only the entries are parameters.

    Args:
        edges: (2, nnz) integer tensor of (row, column) pairs, each at most once: entry W[row, column].
        out_features, in_features: shape of W; `in_features` defaults to `out_features`.
        bias: whether to add one.

    Shape:
        input (batch, in_features), output (batch, out_features); `weight` (nnz,), in the order of the rows of W.

    Raises:
        ValueError: indices of a wrong shape or type, out of range, or twice the same entry.

    >>> layer = SparseLinear(torch.tensor([[0, 1, 1], [1, 0, 1]]), 2)
    >>> layer(torch.ones(3, 2)).shape
    torch.Size([3, 2])
    """

    def __init__(
        self,
        edges: Tensor,
        out_features: int,
        in_features: int | None = None,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_features = out_features if in_features is None else in_features
        if edges.dim() != 2 or edges.shape[0] != 2 or edges.is_floating_point():
            raise ValueError(f"edges must be an integer tensor (2, nnz), got {edges.dtype} {tuple(edges.shape)}")
        edges = edges.to(device=device, dtype=torch.long)
        limit = torch.tensor([[out_features], [in_features]], device=edges.device)
        if edges.numel() and bool(((edges < 0) | (edges >= limit)).any()):
            raise ValueError(f"edges must lie in a {out_features} x {in_features} matrix, got up to {edges.amax(1)}")
        key, _ = (edges[0] * in_features + edges[1]).sort()
        if bool((key.diff() == 0).any()):
            raise ValueError("an entry is named twice in edges; coalesce them first")
        rows, columns = key // max(in_features, 1), key % max(in_features, 1)
        pattern = SparsePattern.of(rows, columns, (out_features, in_features))
        self.out_features, self.in_features = out_features, in_features
        for name in _BUFFERS:
            self.register_buffer(name, None)
        self._set_pattern(pattern)
        self.weight = nn.Parameter(torch.empty(len(columns), device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def _set_pattern(self, pattern: SparsePattern) -> None:
        for name, attribute in _BUFFERS.items():
            setattr(self, name, getattr(pattern, attribute))

    def _load_from_state_dict(self, *arguments: Any) -> None:
        """As usual, after which the transpose is made anew: that of a file may belong to another pattern."""
        super()._load_from_state_dict(*arguments)
        rows, columns, shape = self.row_pointers, self.columns, (self.out_features, self.in_features)
        assert isinstance(rows, Tensor)
        assert isinstance(columns, Tensor)
        if rows.is_meta:
            return
        fault = _fault(rows, columns, shape)
        if fault is None:
            self._set_pattern(SparsePattern.of(torch.repeat_interleave(rows.diff()), columns, shape))
        else:
            arguments[-1].append(f"the pattern of a SparseLinear is broken: {fault}")

    def reset_parameters(self) -> None:
        """Uniform as `nn.Linear`, with the mean number of entries in a row as fan-in."""
        bound = 1 / math.sqrt(max(1.0, self.weight.numel() / max(1, self.out_features)))
        with torch.no_grad():
            self.weight.copy_(torch.empty_like(self.weight).uniform_(-bound, bound))
            if self.bias is not None:
                self.bias.uniform_(-bound, bound)

    @property
    def pattern(self) -> SparsePattern:
        return SparsePattern(
            self.row_pointers,  # type: ignore[arg-type]
            self.columns,  # type: ignore[arg-type]
            self.transposed_row_pointers,  # type: ignore[arg-type]
            self.transposed_columns,  # type: ignore[arg-type]
            self.order,  # type: ignore[arg-type]
            (self.out_features, self.in_features),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = sparse_product(self.pattern, self.weight, x)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, nnz={self.weight.numel()}, bias={self.bias is not None}"


_BUFFERS = {
    "row_pointers": "rows",
    "columns": "columns",
    "transposed_row_pointers": "transposed_rows",
    "transposed_columns": "transposed_columns",
    "order": "order",
}


def _fault(pointers: Tensor, columns: Tensor, shape: tuple[int, int]) -> str | None:
    """What is wrong with the row pointers and the columns of a CSR matrix, or None."""
    if pointers.dtype != torch.long or columns.dtype != torch.long or pointers.device != columns.device:
        return "row pointers and columns are not int64 on one device"
    if pointers.shape != (shape[0] + 1,) or columns.dim() != 1:
        return f"row pointers {tuple(pointers.shape)} and columns {tuple(columns.shape)} for a matrix {shape}"
    if int(pointers[0]) != 0 or int(pointers[-1]) != len(columns) or not bool((pointers.diff() >= 0).all()):
        return f"the row pointers do not rise from 0 to {len(columns)}"
    if not bool(((columns >= 0) & (columns < shape[1])).all()):
        return f"columns out of range for a matrix {shape}"
    if not bool(((torch.repeat_interleave(pointers.diff()) * shape[1] + columns).diff() > 0).all()):
        return "the entries of a row are not sorted, or named twice"
    return None


def _pointers(sorted_rows: Tensor, count: int) -> Tensor:
    return torch.cat([sorted_rows.new_zeros(1), torch.bincount(sorted_rows, minlength=count).cumsum(0)])


@known
@dataclass(frozen=True, kw_only=True)
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
        return largest(self._rows(self.weights[0]))

    def _rows(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.pattern.shape[0]).index_add_(0, self.pattern.row_of_entry(), values)

    def channels(self) -> tuple[AffineMap, ...]:
        return (replace(self.exact(), bias=None),)

    def keeps_positive(self) -> bool:
        return bool((self._rows((self.weights[0] > 0).double()) > 0).all())


@reading.reads(SparseLinear)
def sparse_step(module: SparseLinear, path: str) -> AffineStep:
    return SparseStep(weights=(module.weight,), bias=module.bias, pattern=module.pattern)
