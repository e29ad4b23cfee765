"""Reading a cell into steps."""

from __future__ import annotations

from torch import nn

from perron.activations import ACTIVATIONS
from perron.cells import reading
from perron.cells.activation import ActivationStep
from perron.cells.affine_map import AffineMap
from perron.cells.chain import Chain
from perron.cells.dropout import does_nothing
from perron.cells.opaque import Opaque
from perron.cells.refusal import Refusal
from perron.cells.step import Step

__all__ = ["affine_step", "as_map", "trace"]


def affine_step(module: nn.Module) -> AffineMap:
    """A Linear, SparseLinear, DiagonalLowRank, convolution or AvgPool module as a step; its tensors stay attached.

    Raises:
        Refusal: what it computes is not known.
    """
    (found,) = reading.step(module, reading.name_of(module)).affine
    return found


def _steps(module: nn.Module, path: str) -> list[Step]:
    kind = reading.kind(module, path)
    if kind in reading.CONTAINERS:
        return [s for where, child in reading.children(module, path) for s in _steps(child, where)]
    if does_nothing(module, kind, path):
        return []
    if kind in reading.READERS:
        return [reading.step(module, path)]
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
