"""Dual activations: (q_i, q_j, h_ij) -> E phi(u) phi(v) and E phi'(u) phi'(v) for Gaussian (u, v) with these covariances.

Closed forms for functions that are linear on both sides of 0 (Cho & Saul 2009) and for erf (Williams 1997); elsewhere the
Mehler expansion in Hermite polynomials (Daniely, Frostig, Singer 2016), with a bound on what was cut off.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from perron.infinite_width.activations import ScalarFunction
from perron.infinite_width.moments import gaussian_moments, hermite_coefficients

__all__ = ["Dual"]

# Terms of the expansion: doubled from the first number to the last until the bound is below this.
_TERMS, _MOST_TERMS, _ERROR = 32, 256, 1e-10


class Dual:
    """The dual of phi = phi0 - shift for n samples.

    Args:
        phi: the function phi0.
        variance: (n,) q, float64.
        shift: what is subtracted.
        correlation: the largest |h_ij|/sqrt(q_i q_j) that is going to be asked for, off the diagonal.

    Attributes:
        second, energy: (n,) E phi(u_i)^2 and E phi'(u_i)^2: the diagonals.
        spread: (n,) the derivative of `second` with respect to q.
        error: bound on the error of an entry of the first dual by the expansion; 0 for closed forms.
    """

    def __init__(self, phi: ScalarFunction, variance: Tensor, shift: Tensor, correlation: float = 1.0) -> None:
        self.phi, self.variance, self.shift = phi, variance, shift
        moments = gaussian_moments(phi, variance, shift=shift)
        self.second, self.energy, self.spread, self.mean = moments.second, moments.energy, moments.spread, moments.mean
        self.closed = phi.slopes is not None or phi.is_erf
        self.error = 0.0
        if not self.closed:
            self._expand(min(correlation, 1.0))

    def _expand(self, correlation: float) -> None:
        # Rows of equal variance share their coefficients.
        distinct, self.which = torch.unique(self.variance, return_inverse=True)
        if self.variance.requires_grad:
            distinct, self.which = self.variance, torch.arange(len(self.variance), device=self.variance.device)
        square = gaussian_moments(self.phi, distinct, shift=torch.zeros_like(distinct)).second
        terms = _TERMS
        while True:
            self.values = hermite_coefficients(self.phi, distinct, terms)
            # Parseval: what the coefficients leave of E phi0^2, and Cauchy-Schwarz.
            self.rest = float((square - self.values.square().sum(-1)).clamp_min(0).max().detach())
            self.error = self.error_at(correlation)
            if self.error <= _ERROR or terms >= _MOST_TERMS:
                break
            terms *= 2
        self.slopes = hermite_coefficients(self.phi, distinct, terms, of_slope=True)

    def error_at(self, correlation: float) -> float:
        """Bound on the error of an entry with at most this correlation."""
        return 0.0 if self.closed else self.rest * min(correlation, 1.0) ** self.values.shape[1]

    def warn_of_truncation(self, correlation: float) -> float:
        """`error_at`, with a warning where it is not small."""
        error = self.error_at(correlation)
        if error > 1e-6:
            warnings.warn(
                f"the kernel of {self.phi.name} is only known to {error:.2g} an entry: some inputs are nearly the same "
                f"(correlation {correlation:.4f})",
                stacklevel=3,
            )
        return error

    def __call__(self, rows: Tensor, h: Tensor) -> Tensor:
        """(rows, n) E phi(u_i) phi(v_j) for these rows and all columns; entries i = j are right only up to rounding."""
        q, c, m = self.variance, self.shift, self.mean
        if self.phi.slopes is not None:
            right, left = self.phi.slopes
            odd, even = (right + left) / 2, (right - left) / 2
            size, angle = self._angle(rows, h)
            # E |u||v|; E u|v| vanishes.
            both = size / math.pi * (2 * torch.sin(angle) + (math.pi - 2 * angle) * torch.cos(angle))
            raw = odd**2 * h + even**2 * both
        elif self.phi.is_erf:
            raw = 2 / math.pi * torch.asin((2 * h / self._widened(rows)).clamp(-1, 1))
        else:
            raw = self._series(self.values, rows, h)
        return raw - c * (m[rows, None] + m) + c * c if q.numel() else raw

    def of_slope(self, rows: Tensor, h: Tensor) -> Tensor:
        """(rows, n) E phi'(u_i) phi'(v_j)."""
        if self.phi.slopes is not None:
            right, left = self.phi.slopes
            return ((right + left) / 2) ** 2 + ((right - left) / 2) ** 2 * (1 - 2 / math.pi * self._angle(rows, h)[1])
        if self.phi.is_erf:
            return 4 / math.pi / (self._widened(rows) ** 2 - 4 * h * h).clamp_min(1e-300).sqrt()
        return self._series(self.slopes, rows, h)

    def _angle(self, rows: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(q_i q_j), and the angle whose cosine is the correlation."""
        size = (self.variance[rows, None] * self.variance).sqrt()
        # acos has no derivative at the ends.
        return size, torch.acos((h / size).clamp(-1 + 1e-15, 1 - 1e-15))

    def _widened(self, rows: Tensor) -> Tensor:
        return ((1 + 2 * self.variance[rows, None]) * (1 + 2 * self.variance)).sqrt()

    def _series(self, coefficients: Tensor, rows: Tensor, h: Tensor) -> Tensor:
        """sum_k c_ik c_jk rho_ij^k, after Horner."""
        rho = (h / (self.variance[rows, None] * self.variance).sqrt()).clamp(-1, 1)
        same = len(coefficients) == 1
        left, right = (None, None) if same else (coefficients[self.which[rows]], coefficients[self.which])
        total = torch.zeros_like(rho)
        for k in range(coefficients.shape[1] - 1, -1, -1):
            factor = coefficients[0, k] ** 2 if left is None or right is None else left[:, k, None] * right[:, k]
            total = torch.addcmul(factor, total, rho)
        return total
