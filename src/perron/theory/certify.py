"""Certificates of cells, layers and networks: what is proven, derived from the actual weights, or why nothing is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from perron.cells import reading
from perron.cells.chain import Chain
from perron.cells.injection import Inject
from perron.cells.refusal import Refusal
from perron.cells.step import check_rounding
from perron.cells.trace import trace
from perron.theory.base import Near, Sign, Theory
from perron.theory.certificate import Certificate, refused
from perron.theory.contracting import Contracting
from perron.theory.contraction import BoundedGain
from perron.theory.monotone_operator import MonotoneOperator
from perron.theory.positive_concave import PositiveConcave
from perron.theory.thompson import Thompson

__all__ = ["Derived", "certify", "derive", "pose"]

# In the order in which they are tried.
THEORIES: tuple[Theory, ...] = (PositiveConcave(), Thompson(), BoundedGain(), MonotoneOperator())


@dataclass(frozen=True, kw_only=True)
class Derived:
    """What was derived of a chain.

    Attributes:
        certificate: what is proven, or why nothing is.
        theory: what proves it, or None.
        sign: of the injections that it is proven for.
    """

    certificate: Certificate
    theory: Theory | None
    sign: Sign


@torch.no_grad()
def derive(chain: Chain, signs: Sequence[Sign], theories: Sequence[Theory] | None = None) -> Derived:
    """The first theory that certifies a chain for injections of one of these signs, from its weights.

    For signed weights that nothing certifies the fixed point need not be unique, and the refusal says so; single samples may
    still be proven (`perron.theory.contracting`).

    Args:
        chain: the cell.
        signs: of injections, the one that is wanted most first.
        theories: to try, in this order; None for `THEORIES`.
    """
    refusals: list[tuple[Theory, Refusal]] = []
    try:
        check_rounding()
        chain.sizes()
        _check_finite(chain)
        for theory in THEORIES if theories is None else theories:
            for sign in signs if theory.orthant else (Sign.ANY,):
                try:
                    return Derived(certificate=theory.certify(chain, sign), theory=theory, sign=sign)
                except Refusal as refusal:
                    refusals.append((theory, refusal))
    except Refusal as refusal:
        return Derived(certificate=refused(str(refusal)), theory=None, sign=signs[0])
    return Derived(certificate=_nearest(refusals), theory=None, sign=signs[0])


def _nearest(refusals: Sequence[tuple[Theory, Refusal]]) -> Certificate:
    """The refusal of the theory that came nearest: for nonnegative weights one of theirs, else by the number."""
    of_orthant = [(t, r) for t, r in refusals if t.orthant]
    if near := [(t, r) for t, r in of_orthant if isinstance(r, Near)]:
        theory = near[0][0]
        return refused(str([r for t, r in near if t == theory][-1]))
    numbers = [r for t, r in refusals if isinstance(r, Near)]
    if not numbers:
        return refused(str(refusals[-1][1]))
    reason = (
        f"{of_orthant[-1][1]}, so that two fixed points are possible unless F contracts, and " if of_orthant else ""
    )
    return refused(reason + str(min(numbers, key=lambda r: r.number)))


@torch.no_grad()
def pose(chain: Chain, signs: Sequence[Sign]) -> tuple[Theory, Sign]:
    """The theory by which batches are solved, and the sign that it needs of their injections.

    Raises:
        Refusal: the chain is no map of a space into itself.
    """
    # Refused with the reason, rather than failing in some product.
    chain.sizes()
    for theory in THEORIES:
        for sign in signs if theory.orthant else (Sign.ANY,):
            if not _holds(theory, chain, sign):
                continue
            if not theory.by_sample:
                return theory, sign
            return Contracting(everywhere=not theory.orthant or _holds(BoundedGain(), chain, Sign.ANY)), Sign.ANY
    return Contracting(), Sign.ANY


def _check_finite(chain: Chain) -> None:
    """Raise Refusal where a bias is not finite: then so is the fixed point, if there is one. Row sums tell the same of weights."""
    for step in chain.affine:
        if step.bias is not None and not bool(step.bias.isfinite().all()):
            raise Refusal("the bias of an affine step is not finite")


def _holds(theory: Theory, chain: Chain, sign: Sign) -> bool:
    try:
        check_rounding()
        _check_finite(chain)
        theory.certify(chain, sign)
    except Refusal:
        return False
    return True


def _of_layer(layer: nn.Module, path: str) -> Certificate:
    """The layer's own certificate, if it is a layer of this library and nothing in it was altered."""
    try:
        kind = reading.kind(layer, path)
        if kind not in reading.LAYERS:
            raise reading.unknown(kind, path, "an equilibrium layer of perron.nn")
        reading.read_twice(layer)
    except Refusal as refusal:
        return refused(str(refusal))
    return layer.certificate()  # type: ignore[operator]


def certify(module: nn.Module | Chain) -> Certificate:
    """Derive the certificate of an equilibrium layer, a cell, or a whole network, from its actual weights.

    A cell (an `nn.Sequential` with one `Inject`) is certified for positive injections; a layer for every input it
    accepts; a network if each of its equilibrium layers is. Nothing is assumed: what cannot be verified is refused, and
    the refusal says why.

    Args:
        module: a layer of `perron.nn`, a cell or its `Chain`, or a module that contains such layers. Layers with hooks or
            replaced methods are refused.

    >>> from perron.cells import Activate, Inject
    >>> from perron.constraints import nonnegative
    >>> cell = nn.Sequential(nonnegative(nn.Linear(5, 5, bias=False)), Inject(), Activate("tanh"))
    >>> certify(cell).unique
    True
    >>> print(certify(nn.Sequential(nn.Linear(5, 5), nn.Tanh())).refusal)
    the module contains no equilibrium layer
    """
    if isinstance(module, Chain):
        return _of_chain(module)
    if callable(getattr(module, "certificate", None)):
        return _of_layer(module, reading.name_of(module))
    parts = [
        (name, _of_layer(child, reading.path_of(module, name)))
        for name, child in module.named_modules()
        if isinstance(child, tuple(reading.LAYERS)) or callable(getattr(child, "certificate", None))
    ]
    if parts:
        reasons = [f"{name}: {part.refusal}" for name, part in parts if not part]
        if reasons:
            return replace(refused("; ".join(reasons), kind="network"), parts=tuple(parts))
        return Certificate(
            exists=True,
            unique=True,
            geometric=True,
            kind="network",
            assumptions=(f"{len(parts)} equilibrium layers, each certified",),
            parts=tuple(parts),
        )
    if not any(isinstance(m, Inject) for m in module.modules()):
        return refused("the module contains no equilibrium layer")
    try:
        reading.read_twice(module)
        with torch.no_grad(), reading.without_autocast():
            return _of_chain(trace(module))
    except Refusal as refusal:
        return refused(str(refusal))


def _of_chain(chain: Chain) -> Certificate:
    return derive(chain, (Sign.POSITIVE,)).certificate
