"""Cells that contract for some injections: Thompson's metric and the weighted sup norm, whichever serves a sample better."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from perron._numerics.batch import all_finite, per_sample
from perron._numerics.interval import Interval
from perron.cells.chain import Chain
from perron.cells.refusal import Refusal
from perron.theory.base import Batch, Facts, Sign, Solve
from perron.theory.certificate import Certificate
from perron.theory.contraction import Contractive, InWeightedNorm, in_weighted_norm
from perron.theory.monotone_operator import margin
from perron.theory.posterior import Posterior
from perron.theory.thompson import InThompsonsMetric, in_thompsons_metric

__all__ = ["Contracting", "Contraction", "contraction"]


@dataclass(frozen=True, kw_only=True)
class Contraction:
    """By how much F contracts, per sample, in float64.

    Attributes:
        thompson: in Thompson's metric on the whole orthant.
        norm: in the weighted sup norm on a box; None where Thompson's metric serves every sample.
        lower, upper: (batch, ...) where F has to be evaluated.
    """

    thompson: InThompsonsMetric
    norm: InWeightedNorm | None
    lower: Tensor
    upper: Tensor

    @property
    def factor(self) -> Tensor:
        """(batch,) the better of both."""
        return self.thompson.factor if self.norm is None else torch.minimum(self.norm.factor, self.thompson.factor)

    def select(self, index: Tensor) -> Contraction:
        norm = None if self.norm is None else self.norm.select(index)
        thompson = self.thompson.select(index)
        return Contraction(thompson=thompson, norm=norm, lower=self.lower[index], upper=self.upper[index])

    def enclose(self, z: Tensor, fz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bounds of z* and (batch,) whether they are proven, from z in the box and the computed F(z), float64."""
        whole = torch.full_like(fz, math.inf)
        low, high, by_norm = (-whole, whole, False) if self.norm is None else self.norm.enclose(z, fz)
        spread, by_degree = self.thompson.spread(z, fz)
        # Without the degree a sample may have any sign, and 0 is no lower bound of it.
        mask, factor = per_sample(by_degree, fz), per_sample(torch.exp(spread), fz)
        low = torch.where(mask, torch.maximum(low, fz / factor), low)
        high = torch.where(mask, torch.minimum(high, fz * factor), high)
        return low, high, (by_norm | by_degree) & all_finite(fz)


@torch.no_grad()
def contraction(chain: Chain, injection: Tensor) -> Contraction:
    """How F contracts for these injections, (batch, ...) float64; sums of the chain must be rigorous.

    Thompson's metric where the weights are nonnegative and the injection too; else, or where its factor is not below 1,
    the weighted sup norm on the smallest box found.

    Raises:
        Refusal: the chain is no known map of a space into itself.
    """
    chain.sizes()
    thompson = in_thompsons_metric(chain, injection)
    if bool(((thompson.factor < 1) | ~all_finite(injection)).all()):
        return Contraction(thompson=thompson, norm=None, lower=thompson.lower, upper=thompson.upper)
    norm = in_weighted_norm(chain, injection)
    return Contraction(thompson=thompson, norm=norm, lower=norm.lower, upper=norm.upper)


@dataclass(frozen=True)
class Contracting(Contractive):
    """Whether F contracts is seen sample by sample.

    Attributes:
        everywhere: whether it is known to for every injection.
    """

    kind: ClassVar[str] = "contracting"
    everywhere: bool = field(default=False, compare=False)

    @property
    def picard_converges(self) -> bool:
        return self.everywhere

    def splits_linear(self, chain: Chain) -> bool:
        return margin(chain) > 0

    def certify(self, chain: Chain, sign: Sign) -> Certificate:
        raise Refusal("whether F contracts is only seen for single injections")

    def at(self, batch: Batch) -> Facts:
        return Posterior(batch=batch, known=contraction(batch.map, batch.injection))

    def moved(self, chain: Chain, b: Interval, solve: Solve) -> Interval:
        raise Refusal("how far the fixed point moves is only known where F contracts for every injection")
