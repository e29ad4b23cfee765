"""Affine maps v -> A v + c, and what the proofs need of them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import Self

from perron._numerics.rounding import gamma
from perron.cells.refusal import Refusal

__all__ = ["AffineMap", "largest"]


@dataclass(frozen=True, kw_only=True)
class AffineMap(ABC):
    """v -> A v + c on (batch, ...) tensors; A is given by `weights` (none for pooling), c by `bias`."""

    weights: tuple[Tensor, ...]
    bias: Tensor | None = None

    @property
    @abstractmethod
    def terms(self) -> int:
        """Products in the longest sum of A v, or of A^T g."""

    @abstractmethod
    def apply(self, v: Tensor, bias: Tensor | None) -> Tensor:
        """A v + bias."""

    @abstractmethod
    def transpose(self, g: Tensor, shape: torch.Size) -> Tensor:
        """A^T g, where A acts on tensors of `shape`."""

    @abstractmethod
    def sizes(self) -> dict[str, tuple[int, int]]:
        """What A takes and gives: "features" (the last dimension), "channels" (the second), "dimensions" with the batch.

        What is not named may be anything, and stays as it is but for `growth`.

        Raises:
            Refusal: the tensors do not fit each other.
        """

    def growth(self) -> tuple[int, ...]:
        """What A adds to each side of an image, whatever its size.

        Raises:
            Refusal: that depends on the size.
        """
        return ()

    @abstractmethod
    def keeps_positive(self) -> bool:
        """Whether A v > 0 for every v > 0, as far as can be told."""

    @abstractmethod
    def largest_row(self) -> Tensor:
        """A scalar: the largest row sum of an A >= 0, with the rounding of at most `terms` + 8 operations."""

    def row_sums(self) -> Tensor:
        """A float64 scalar: at least the largest sum of |A_ij| over a row, of the very tensors, rounding included."""
        found = self.exact().magnitude().largest_row()
        return found * (1 + 2 * gamma(self.terms + 12, torch.float64))

    def exact(self) -> Self:
        """The same map in float64, which holds every weight exactly: what bounds are computed from."""
        return self.rebind([t.detach().double() for t in self.tensors])

    def matrix(self) -> Tensor | None:
        """A (out, in) on the last dimension, where it is at hand as a matrix."""
        return None

    def kernel_of_same_shape(self) -> Tensor | None:
        """The kernel (out, in, ...), where A is a convolution that keeps the shape: odd, padded by half of it with zeros."""
        return None

    def resolvent(self, state: Tensor, *, transposed: bool = False) -> Callable[[Tensor], Tensor]:
        """r -> (2 I - A)^{-1} r, or with A^T for A, for states like this one.

        Raises:
            Refusal: no factorisation of A is known.
        """
        raise Refusal(f"the resolvent of a {type(self).__name__} is not known")

    def check_bias(self, features: int) -> None:
        """Raise Refusal where the bias would broadcast, or does not fit."""
        if self.bias is not None and self.bias.shape != (features,):
            raise Refusal(f"a bias of shape {tuple(self.bias.shape)} does not fit {features} outputs")

    def underflow(self, dtype: torch.dtype) -> Tensor | float:
        """What underflow adds at most to the error of an entry of A v + c, computed in this precision."""
        return 2 * (self.terms + 2) * torch.finfo(dtype).tiny

    def linear(self, v: Tensor) -> Tensor:
        """A v."""
        return self.apply(v, None)

    def affine_image(self, v: Tensor) -> Tensor:
        """A v + c."""
        return self.apply(v, self.bias)

    def magnitude(self) -> Self:
        """|A| v + |c|, or more."""
        return self.rebind([t.abs() for t in self.tensors])

    @property
    def signs(self) -> tuple[Tensor, ...] | None:
        """Tensors such that A >= 0 if all of them are; None where A may have negative entries all the same."""
        return self.weights

    def margin(self) -> float:
        """A rigorous lower bound on min v^T (I - A) v / |v|^2; -inf where none is known."""
        return -math.inf

    def norm(self) -> float:
        """A bound on the Euclidean norm of A, as far as a map with a `margin` needs it."""
        return math.inf

    def image_of(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds of A v + c for lower <= v <= upper, rounding included: |A| acts on the radius. For float64, rigorous sums."""
        centre = (lower + upper) / 2
        # Rounded up: the box must stay inside centre +/- radius.
        radius = torch.maximum(upper - centre, centre - lower) * (1 + 1e-15)
        magnitude = self.magnitude()
        slack = 4 * gamma(self.terms + 8, lower.dtype) * magnitude.affine_image(centre.abs() + radius)
        spread = magnitude.linear(radius) + slack + self.underflow(lower.dtype)
        middle = self.affine_image(centre)
        return middle - spread, middle + spread

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.weights if self.bias is None else (*self.weights, self.bias)

    def rebind(self, tensors: Sequence[Tensor]) -> Self:
        """The same map with other `tensors`."""
        count = len(self.weights)
        return replace(self, weights=tuple(tensors[:count]), bias=None if self.bias is None else tensors[count])

    @property
    def per_sample(self) -> bool:
        """Whether every sample has an A of its own: then `weights` have a batch dimension."""
        return False

    def select(self, index: Tensor) -> Self:
        """The map of these samples only."""
        return self

    def check_nonnegative(self) -> None:
        """Raise Refusal unless A >= 0 and c >= 0, and all of it is finite."""
        signs = self.signs
        if signs is None:
            raise Refusal("an affine step has negative entries whatever its weights are")
        for name, tensor in (*(("weight", w) for w in signs), ("bias", self.bias)):
            if tensor is None or tensor.numel() == 0:
                continue
            low, high = (float(t) for t in torch.aminmax(tensor.detach()))
            if not (low > -math.inf and high < math.inf):
                raise Refusal(f"the {name} of an affine step is not finite")
            if low < 0:
                raise Refusal(f"the {name} of an affine step has the entry {low:.3g}; it must be nonnegative")

    def channels(self) -> tuple[AffineMap, ...]:
        """Maps of features, float64, whose product M bounds an A >= 0 on constants over space, w >= 0: A w <= M w.

        Each with at most `terms` + 2 roundings, those of its own weights included.

        Raises:
            Refusal: no such bound is known.
        """
        raise Refusal(f"the spectral radius of a {type(self).__name__} is not bounded here")


def largest(sums: Tensor) -> Tensor:
    return sums.detach().max() if sums.numel() else sums.detach().new_zeros(())
