"""Positive, nondecreasing, concave maps: which of them have exactly one fixed point, whatever the injection is.

The rules are those of nonlinear Perron-Frobenius theory (Krasnosel'skii 1964; Yates 1995; Lemmens & Nussbaum 2012; Gabor,
Piotrowski & Cavalcante, ICML 2024): such a map has a fixed point iff the spectral radius of its asymptotic map is below 1,
and then it is unique and Picard iteration reaches it geometrically.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from perron._numerics.batch import per_sample
from perron._numerics.interval import Interval
from perron._numerics.rounding import gamma, product_above
from perron.cells.chain import Chain
from perron.cells.map import Linearization, Map
from perron.cells.refusal import Refusal
from perron.theory.base import Batch, Facts, GradientBound, Near, RankOne, Sign, Solve, Theory
from perron.theory.certificate import Certificate, near_one
from perron.theory.orbit import Orbit
from perron.theory.perron_vector import Majorant, perron_vector
from perron.theory.thompson import degree
from perron.theory.weighted_norm import WeightedNormBound, underflow_of_norm, weights_for

__all__ = ["ConcaveGradientBound", "PositiveConcave", "spectral_radius_bound"]


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
    return perron_vector(lambda w: a @ w, a.shape[0], a.shape[0] + 2, a.device, iterations=iterations).factor


def _asymptotic_radius(chain: Chain) -> float:
    """At least the spectral radius of f_inf(z) = lim f(t z)/t, which is s A_L ... A_1 z with s the product of the slopes.

    f_inf^j w <= (s M)^j w for the majorant s M of the chain and w > 0, so s M has no smaller radius than f_inf.
    """
    slope = product_above(s.asymptotic_slope for s in chain.steps)
    if slope == 0:
        return 0.0
    return Majorant.of(chain, slope).perron_vector().factor


def _check_positive(chain: Chain, positive_injection: bool) -> None:
    """f must map into the open orthant: with f(0) = 0 in a coordinate, uniqueness can fail."""
    positive = False
    for step in chain.known:
        positive = step.positive(positive, positive_injection)
    if not positive:
        raise Refusal(
            "f(0) > 0 could not be verified: with sigma(0) = 0 the injection must be positive in every coordinate "
            "(injection='softplus'), or use an activation with sigma(0) > 0 such as the sigmoid"
        )


def _radius_of(chain: Chain, sign: Sign) -> float:
    """What is left to be seen of a nonnegative chain: f(0) > 0, and the spectral radius of the asymptotic map."""
    try:
        _check_positive(chain, sign is Sign.POSITIVE)
        return _asymptotic_radius(chain)
    except Refusal as refusal:
        raise Near(str(refusal), math.inf) from refusal


def _a_priori_rate(chain: Chain) -> float | None:
    """The degree, or 1 - min f(0)/sup f, where it does not depend on the input.

    f is concave: f'(z) z <= f(z) - f(0) <= (1 - min f(0)/sup f) f(z) for every z >= 0, which is a degree of f.
    """
    try:
        found = degree(chain)
    except Refusal:
        found = 1.0
    last = chain.steps[-1]
    if math.isfinite(last.supremum) and last.least > 0:
        # The numbers themselves are powers, rounded.
        found = min(found, 1 - last.least / last.supremum * (1 - 1e-14))
    return found if found < 1 else None


class ConcaveGradientBound(WeightedNormBound):
    """J >= 0, and J falls as z grows: any w > 0 with J(lower) w <= kappa w serves at the fixed point, and J(lower) - J(upper)
    bounds what J varies by.
    """

    def __init__(
        self,
        chain: Chain,
        injection: Tensor,
        bounds: tuple[Tensor, Tensor],
        *,
        model: RankOne | None = None,
        fixed: bool = False,
    ) -> None:
        self.exact = chain.to(torch.float64)
        self.injection = injection
        count = chain.roundings
        lower, upper = bounds
        # The weights need three digits; a float32 product gives them if its sums are rigorous.
        rigorous = chain.rigorous()
        start = lower if rigorous is not None else lower.double()
        # Slopes come from the value here if they do in `finish`: an enclosure of z* is wider than that of f(z*).
        by_value = (self.exact if rigorous is None else rigorous).linearize_at_fixed_point(start, "upper")
        if by_value is None:
            start = lower.double()
            steep = self.exact.linearize_steps(start, injection.double(), "upper")
        else:
            steep = by_value
            if model is not None:
                # The Perron vector of D r c^T.
                start = steep.slope * model.rows.view_as(lower[:1])
        self.rounding = 4 * gamma(count, start.dtype)
        weights, image, kappa = weights_for(steep, start, self.rounding, fixed)
        self.weights, self.kappa = weights.double(), kappa.double()
        slope = None if by_value is None else steep.slope.double()
        # A w is at hand where J = D A.
        passed = steep.stages(weights) if slope is None else [weights, image / steep.slope, image]
        self.underflow = underflow_of_norm(passed, count)
        self.spread = self._spread(lower.double(), upper.double(), image.double(), slope)
        self.exact_rounding = 4 * gamma(count, torch.float64)

    def _spread(self, lower: Tensor, upper: Tensor, image: Tensor, slope: Tensor | None) -> Tensor:
        """At least (J(lower) - J(upper)) w, given J(lower) w, and the slopes in it where these come from the value."""
        image = image * (1 + self.rounding)
        if slope is not None:
            # J = D A: the difference of the diagonals is exact enough, and needs no product.
            steep = self.exact.linearize_at_fixed_point(lower, "upper")
            flat = self.exact.linearize_at_fixed_point(upper, "lower")
            assert steep is not None
            assert flat is not None
            share = (steep.slope - flat.slope) / slope.clamp_min(torch.finfo(image.dtype).tiny)
            return image * share * (1 + 1e-12)
        flat = self.exact.linearize_steps(upper, self.injection.double(), "lower")
        return (image - flat.matvec(self.weights) * (1 - self.rounding)).clamp_min(0)

    def linearize(self, z: Tensor) -> Linearization:
        return PositiveConcave().linearize(self.exact, z, self.injection.double())


@dataclass(frozen=True)
class PositiveConcave(Theory):
    """Positive, nondecreasing, concave cells: Picard's iterates rise from zero to the only fixed point in the orthant."""

    kind: ClassVar[str] = "positive concave"
    orthant: ClassVar[bool] = True
    rises: ClassVar[bool] = True

    def certify(self, chain: Chain, sign: Sign) -> Certificate:
        if sign is Sign.ANY:
            raise Refusal("the injection may have any sign")
        for step in chain.known:
            step.check_concave()
        radius = _radius_of(chain, sign)
        if not radius < 1:
            raise Near(
                f"the asymptotic map has spectral radius up to {near_one(radius)}, not below 1: a fixed point may not exist; "
                "scale the weights down or use a bounded activation",
                radius,
            )
        names = ", ".join(s.name for s in chain.steps if s.elementwise) or "none"
        count = sum(t.numel() for a in chain.affine for t in a.tensors)
        return Certificate(
            exists=True,
            unique=True,
            geometric=True,
            kind=self.kind,
            assumptions=(
                f"all {count} weights of the cell are finite and nonnegative",
                f"activations ({names}) are nonnegative, nondecreasing and concave on [0, inf)",
                "f(0) > 0: "
                + ("the injection is positive" if sign is Sign.POSITIVE else "sigma(0) > 0 or a positive bias"),
                "the asymptotic map is zero (bounded or sublinear cell)"
                if radius == 0
                else f"the asymptotic map has spectral radius at most {near_one(radius)} < 1",
            ),
            rate=_a_priori_rate(chain),
            metric="Thompson metric",
        )

    def at(self, batch: Batch) -> Facts:
        return Orbit.of(batch)

    def bound_gradient(
        self, chain: Chain, injection: Tensor, bounds: tuple[Tensor, Tensor], *, model: RankOne | None, fixed: bool
    ) -> GradientBound | None:
        return ConcaveGradientBound(chain, injection, bounds, model=model, fixed=fixed)

    def linearize(self, map: Map, z: Tensor, injection: Tensor) -> Linearization:
        """J at a fixed point in the orthant, from its value alone where the cell allows it."""
        found = map.linearize_at_fixed_point(z) if isinstance(map, Chain) else None
        return map.linearize(z, injection) if found is None else found

    def moved(self, chain: Chain, b: Interval, solve: Solve) -> Interval:
        """f grows with z and b, so z* grows with b: z*(b) lies between the lower bound of z*(b_lo) and the upper of z*(b_hi)."""
        low, high = solve(b.lower), solve(b.upper)
        proven = per_sample(low.bounded & high.bounded, low.lower)
        return Interval(torch.where(proven, low.lower, torch.nan), torch.where(proven, high.upper, torch.nan))
