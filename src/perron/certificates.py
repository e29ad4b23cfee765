"""Certificates: what is proven about a cell's fixed point, derived from its actual weights, or why nothing is.

The rules are those of nonlinear Perron-Frobenius theory for positive, nondecreasing, concave maps (Krasnosel'skii 1964;
Yates 1995; Lemmens & Nussbaum 2012; Gabor, Piotrowski & Cavalcante, ICML 2024): such a map has a fixed point iff the
spectral radius of its asymptotic map is below 1, and then it is unique and Picard iteration reaches it geometrically.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from perron import reading
from perron.affine import AffineStep, Refusal, check_rounding
from perron.cells import ActivationStep, Chain, Inject, InjectStep, NormalizeStep, trace, unknown_step
from perron.contraction import check_nonnegative, degree, gain
from perron.monotone import margin
from perron.rounding import gamma, product_above

__all__ = ["Certificate", "certify", "contracting", "derive", "either", "refused", "spectral_radius_bound"]

# Above what underflow takes from a sum, far below every number that counts.
_LEAST = 1e-300


@dataclass(frozen=True)
class Certificate:
    """What is proven about an equilibrium, for every input the layer accepts.

    Attributes:
        exists: a fixed point exists.
        unique: it is the only one in the nonnegative orthant, or for kinds "bounded gain" and "monotone" at all.
        geometric: Picard iteration, or for "monotone" operator splitting, converges to it geometrically.
        kind: "positive concave", "subhomogeneous", "bounded gain", "monotone", "network" for a whole module, or "none".
        assumptions: what was checked, in words.
        refusal: None, or the reason why nothing is certified.
        rate: an a-priori contraction factor in `metric`, where the theory gives one below 1.
        metric: "Thompson" or "sup norm".
        parts: for a network, the name and the certificate of every equilibrium layer in it.
    """

    exists: bool
    unique: bool
    geometric: bool
    kind: str
    assumptions: tuple[str, ...] = ()
    refusal: str | None = None
    rate: float | None = None
    parts: tuple[tuple[str, Certificate], ...] = ()
    metric: str = "Thompson"

    def __bool__(self) -> bool:
        return self.exists and self.unique and self.geometric

    def __str__(self) -> str:
        if not self:
            lines = [f"not certified ({self.kind}): {self.refusal}"]
        else:
            method = "operator splitting" if self.kind == "monotone" else "Picard"
            lines = [
                f"certified ({self.kind}): the fixed point exists, is unique, and {method} converges geometrically"
            ]
        lines += [f"  checked: {a}" for a in self.assumptions]
        if self.rate is not None:
            lines.append(
                f"  contraction factor in the {self.metric}{' metric' if self.metric == 'Thompson' else ''} at most {self.rate:.4g}"
            )
        for name, part in self.parts:
            lines += [f"{name or 'module'}: " + str(part).replace("\n", "\n  ")]
        return "\n".join(lines)


def refused(reason: str, *, kind: str = "none") -> Certificate:
    """Nothing is certified, for this reason."""
    return Certificate(False, False, False, kind, refusal=reason)


@torch.no_grad()
def spectral_radius_bound(matrix: Tensor, *, iterations: int = 200) -> float:
    """A rigorous upper bound on the spectral radius of a nonnegative square matrix, dense or CSR.

    Collatz-Wielandt: rho(A) <= max_i (A w)_i / w_i for every w > 0. Power iteration only looks for a good w; the bound
    is then one evaluation in float64 with its rounding error added, so it holds however far the iteration got. inf where
    that overflows.

    Raises:
        ValueError: the matrix is not square, or has negative, NaN or infinite entries.

    >>> round(spectral_radius_bound(torch.full((4, 4), 0.125)), 9)
    0.5
    """
    a = matrix.detach().double()
    if a.dim() != 2 or a.shape[0] != a.shape[1]:
        raise ValueError(f"a square matrix is needed, got shape {tuple(matrix.shape)}")
    entries = a.values() if a.layout == torch.sparse_csr else a
    if not bool(((entries >= 0) & torch.isfinite(entries)).all()):
        raise ValueError("the bound holds for finite nonnegative matrices only")
    if not bool((entries > 0).any()):
        return 0.0
    return _radius_above(lambda w: a @ w, a.shape[0], a.shape[0] + 2, a.device, iterations)


def _radius_above(
    image: Callable[[Tensor], Tensor], n: int, roundings: int, device: torch.device, iterations: int = 200
) -> float:
    """At least the spectral radius of the nonnegative w -> A w on n entries, computed with so many roundings in a row.

    For every w > 0 it is at most max_i (A w)_i/w_i; a positive multiple of the identity attains it. The quotient is one
    more rounding. A w needs to be right from 1e-300 on only: no entry of w is below 1e-200.
    """
    w = torch.ones(n, dtype=torch.float64, device=device)
    best = math.inf
    for _ in range(iterations):
        y = image(w) + _LEAST
        ratios = y / w
        low, high = (float(t) for t in torch.aminmax(ratios))
        if not high < math.inf:
            # Overflow.
            break
        best = min(best, high)
        if low >= best * (1 - 1e-12):
            break
        # The shift keeps w positive where the matrix is reducible, and steady where it is periodic.
        w = y + 0.2 * best * w
        w = (w / w.max()).clamp_min(1e-200)
    return best * (1 + 2 * gamma(roundings + 8, torch.float64))


def _asymptotic_radius(chain: Chain) -> float:
    """At least the spectral radius of f_inf(z) = lim f(t z)/t, which is s A_L ... A_1 z with s the product of the slopes.

    On w constant over images and positive, A_k w <= M_k w with M_k = `channels` of the step; so f_inf^j w <= (s M)^j w,
    M = M_L ... M_1, and s M has no smaller radius than f_inf. Convolutions over all of space and matrices attain it.
    """
    slope = product_above(s.activation.asymptotic_slope for s in chain.steps if isinstance(s, ActivationStep))
    if slope == 0:
        return 0.0
    sizes = chain.sizes()
    if "features" in sizes and "dimensions" in sizes:
        raise Refusal("the spectral radius of a cell with linear maps along a side of an image is not bounded here")
    maps = [m for step in chain.affine for m in step.channels()]
    if not maps:
        return slope

    def image(w: Tensor) -> Tensor:
        w = w.unsqueeze(0)
        for step in maps:
            # What underflowed may meet large weights in the next step.
            w = step.linear(w) + step.underflow(torch.float64) + _LEAST
        return w.squeeze(0)

    n = sizes.get("features", sizes.get("channels", 0))
    roundings = sum(s.terms + 3 for s in chain.affine)
    return product_above([slope, _radius_above(image, n, roundings, maps[0].tensors[0].device)])


def _check_nonnegative(chain: Chain) -> None:
    for step in chain.affine:
        check_nonnegative(step)


def _check_positive(chain: Chain, positive_injection: bool) -> None:
    """f must map into the open orthant: with f(0) = 0 in a coordinate, uniqueness can fail."""
    positive = False
    for step in chain.known:
        if isinstance(step, AffineStep):
            bias = step.bias is not None and step.bias.numel() > 0 and bool((step.bias.detach() > 0).all())
            positive = bias or (positive and step.positive())
        elif isinstance(step, InjectStep):
            positive = positive or positive_injection
        elif isinstance(step, ActivationStep):
            positive = positive or step.activation.at_zero > 0
        elif isinstance(step, NormalizeStep):
            raise Refusal("division by a norm is not monotone")
        else:
            raise unknown_step(step)
    if not positive:
        raise Refusal(
            "f(0) > 0 could not be verified: with sigma(0) = 0 the injection must be positive in every coordinate "
            "(injection='softplus'), or use an activation with sigma(0) > 0 such as the sigmoid"
        )


def _a_priori_rate(chain: Chain) -> float | None:
    """The degree, or 1 - min f(0)/sup f, where it does not depend on the input.

    f is concave: f'(z) z <= f(z) - f(0) <= (1 - min f(0)/sup f) f(z) for every z >= 0, which is a degree of f.
    """
    try:
        found = degree(chain)
    except Refusal:
        found = 1.0
    last = chain.last_activation
    if last is not None and last.bounded and last.at_zero > 0:
        # The numbers themselves are powers, rounded.
        found = min(found, 1 - last.at_zero / last.supremum * (1 - 1e-14))
    return found if found < 1 else None


def derive(chain: Chain, *, positive_injection: bool) -> Certificate:
    """The certificate of a chain with nonnegative (`positive_injection`: positive) injections, from its weights."""
    kind = "none"
    try:
        check_rounding()
        chain.sizes()
        if chain.normalizes:
            raise Refusal("division by a norm is not monotone")
        _check_nonnegative(chain)
        kind = "positive concave"
        _check_positive(chain, positive_injection)
        radius = _asymptotic_radius(chain)
        if not radius < 1:
            raise Refusal(
                f"the asymptotic map has spectral radius up to {_near_one(radius)}, not below 1: a fixed point may not exist; "
                "scale the weights down or use a bounded activation"
            )
    except Refusal as refusal:
        return refused(str(refusal), kind=kind)
    names = ", ".join(s.activation.name for s in chain.steps if isinstance(s, ActivationStep)) or "none"
    count = sum(t.numel() for t in chain.tensors)
    return Certificate(
        True,
        True,
        True,
        "positive concave",
        assumptions=(
            f"all {count} weights of the cell are finite and nonnegative",
            f"activations ({names}) are nonnegative, nondecreasing and concave on [0, inf)",
            "f(0) > 0: " + ("the injection is positive" if positive_injection else "sigma(0) > 0 or a positive bias"),
            "the asymptotic map is zero (bounded or sublinear cell)"
            if radius == 0
            else f"the asymptotic map has spectral radius at most {_near_one(radius)} < 1",
        ),
        rate=_a_priori_rate(chain),
    )


def _near_one(factor: float) -> str:
    """In words that tell 1 from what is next to it."""
    if factor == 1 or not abs(factor - 1) < 1e-5:
        return f"{factor:.6g}"
    return f"1 {'+-'[factor < 1]} {abs(factor - 1):.3g}"


def either(concave: Certificate, contraction: Certificate) -> Certificate:
    """The certificate that holds, or the refusal of the theory that came nearest: for nonnegative weights the concave one."""
    if concave or contraction:
        return concave or contraction
    return refused(str((concave if concave.kind == "positive concave" else contraction).refusal))


def contracting(chain: Chain, *, nonnegative_injection: bool = True) -> Certificate:
    """The certificate of a chain that contracts, for all (nonnegative) injections, from its weights.

    "subhomogeneous": nonnegative weights and a degree below 1, so that F contracts in Thompson's metric (Sittoni &
    Tudisco, ICML 2024). "bounded gain": weights of any sign whose absolute row sums, times the largest slopes, stay
    below 1, so that F contracts in the sup norm. "monotone": sigma(W z + b) with I - W strongly monotone (Winston &
    Kolter, NeurIPS 2020). For other signed weights the fixed point need not be unique, and the refusal says so; single
    samples may still be certified, by `perron.contraction`.
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
        checked: tuple[str, ...] = (f"absolute row sums times largest slopes are at most {_near_one(factor)} < 1",)
        return Certificate(True, True, True, "bounded gain", checked, rate=factor, metric="sup norm")
    least = margin(chain)
    if least > 0:
        checked = (
            f"I - W is strongly monotone with margin at least {least:.6g} > 0",
            "the activation is nondecreasing with slopes up to 1",
        )
        return Certificate(True, True, True, "monotone", checked)
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
            f"the degree of the cell is only bounded by {_near_one(mu)}, not below 1; use a larger shift or a power",
            kind="subhomogeneous",
        )
    checked = (
        "all weights of the cell are finite and nonnegative",
        f"F is subhomogeneous of degree at most {_near_one(mu)} < 1, the product of its activations' degrees"
        + (", doubled by the normalisation" if chain.normalizes else ""),
    )
    return Certificate(True, True, True, "subhomogeneous", checked, rate=mu)


def _nearest(factor: float, least: float) -> str:
    """Which number came nearer to a proof for weights of any sign: gain or margin."""
    if -math.inf < least and 1 - least < factor:
        return (
            f"the symmetric part of W has eigenvalues up to {_near_one(1 - least)}, not below 1 "
            "(MonotoneLinear keeps them there)"
        )
    return (
        f"absolute row sums times largest slopes are {_near_one(factor)}, not below 1 "
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
            True, True, True, "network", (f"{len(parts)} equilibrium layers, each certified",), parts=tuple(parts)
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
