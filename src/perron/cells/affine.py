"""Affine maps as steps of a cell."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import Self

from perron._numerics.rounding import EXACT, Rounding, compound, gamma
from perron.cells.affine_map import AffineMap
from perron.cells.jacobian import Product
from perron.cells.sizes import Sizes
from perron.cells.step import Reach, Side, Step, check_tensors, full_float32

__all__ = ["AffineStep"]


@dataclass(frozen=True, kw_only=True)
class AffineStep(AffineMap, Step):
    """v -> A v + c, see `AffineMap`."""

    def __call__(self, v: Tensor, injection: Tensor | None = None) -> Tensor:
        return self.affine_image(v)

    def rebind(self, tensors: Sequence[Tensor]) -> Self:
        return super().rebind(tensors)

    def gradients(self, v: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        found = torch.func.vjp(lambda *w: replace(self, weights=w).linear(v), *self.weights)[1](y)
        return (*found, *self._bias_gradient(y))

    def _bias_gradient(self, y: Tensor) -> tuple[Tensor, ...]:
        if self.bias is None:
            return ()
        return (y.sum([0, *range(2, y.dim())]),)

    def check(self) -> None:
        check_tensors(self.tensors)

    def track(self, sizes: Sizes) -> None:
        sizes.change(self.sizes(), self.growth())

    def rigorous(self) -> Self | None:
        # On other devices float32 products may be computed with shorter mantissas.
        dtype = self.tensors[0].dtype if self.tensors else torch.float64
        exact = dtype == torch.float64 or (
            dtype == torch.float32 and all(t.device.type == "cpu" for t in self.tensors) and full_float32()
        )
        return self if exact else None

    def rounded(self, before: Rounding, dtype: torch.dtype, entries: int) -> Rounding:
        # What is exact has lost nothing that row sums would count.
        passed = before.absolute if before.exact else 2 * self.row_sums() * before.absolute
        return Rounding(compound(before.relative, gamma(self.terms + 2, dtype)), passed + self.underflow(dtype))

    @property
    def affine(self) -> tuple[AffineMap, ...]:
        return (self,)

    @property
    def elementwise(self) -> bool:
        return False

    @property
    def normalizes(self) -> bool:
        return False

    def factors(self, v: Tensor, side: Side | None = None, slack: Rounding = EXACT) -> tuple[Product, ...]:
        return (Product(self, v.shape),)

    def over(self, lower: Tensor, upper: Tensor, injection: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.image_of(lower, upper)

    def reach(self, lower: Tensor, upper: Tensor, error: Tensor, injection: Tensor) -> Reach:
        """An error e of v leaves A v with at most |A| e + gamma (|A| (|v| + e) + |c|)."""
        magnitude = self.magnitude()
        size = torch.maximum(lower.abs(), upper.abs())
        # gamma |A| e is in the last factor.
        error = (magnitude.linear(error) + gamma(self.terms + 4, lower.dtype) * magnitude.affine_image(size)) * (
            1 + 1e-9
        )
        error = error + self.underflow(lower.dtype)
        # Of every slope, steepest and flattest alike.
        factors = (Product(magnitude, lower.shape),)
        low, high = self.over(lower, upper)
        return Reach(lower=low, upper=high, error=error, steep=factors, flat=factors)

    @property
    def largest_slope(self) -> float:
        # A itself counts, by its row sums.
        return 1.0

    def check_concave(self) -> None:
        self.check_nonnegative()

    def positive(self, before: bool, injected: bool) -> bool:
        bias = self.bias is not None and self.bias.numel() > 0 and bool((self.bias.detach() > 0).all())
        return bias or (before and self.keeps_positive())

    @property
    def least(self) -> float:
        return 0.0

    @property
    def asymptotic_slope(self) -> float:
        # A itself counts, by its `channels`.
        return 1.0

    def degree(self, least: float) -> tuple[float, float]:
        """A z <= A z + c for A >= 0 and c >= 0: degree 1, attained for c = 0."""
        self.check_nonnegative()
        return 1.0, float(self.bias.min()) if self.bias is not None and self.bias.numel() else 0.0

    def thompson(self, apart: Tensor) -> Tensor:
        return apart

    @property
    def injects(self) -> bool:
        return False

    @property
    def keeps_zero(self) -> bool:
        return self.bias is None

    @property
    def is_affine(self) -> bool:
        return True

    def structure(self) -> Hashable:
        """The `signature` of a class that has no options but its tensors."""
        return type(self), tuple((tuple(t.shape), t.dtype) for t in self.tensors), self.bias is None
