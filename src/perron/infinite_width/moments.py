"""Gaussian averages of scalar functions, float64, by Gauss-Legendre on panels that are split at the kinks.

Gauss-Hermite quadrature loses most of its digits where a function has a kink; panels lose none. Derivatives of kinks are
never taken: by Stein's identity E phi'(tau xi) = E[xi phi(tau xi)]/tau, and so on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from perron.infinite_width.activations import Number, ScalarFunction

__all__ = ["Moments", "gaussian_moments", "hermite_coefficients", "hermite_polynomials", "quadrature"]

# Beyond it the density is below 1e-31; panels of length 1, with so many nodes each.
_LIMIT, _NODES = 12, 20


def quadrature(scale: Tensor, kinks: Sequence[Number]) -> tuple[Tensor, Tensor]:
    """Nodes xi and weights, (..., nodes) each, such that E f(scale xi) is about sum of weights times f(scale xi).

    Args:
        scale: (...) positive; where f has kinks, the panels are split at kinks/scale.
        kinks: of f.
    """
    grid = torch.linspace(-_LIMIT, _LIMIT, 2 * _LIMIT + 1, dtype=torch.float64, device=scale.device)
    edges = grid.expand(*scale.shape, -1)
    inner = [float(k) for k in kinks if k != 0]
    if inner:
        at = grid.new_tensor(inner) / scale.detach().double().unsqueeze(-1)
        edges = torch.cat([edges, at.clamp(-_LIMIT, _LIMIT)], -1).sort(-1).values
    left, right = edges[..., :-1, None], edges[..., 1:, None]
    points, weights = (torch.from_numpy(t).to(grid) for t in np.polynomial.legendre.leggauss(_NODES))
    x = ((left + right) / 2 + (right - left) / 2 * points).flatten(-2)
    w = ((right - left) / 2 * weights).flatten(-2) * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return x, w


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Averages of a function at tau xi, xi ~ N(0, 1); phi is the function less its mean (or less a given shift).

    Attributes:
        mean: E phi0.
        second: E phi^2.
        slope: E phi'.
        curvature: E phi''.
        spread: (1/2) E (phi^2)'', the derivative of `second` with respect to tau^2 at a fixed shift.
        energy: E phi'^2.
    """

    mean: Tensor
    second: Tensor
    slope: Tensor
    curvature: Tensor
    spread: Tensor
    energy: Tensor


def gaussian_moments(phi: ScalarFunction, variance: Tensor, *, shift: Tensor | None = None) -> Moments:
    """Moments of phi at sqrt(variance) xi; differentiable with respect to the variance and the shift.

    Args:
        phi: the function.
        variance: (...) float64, positive.
        shift: what is subtracted from phi0; None for its mean.

    >>> from perron.infinite_width.activations import scalar_function
    >>> round(float(gaussian_moments(scalar_function("relu"), torch.ones((), dtype=torch.float64)).mean), 12)
    0.398942280401
    """
    scale = variance.sqrt()
    x, w = quadrature(scale, phi.kinks)
    raw = phi.value(scale.unsqueeze(-1) * x)
    mean = (w * raw).sum(-1)
    centred = raw - (mean if shift is None else shift).unsqueeze(-1)
    square = centred * centred
    hermite = x * x - 1
    return Moments(
        mean=mean,
        second=(w * square).sum(-1),
        slope=(w * x * centred).sum(-1) / scale,
        curvature=(w * hermite * centred).sum(-1) / variance,
        spread=(w * hermite * square).sum(-1) / (2 * variance),
        energy=(w * phi.slope(scale.unsqueeze(-1) * x) ** 2).sum(-1),
    )


def hermite_coefficients(phi: ScalarFunction, variance: Tensor, terms: int, *, of_slope: bool = False) -> Tensor:
    """(..., terms) coefficients of phi0(tau xi), or of phi0'(tau xi), in the normalised Hermite polynomials of xi.

    Args:
        phi: the function.
        variance: (...) float64, positive: tau^2.
        terms: how many.
        of_slope: whether the derivative is expanded.
    """
    scale = variance.sqrt()
    x, w = quadrature(scale, phi.kinks)
    f = (phi.slope if of_slope else phi.value)(scale.unsqueeze(-1) * x) * w
    return torch.stack([(f * h).sum(-1) for h in hermite_polynomials(x, terms)], -1)


def hermite_polynomials(x: Tensor, count: int) -> Iterator[Tensor]:
    """h_0(x), h_1(x), ..., normalised: E h_k(xi)^2 = 1."""
    previous, current = torch.zeros_like(x), torch.ones_like(x)
    for k in range(count):
        yield current
        previous, current = current, (x * current - math.sqrt(k) * previous) / math.sqrt(k + 1)
