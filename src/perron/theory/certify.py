"""Certificates of cells, layers and networks: what is proven, derived from the actual weights, or why nothing is."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import nn

from perron.cells import reading
from perron.cells.chain import Chain
from perron.cells.injection import Inject
from perron.cells.step import Refusal, check_rounding
from perron.cells.trace import trace
from perron.theory.certificate import Certificate, near_one, refused
from perron.theory.contraction import degree, gain
from perron.theory.monotone_operator import margin
from perron.theory.positive_concave import derive

__all__ = ["certify", "contracting", "either"]


def either(concave: Certificate, contraction: Certificate) -> Certificate:
    """The certificate that holds, or the refusal of the theory that came nearest: for nonnegative weights the concave one."""
    if concave or contraction:
        return concave or contraction
    return refused(str((concave if concave.kind == "positive concave" else contraction).refusal))


def contracting(chain: Chain, *, nonnegative_injection: bool = True) -> Certificate:
    """The certificate of a chain that contracts, for all (nonnegative) injections, from its weights.

    "subhomogeneous": nonnegative weights and a degree below 1, so that F contracts in Thompson's metric (Sittoni &
    Tudisco, ICML 2024). "bounded gain": weights of any sign whose absolute row sums, times the largest slopes, stay
    below 1, so that F contracts in the sup norm. "monotone operator": sigma(W z + b) with I - W strongly monotone (Winston &
    Kolter, NeurIPS 2020). For other signed weights the fixed point need not be unique, and the refusal says so; single
    samples may still be certified, by `perron.theory.contraction`.
    """
    try:
        check_rounding()
        chain.sizes()
    except Refusal as refusal:
        return refused(str(refusal))
    by_degree = _subhomogeneous(chain) if nonnegative_injection else refused("the injection may have any sign")
    if by_degree:
        return by_degree
    factor = gain(chain)
    if factor < 1:
        checked: tuple[str, ...] = (f"absolute row sums times largest slopes are at most {near_one(factor)} < 1",)
        return Certificate(
            exists=True,
            unique=True,
            geometric=True,
            kind="bounded gain",
            assumptions=checked,
            rate=factor,
            metric="sup norm",
        )
    least = margin(chain)
    if least > 0:
        checked = (
            f"I - W is strongly monotone with margin at least {least:.6g} > 0",
            "the activation is nondecreasing with slopes up to 1",
        )
        return Certificate(exists=True, unique=True, geometric=True, kind="monotone operator", assumptions=checked)
    if by_degree.kind == "subhomogeneous":
        return by_degree
    return refused(
        f"{by_degree.refusal}, so that two fixed points are possible unless F contracts, and {_nearest(factor, least)}"
    )


def _subhomogeneous(chain: Chain) -> Certificate:
    """The certificate by the degree; a refusal is of this kind where nothing but the number is in the way."""
    try:
        mu = degree(chain)
    except Refusal as refusal:
        return refused(str(refusal))
    if not mu < 1:
        return refused(
            f"the degree of the cell is only bounded by {near_one(mu)}, not below 1; use a larger shift or a power",
            kind="subhomogeneous",
        )
    checked = (
        "all weights of the cell are finite and nonnegative",
        f"F is subhomogeneous of degree at most {near_one(mu)} < 1, the product of its activations' degrees"
        + (", doubled by the normalisation" if chain.normalizes else ""),
    )
    return Certificate(exists=True, unique=True, geometric=True, kind="subhomogeneous", assumptions=checked, rate=mu)


def _nearest(factor: float, least: float) -> str:
    """Which number came nearer to a proof for weights of any sign: gain or margin."""
    if -math.inf < least and 1 - least < factor:
        return (
            f"the symmetric part of W has eigenvalues up to {near_one(1 - least)}, not below 1 "
            "(MonotoneLinear keeps them there)"
        )
    return (
        f"absolute row sums times largest slopes are {near_one(factor)}, not below 1 "
        "(weights='signed_bounded' keeps them there)"
    )


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
        if callable(getattr(child, "certificate", None))
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
    concave = derive(chain, positive_injection=True)
    return concave if concave else either(concave, contracting(chain))
