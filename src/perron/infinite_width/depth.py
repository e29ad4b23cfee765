"""What explicit networks of infinite width become when their depth grows: one of three well-known classifiers.

Inputs have unit norm, activations E phi(xi)^2 = 1, so a layer maps the correlation rho of two inputs to its dual
d(rho) = E phi(u) phi(v), and the tangent kernel is K_l = d(rho_{l-1}) + d'(rho_{l-1}) K_{l-1}, K_0 = rho. With A = E phi,
d(0) = A^2; with A' = E phi', d'(0) = A'^2; with B' = E phi'^2, d'(1) = B'.

- A not 0: correlations of different inputs go to one number, the same for all, and the kernel becomes one number on the
  diagonal and another off it: a majority vote.
- A = 0, A' not 0: then A'^2 < 1 < B' unless phi is linear. Off the diagonal K_l goes like l A'^(2l) psi(rho), on it like
  B'^l, so that each training point speaks for itself with the weight psi, where psi(d(rho)) = A'^2 psi(rho). Near rho = 1
  this grows like |x - x'|^-alpha, alpha = -4 log|A'| / log B': a singular kernel classifier, whose error approaches the
  least possible one as the training set grows if alpha is the dimension of the sphere.
- A = A' = 0: correlations fall faster than any power, the larger they start the slower: the nearest neighbour.

Source: Radhakrishnan, Belkin, Uhler, "Wide and deep neural networks achieve optimality for classification", PNAS 120
(2023), arXiv 2204.14126.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.polynomial import chebyshev
from torch import Tensor

from perron.infinite_width.activations import ScalarFunction, scalar_function
from perron.infinite_width.dual import Dual
from perron.infinite_width.kernels import check_inputs
from perron.infinite_width.moments import gaussian_moments, hermite_coefficients, hermite_polynomials

__all__ = ["Classifier", "DepthLimit", "deep_classify", "deep_ntk", "depth_limit", "optimal_activation"]

Classifier = Literal["majority vote", "singular kernel", "nearest neighbour"]

# A and A' smaller than that are rounding errors of the quadrature.
_ZERO = 1e-12
# psi is interpolated on [-_INNER, _INNER], which the iteration enters soon; its own singularities are at -1 and 1.
_INNER, _NODES = 0.3, 32
# Up to these correlations so many terms of the series are exact.
_SERIES = ((0.05, 16), (0.3, 36), (0.6, 84))
# Entries that go through all layers together, few enough for a processor's cache.
_BLOCK = 2**18
# The largest correlation short of 1.
_LARGEST = 1 - 1e-15
_STEPS = 100_000


class _UnitDual:
    """d and d' of phi/sqrt(E phi^2), entry by entry; phi less its mean if that is asked for."""

    def __init__(self, phi: ScalarFunction, centred: bool, correlation: float = 1.0) -> None:
        one = torch.ones(1, dtype=torch.float64)
        mean = gaussian_moments(phi, one).mean
        self.dual = Dual(phi, one, mean if centred else 0 * one, correlation)
        square = float(self.dual.second)
        if not 0 < square < math.inf or square < _ZERO * float(mean) ** 2:
            raise ValueError(f"E phi^2 of {phi.name} is {square:g}: it must be positive and finite")
        self.square = square
        self.energy = float(self.dual.energy) / square
        # Rounding errors of what vanishes would be all that is left of correlations that have become small.
        found = hermite_coefficients(phi, one, _SERIES[-1][1])[0] / math.sqrt(square)
        if centred:
            found[0] = 0
        self.coefficients = torch.where(found.abs() > _ZERO, found, 0.0)

    def __call__(self, rho: Tensor) -> Tensor:
        return self._entries(self.dual, self.coefficients**2, rho)

    def of_slope(self, rho: Tensor) -> Tensor:
        powers = torch.arange(1, len(self.coefficients), dtype=torch.float64)
        return self._entries(self.dual.of_slope, powers * self.coefficients[1:] ** 2, rho)

    def _entries(self, function: Callable[[Tensor, Tensor], Tensor], series: Tensor, rho: Tensor) -> Tensor:
        """By the first terms of the series where they are enough, by the function elsewhere."""
        size = rho.abs()
        for below, terms in _SERIES:
            if bool((size < below).all()):
                return _horner(series[:terms], rho)
        whole = (
            function(torch.zeros(rho.numel(), dtype=torch.long), rho.reshape(-1, 1)).reshape(rho.shape) / self.square
        )
        below, terms = _SERIES[0]
        return torch.where(size < below, _horner(series[:terms], rho), whole)


def _horner(series: Tensor, x: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    for c in series.flip(0):
        total = torch.addcmul(c, total, x)
    return total


@dataclass(frozen=True, kw_only=True)
class DepthLimit:
    """The classifier that an infinitely deep network with this activation is; see `depth_limit`.

    Attributes:
        phi: the function phi0.
        centred: whether its mean is taken off.
        mean, slope, energy: |A|, |A'| and B', of phi/sqrt(E phi^2) at xi ~ N(0, 1).
        kind: which classifier.
        exponent: alpha of a singular kernel; None for the others.
    """

    phi: ScalarFunction
    centred: bool
    mean: float
    slope: float
    energy: float
    kind: Classifier
    exponent: float | None

    def weight(self, rho: Tensor) -> Tensor:
        """psi, by which a training point at correlation rho speaks for its label; float64.

        Args:
            rho: any shape, within [-1, 1]; 1 is taken for the nearest number below, so that it is finite.

        Raises:
            ValueError: the limit is no singular kernel, or rho is outside.

        Warns:
            UserWarning: the expansion of the dual activation leaves more than 1e-6 at these correlations.
        """
        if self.kind != "singular kernel":
            raise ValueError(f"only a singular kernel has weights, and {self.phi.name} makes a {self.kind}")
        if not bool((rho.abs() <= 1 + 1e-9).all()):
            raise ValueError("correlations must lie in [-1, 1]")
        dual, decay = _UnitDual(self.phi, self.centred), self.slope**2
        dual.dual.warn_of_truncation(_nearest(rho))

        def ratio(x: np.ndarray) -> np.ndarray:
            """psi(rho)/rho for rho = _INNER x, from the iteration itself."""
            rho = torch.from_numpy(_INNER * x)
            small, steps = _towards_zero(dual, rho, decay, 1e-15)
            return (small / rho * decay ** -steps.double()).numpy()

        small, steps = _towards_zero(dual, rho.detach().double().cpu().clamp(-_LARGEST, _LARGEST), decay, _INNER)
        # numpy's annotation asks for a function of a number, its text for one of an array.
        coefficients = chebyshev.chebinterpolate(ratio, _NODES - 1)  # type: ignore[arg-type, type-var]
        inner = chebyshev.chebval((small / _INNER).numpy(), coefficients)
        return (small * torch.as_tensor(inner) * decay ** -steps.double()).to(rho.device)

    def classify(self, X: Tensor, y: Tensor, new: Tensor) -> Tensor:
        """(t,) the label of every new input.

        A majority vote is the limit of kernel regression with a penalty, which only matters where B' < 1.

        Args:
            X: (n, p) training inputs; rows are scaled to unit norm.
            y: (n,) their labels, from 0.
            new: (t, p) inputs.

        Raises:
            ValueError: shapes do not fit, a row is zero or not finite, or a label is negative.
        """
        rho = _correlations(X, new)
        _check_labels(X, y)
        labels, member = y.cpu().unique(return_inverse=True)
        return labels[self._scores(rho, member).argmax(1)].to(new.device)

    def _scores(self, rho: Tensor, member: Tensor) -> Tensor:
        """(t, classes) whose largest entry is of the class of a new input."""
        of_class = torch.nn.functional.one_hot(member).double()
        if self.kind == "majority vote":
            return of_class.sum(0).expand(len(rho), -1)
        if self.kind == "singular kernel":
            return self.weight(rho) @ of_class
        # The point of each class that correlates most speaks for it, against it where the first layer turns its sign.
        first = _UnitDual(self.phi, self.centred, _nearest(rho))(rho)
        parts = [first[:, member == k] for k in range(of_class.shape[1])]
        return torch.cat([part.gather(1, part.abs().argmax(1, keepdim=True)) for part in parts], 1)


def _towards_zero(dual: _UnitDual, rho: Tensor, decay: float, inside: float) -> tuple[Tensor, Tensor]:
    """The first iterate of d with |rho| <= inside, and its number, entry by entry."""
    steps = torch.zeros(rho.shape, dtype=torch.long)
    value = rho.clone()
    for _ in range(_STEPS):
        outside = value.abs() > inside
        if not bool(outside.any()):
            return value, steps
        value[outside] = dual(value[outside])
        steps += outside
    raise ValueError(
        f"the correlations of this activation fall too slowly (by {decay:.6f} a layer): it is nearly linear"
    )


def _nearest(rho: Tensor) -> float:
    """The largest |rho| of different inputs."""
    return float(rho.abs().masked_fill(rho >= 1, 0.0).amax()) if rho.numel() else 0.0


def _correlations(X: Tensor, new: Tensor) -> Tensor:
    """(t, n) of new with training inputs; on the CPU, as all that follows."""
    x, x_new = check_inputs(X), check_inputs(new)
    if x.shape[1] != x_new.shape[1]:
        raise ValueError(f"inputs must have as many features as training inputs, got {x_new.shape[1]} and {x.shape[1]}")
    unit = torch.nn.functional.normalize
    return (unit(x_new) @ unit(x).t()).clamp(-1, 1).cpu()


def _check_labels(X: Tensor, y: Tensor) -> None:
    if y.shape != X.shape[:1] or y.is_floating_point() or bool((y < 0).any()):
        raise ValueError(f"y must be ({len(X)},) whole numbers from 0, got {y.dtype} {tuple(y.shape)}")


def depth_limit(activation: str | ScalarFunction, *, centred: bool = False) -> DepthLimit:
    """Which classifier the tangent kernel of an explicit network is when its depth grows without bound.

    Args:
        activation: a name as in `perron.infinite_width.scalar_function`, or a `ScalarFunction`.
        centred: whether its mean is taken off, as everywhere else in `perron.infinite_width`.

    Raises:
        ValueError: the activation is unknown, constant, or linear, where depth changes nothing.

    >>> depth_limit("relu").kind, depth_limit("relu", centred=True).kind, depth_limit("abs", centred=True).kind
    ('majority vote', 'singular kernel', 'nearest neighbour')
    >>> round(depth_limit("tanh").exponent, 3)
    0.881
    """
    phi = scalar_function(activation)
    unit = _UnitDual(phi, centred, 0.0)
    mean, slope = (float(c) for c in unit.coefficients[:2].abs())
    if 1 - slope**2 - mean**2 < _ZERO:
        raise ValueError(f"{phi.name} is linear: a deep network has the kernel of a shallow one")
    kind: Classifier = "majority vote" if mean else "singular kernel" if slope else "nearest neighbour"
    exponent = -4 * math.log(slope) / math.log(unit.energy) if kind == "singular kernel" else None
    return DepthLimit(
        phi=phi, centred=centred, mean=mean, slope=slope, energy=unit.energy, kind=kind, exponent=exponent
    )


def deep_ntk(rho: Tensor, activation: str | ScalarFunction, depth: int, *, centred: bool = False) -> Tensor:
    """The tangent kernel of a network with this many layers between inputs of unit norm; float64.

    Args:
        rho: any shape, correlations; entries of 1 are an input with itself.
        activation: as in `depth_limit`.
        depth: number of layers, at least 1.
        centred: as in `depth_limit`.

    Raises:
        ValueError: the depth or a correlation is out of range, or the activation is unknown.

    >>> rho = torch.tensor([0.5, 1.0], dtype=torch.float64)
    >>> bool(torch.allclose(deep_ntk(rho, "linear", 3), 4 * rho))
    True
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    if not bool((rho.abs() <= 1 + 1e-9).all()):
        raise ValueError("correlations must lie in [-1, 1]")
    device, rho = rho.device, rho.double().clamp(-1, 1).cpu()
    dual = _UnitDual(scalar_function(activation), centred, _nearest(rho))
    dual.dual.warn_of_truncation(_nearest(rho))
    parts = [_tangent(dual, part, depth) for part in rho.flatten().split(_BLOCK)]
    return torch.cat(parts).reshape(rho.shape).to(device)


def _tangent(dual: _UnitDual, rho: Tensor, depth: int) -> Tensor:
    own = rho >= 1
    alone = torch.ones((), dtype=torch.float64)
    # An input with itself would ask for the whole series in every layer.
    rho = rho.masked_fill(own, 0.0)
    tangent = rho
    for _ in range(depth):
        tangent = dual.of_slope(rho) * tangent
        rho = dual(rho)
        tangent = tangent.add_(rho)
        alone = 1 + dual.energy * alone
    return torch.where(own, alone, tangent)


def deep_classify(
    X: Tensor,
    y: Tensor,
    new: Tensor,
    activation: str | ScalarFunction,
    depth: int,
    *,
    centred: bool = False,
    penalty: float = 1e-6,
) -> Tensor:
    """(t,) labels by kernel regression with `deep_ntk`: what `DepthLimit.classify` is the limit of.

    Args:
        X, y, new: as for `DepthLimit.classify`.
        activation, depth, centred: as for `deep_ntk`.
        penalty: of the regression, relative to the diagonal of the kernel.

    Raises:
        ValueError: as for those; or the kernel of a new input underflows: the network is deeper than float64 can tell.
    """
    rho, own = _correlations(X, new), _correlations(X, X)
    _check_labels(X, y)
    own.fill_diagonal_(1.0)
    upper = torch.triu_indices(len(own), len(own)).unbind()
    kernel = torch.empty_like(own)
    kernel[upper] = kernel.t()[upper] = deep_ntk(own[upper], activation, depth, centred=centred)
    scale = kernel.diagonal().mean()
    cross = deep_ntk(rho, activation, depth, centred=centred) / scale
    if not bool((cross.abs() > 1e-290).any(1).all()):
        raise ValueError(f"the kernel of a new input underflows at depth {depth}: take `depth_limit` instead")
    targets = torch.nn.functional.one_hot(y.cpu().long()).double()
    system = kernel / scale + penalty * torch.eye(len(kernel), dtype=torch.float64)
    return (cross @ torch.linalg.solve(system, targets)).argmax(1).to(new.device)


def optimal_activation(dimension: float, degree: int = 4) -> ScalarFunction:
    """An activation whose limit is the singular kernel with alpha = dimension, the one that is consistent on this sphere.

    a h_1 + b h_k in normalised Hermite polynomials has A' = a and B' = a^2 + k b^2.

    Args:
        dimension: of the sphere on which the inputs lie: p - 1 for inputs in R^p that fill it.
        degree: k, at least 2; alpha is above 2/(k - 1).

    Raises:
        ValueError: a number is out of range.

    >>> round(depth_limit(optimal_activation(3)).exponent, 9)
    3.0
    """
    if degree < 2 or not 2 / (degree - 1) < dimension < math.inf:
        raise ValueError(f"degree must be at least 2 and dimension above 2/(degree - 1), got {degree} and {dimension}")

    def exponent(log_kept: float) -> float:
        kept = math.exp(log_kept)
        return -2 * log_kept / math.log1p((degree - 1) * -math.expm1(log_kept)) if kept < 1 else 2 / (degree - 1)

    low, high = -2.0 * dimension * math.log(degree), 0.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if exponent(middle) > dimension else (low, middle)
    kept = math.exp(low)
    first, last = math.sqrt(kept), math.sqrt(-math.expm1(low))

    def value(x: Tensor) -> Tensor:
        return first * x + last * list(hermite_polynomials(x, degree + 1))[-1]

    def slope(x: Tensor) -> Tensor:
        return first + last * math.sqrt(degree) * list(hermite_polynomials(x, degree))[-1]

    return ScalarFunction(name=f"optimal({dimension:g}, degree {degree})", value=value, slope=slope)
