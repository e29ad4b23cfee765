"""Perron vectors: w > 0 with A w <= kappa w for a nonnegative A that bounds what a cell does to differences.

Collatz-Wielandt: for every w > 0 the spectral radius of A lies between min_i (A w)_i/w_i and max_i (A w)_i/w_i. Power
iteration only looks for a good w; the upper end is then one evaluation in float64 with its rounding error added, so it
holds however far the iteration got. A positive multiple of the identity attains both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from perron._numerics.rounding import gamma, product_above
from perron.cells.affine_map import AffineMap
from perron.cells.chain import Chain
from perron.cells.refusal import Refusal

__all__ = ["Majorant", "PerronVector", "perron_vector"]

# Above what underflow takes from a sum, far below every number that counts; and no entry of w is smaller than the other.
_LEAST, _SMALLEST = 1e-300, 1e-200
# Part of what a factor can be below what is wanted that is good enough.
_GOOD = 0.9


@dataclass(frozen=True, kw_only=True)
class PerronVector:
    """A w <= factor w, rounding included.

    Attributes:
        factor: inf where nothing was found.
        weights: (n,) w, float64, the largest entry 1.
    """

    factor: float
    weights: Tensor


def perron_vector(
    image: Callable[[Tensor], Tensor],
    n: int,
    roundings: int,
    device: torch.device,
    *,
    iterations: int = 200,
    wanted: float | None = None,
) -> PerronVector:
    """The best w found for w -> A w on n entries.

    Args:
        image: computed with so many roundings in a row; it needs to be right from 1e-300 on only.
        n: entries of w.
        roundings: the quotient is one more.
        device: of w.
        iterations: at most.
        wanted: stop once the factor is well below this, or cannot come below it; None for the least factor.
    """
    w = best = torch.ones(n, dtype=torch.float64, device=device)
    factor = math.inf
    for _ in range(iterations):
        y = image(w) + _LEAST
        low, high = (float(t) for t in torch.aminmax(y / w))
        if not high < math.inf:
            # Overflow.
            break
        if high < factor:
            best, factor = w, high
        if low >= factor * (1 - 1e-12):
            break
        if wanted is not None and (low >= wanted or wanted - factor >= _GOOD * (wanted - low)):
            break
        # The shift keeps w positive where the matrix is reducible, and steady where it is periodic.
        w = y + 0.2 * factor * w
        w = (w / w.max()).clamp_min(_SMALLEST)
    return PerronVector(factor=factor * (1 + 2 * gamma(roundings + 8, torch.float64)), weights=best)


@dataclass(frozen=True, kw_only=True)
class Majorant:
    """s |A_L| ... |A_1| of a chain on vectors that are constant over images, w >= 0.

    On such a w, |A_k| w <= M_k w with M_k = `channels` of the step. Convolutions over all of space and matrices attain it.

    Attributes:
        chain: whose steps are passed.
        slope: s.
        axis: of a state (batch, ...) along which w lies: 1 for channels, -1 for features.
        entries: n of w.
    """

    chain: Chain
    slope: float
    axis: int
    entries: int

    @classmethod
    def of(cls, chain: Chain, slope: float) -> Majorant:
        """Of a chain that maps a space into itself.

        Raises:
            Refusal: no such bound is known of some step.
        """
        sizes = chain.sizes()
        if "features" in sizes and "dimensions" in sizes:
            raise Refusal("the spectral radius of a cell with linear maps along a side of an image is not bounded here")
        axis = -1 if "features" in sizes else 1
        return cls(chain=chain, slope=slope, axis=axis, entries=sizes.get("features", sizes.get("channels", 1)))

    def behind_injection(self, slope: float) -> Majorant:
        """Of the steps behind the injection, with their own slope."""
        return replace(self, chain=self.chain.behind_injection()[1], slope=slope)

    @cached_property
    def maps(self) -> tuple[AffineMap, ...]:
        """M_1, ..., M_L."""
        return tuple(m for step in self.chain.affine for m in step.magnitude().channels())

    @property
    def roundings(self) -> int:
        return sum(s.terms + 3 for s in self.chain.affine)

    def image(self, w: Tensor) -> Tensor:
        """M_L ... M_1 w, with what underflow may take from it."""
        w = w.unsqueeze(0)
        for step in self.maps:
            # What underflowed may meet large weights in the next step.
            w = step.linear(w) + step.underflow(torch.float64) + _LEAST
        return w.squeeze(0)

    def perron_vector(self, *, below_one: bool = False) -> PerronVector:
        """The best w found, or if `below_one` the first that is well below 1.

        Raises:
            Refusal: no bound is known of some step.
        """
        maps = self.maps
        if not maps:
            return PerronVector(factor=self.slope, weights=torch.ones(self.entries, dtype=torch.float64))
        wanted = 1 / self.slope if below_one and self.slope > 0 else None
        device = maps[0].tensors[0].device
        found = perron_vector(self.image, self.entries, self.roundings, device, wanted=wanted)
        return PerronVector(factor=product_above([self.slope, found.factor]), weights=found.weights)

    def factor(self, w: Tensor) -> float:
        """The least kappa with s |A_L| ... |A_1| w <= kappa w for this w > 0, rounded up; inf where that overflows."""
        most = float(((self.image(w) + _LEAST) / w).max()) if self.maps else 1.0
        return product_above([self.slope, most * (1 + 2 * gamma(self.roundings + 8, torch.float64))])

    def over(self, w: Tensor, like: Tensor) -> Tensor:
        """w, shaped like a batch of states."""
        shape = [1] * like.dim()
        shape[self.axis] = -1
        return w.view(shape).expand_as(like)
