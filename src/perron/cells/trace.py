"""Reading a cell into steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import parametrize

from perron.activations import ACTIVATIONS
from perron.cells import reading
from perron.cells.activation import ActivationStep, activation_of
from perron.cells.chain import Chain, Step
from perron.cells.circular import (
    MonotoneConvolution2d,
    monotone_convolution_step,
)
from perron.cells.convolution import convolution_step
from perron.cells.dense import linear_step
from perron.cells.dropout import VariationalDropout, does_nothing
from perron.cells.injection import Inject, InjectStep
from perron.cells.low_rank import DiagonalLowRank, diagonal_low_rank_step
from perron.cells.normalization import Normalize, NormalizeStep
from perron.cells.opaque import Opaque
from perron.cells.pooling import average_pool_step
from perron.cells.sparse import SparseLinear, sparse_step
from perron.cells.step import AffineStep, Refusal, check_arithmetic

__all__ = ["AFFINE_MODULES", "affine_step", "as_map", "trace"]


AFFINE_MODULES: dict[type[nn.Module], Callable[[nn.Module], AffineStep]] = {
    nn.Linear: linear_step,
    SparseLinear: sparse_step,
    DiagonalLowRank: diagonal_low_rank_step,
    MonotoneConvolution2d: monotone_convolution_step,
    nn.Conv1d: convolution_step,
    nn.Conv2d: convolution_step,
    nn.Conv3d: convolution_step,
    nn.AvgPool1d: average_pool_step,
    nn.AvgPool2d: average_pool_step,
    nn.AvgPool3d: average_pool_step,
}


def affine_step(module: nn.Module) -> AffineStep:
    """A Linear, SparseLinear, DiagonalLowRank, convolution or AvgPool module as a step; its tensors stay attached.

    Raises:
        Refusal: what it computes is not known.
    """
    step = AFFINE_MODULES[parametrize.type_before_parametrizations(module)](module)
    if not torch.compiler.is_compiling():
        check_arithmetic(step.tensors)
    return step


def _steps(module: nn.Module, path: str) -> list[Step]:
    kind = reading.kind(module, path)
    if kind in reading.CONTAINERS:
        return [s for where, child in reading.children(module, path) for s in _steps(child, where)]
    if does_nothing(module, kind, path):
        return []
    if kind is Inject:
        return [InjectStep()]
    if kind is Normalize:
        assert isinstance(module, Normalize)
        return [NormalizeStep(p=module.p, dim=module.dim)]
    if kind is VariationalDropout:
        assert isinstance(module, VariationalDropout)
        return [module.step()]
    if (activation := activation_of(module, kind, path)) is not None:
        return [ActivationStep(activation=activation)]
    if kind in AFFINE_MODULES:
        return [affine_step(module)]
    raise reading.unknown(kind, path, "nonnegative, nondecreasing and concave")


def trace(cell: nn.Module, path: str | None = None) -> Chain:
    """Read a cell into a `Chain`; the tensors stay attached to the parameters.

    Args:
        cell: the module.
        path: what the paths of a refusal begin with; default the name of the cell's class.

    Raises:
        Refusal: a step is unknown, or there is not exactly one `Inject`.
    """
    steps = _steps(cell, path or reading.name_of(cell))
    if sum(s.injects for s in steps) != 1:
        raise Refusal("the cell must contain exactly one Inject()")
    if not any(s.elementwise for s in steps):
        # With the identity at the end it has the form sigma(A z + b) that solvers and proofs know.
        steps.append(ActivationStep(activation=ACTIVATIONS["identity"]))
    return Chain(tuple(steps))


def as_map(cell: nn.Module, *, independent: bool = False) -> tuple[Chain | Opaque, str | None]:
    """The cell as a function of tensors, and the reason where its structure could not be read."""
    try:
        return trace(cell), None
    except Refusal as refusal:
        return Opaque.of(cell, independent=independent), str(refusal)
