"""Division by a norm, as a module and as a step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from perron._numerics.rounding import EXACT, Rounding, compound, gamma
from perron.cells import reading
from perron.cells.jacobian import Factor
from perron.cells.refusal import Refusal
from perron.cells.step import Reach, Side, Weightless, known

__all__ = ["LEAST_NORMALIZED", "Normalize", "NormalizeStep"]


class Normalize(nn.Module):
    """v -> v / ||v||_p per sample, over every dimension but the batch or over one of them.

    Args:
        p: of the norm, at least 1; inf for the largest absolute value.
        dim: None, or the dimension that the norm sums over, for instance 1 for channels.

    Raises:
        ValueError: p is below 1, or dim is the batch.

    >>> Normalize()(torch.tensor([[1.0, 4.0]]))
    tensor([[0.2500, 1.0000]])
    """

    def __init__(self, p: float = math.inf, dim: int | None = None) -> None:
        super().__init__()
        if not p >= 1:
            raise ValueError(f"p must be at least 1, got {p}")
        if dim is not None and dim < 1:
            raise ValueError(f"dim must be at least 1 (0 is the batch), got {dim}")
        self.p, self.dim = float(p), dim

    def forward(self, v: Tensor) -> Tensor:
        return NormalizeStep(p=self.p, dim=self.dim)(v)

    def extra_repr(self) -> str:
        return f"p={self.p}, dim={self.dim}"


# Entries below this are not divided by a norm in anything that is proven.
LEAST_NORMALIZED = 1e-100


@known
@dataclass(frozen=True, kw_only=True)
class NormalizeStep(Weightless):
    """v -> v / ||v||_p: not nondecreasing, so no step of a positive concave cell."""

    p: float
    dim: int | None

    def roundings(self, entries: int) -> int:
        """Of the quotient, with a norm of at most so many entries."""
        return 8 if math.isinf(self.p) else entries + 64

    def __call__(self, v: Tensor, injection: Tensor | None = None) -> Tensor:
        return v / self.norm(v)

    def norm(self, v: Tensor) -> Tensor:
        """The norm, shaped to broadcast; scaled, so that its powers neither overflow nor underflow."""
        dims = tuple(range(1, v.dim())) if self.dim is None else (self.dim,)
        top = v.abs().amax(dims, keepdim=True)
        if math.isinf(self.p):
            return top
        scale = top.detach().clamp_min(torch.finfo(v.dtype).tiny)
        return scale * torch.linalg.vector_norm(v / scale, self.p, dims, keepdim=True)

    def check(self) -> None:
        """p and dim are what proofs ask about."""

    def rounded(self, before: Rounding, dtype: torch.dtype, entries: int) -> Rounding:
        # Of the norm and of what it divides. What underflowed before is relative to the least entry of that.
        relative = compound(before.relative, 2 * float(before.absolute) / LEAST_NORMALIZED)
        relative = compound(compound(relative, relative), gamma(self.roundings(entries), dtype))
        return Rounding(relative, torch.finfo(dtype).tiny)

    @property
    def elementwise(self) -> bool:
        return False

    def factors(self, v: Tensor, side: Side | None = None, slack: Rounding = EXACT) -> tuple[Factor, ...]:
        raise Refusal(f"the Jacobian of a {type(self).__name__} is no diagonal and no matrix")

    def over(self, lower: Tensor, upper: Tensor, injection: Tensor) -> tuple[Tensor, Tensor]:
        raise Refusal("division by a norm is not nondecreasing: no box is known")

    def reach(self, lower: Tensor, upper: Tensor, error: Tensor, injection: Tensor) -> Reach:
        raise Refusal("division by a norm is not nondecreasing: no box is known")

    @property
    def largest_slope(self) -> float:
        return math.inf

    def check_concave(self) -> None:
        raise Refusal("division by a norm is not nondecreasing")

    def positive(self, before: bool, injected: bool) -> bool:
        raise Refusal("division by a norm is not nondecreasing")

    @property
    def least(self) -> float:
        return 0.0

    @property
    def asymptotic_slope(self) -> float:
        raise Refusal("division by a norm is not nondecreasing")

    def degree(self, least: float) -> tuple[float, float]:
        """2: with g = log v the logarithm of v/|v|_p moves by dg_i - sum_j s_j dg_j with s_j = v_j^p/sum v^p, at most 2 max |dg|,
        attained in the limit.
        """
        if least < LEAST_NORMALIZED:
            raise Refusal("what is divided by its norm must have a positive lower bound; use a shift, as in 'tanh+1.2'")
        if not self.p >= 1 or not (self.dim is None or self.dim >= 1):
            raise Refusal(f"no norm of a sample is known with p = {self.p} over dimension {self.dim}")
        return 2.0, 0.0

    def thompson(self, apart: Tensor) -> Tensor:
        """d(x/|x|, y/|y|) <= d(x, y) + |log(|x|/|y|)|, which is at most twice the first."""
        return apart * 2

    @property
    def normalizes(self) -> bool:
        return True

    @property
    def injects(self) -> bool:
        return False

    @property
    def keeps_zero(self) -> bool:
        return False

    @property
    def is_affine(self) -> bool:
        return False


@reading.reads(Normalize)
def normalize_step(module: Normalize, path: str) -> NormalizeStep:
    return NormalizeStep(p=module.p, dim=module.dim)
