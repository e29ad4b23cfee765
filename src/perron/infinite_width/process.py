"""Gaussian and Student-t processes on any of these kernels: what a wide network with a random last layer infers from data.

A last layer of Gaussian weights makes a Gaussian process of the network. With an inverse-gamma prior on the variance of
those weights it becomes a Student-t process: the same mean, and variances that the data rescale, with heavier tails.

Source: Lee, Yun, Yang, Lee, "Scale mixtures of neural network Gaussian processes", ICLR 2022; Shah, Wilson, Ghahramani,
"Student-t processes as alternatives to Gaussian processes", AISTATS 2014.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Prediction", "Process"]

# Of the quadrature for probabilities of classes; samples at a time.
_NODES, _BLOCK = 64, 500


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The posterior of every test point and output.

    Attributes:
        mean: (t, outputs).
        scale: (t, outputs) of the distribution: its standard deviation for a Gaussian process.
        freedom: degrees of freedom of the Student-t distribution; None for a Gaussian.
    """

    mean: Tensor
    scale: Tensor
    freedom: float | None

    @property
    def variance(self) -> Tensor:
        """(t, outputs); inf with two degrees of freedom or fewer."""
        if self.freedom is None:
            return self.scale**2
        return self.scale**2 * (self.freedom / (self.freedom - 2) if self.freedom > 2 else math.inf)

    def log_density(self, y: Tensor) -> Tensor:
        """(t, outputs) logarithm of the density at y.

        Raises:
            ValueError: y has another shape.
        """
        if y.shape != self.mean.shape:
            raise ValueError(f"y must be {tuple(self.mean.shape)}, got {tuple(y.shape)}")
        distance = (y.double() - self.mean) / self.scale
        if self.freedom is None:
            return -0.5 * distance**2 - self.scale.log() - 0.5 * math.log(2 * math.pi)
        n = self.freedom
        constant = math.lgamma((n + 1) / 2) - math.lgamma(n / 2) - 0.5 * math.log(math.pi * n)
        return constant - self.scale.log() - (n + 1) / 2 * torch.log1p(distance**2 / n)

    def probabilities(self) -> Tensor:
        """(t, outputs) that an output is the largest of all: of the classes, if outputs are one-hot labels.

        Raises:
            ImportError: scipy is missing.
        """
        try:
            from scipy.special import ndtr, ndtri, stdtr, stdtrit
        except ImportError as error:
            raise ImportError("probabilities of classes need scipy: pip install perron[kernels]") from error
        n = self.freedom
        cumulative = ndtr if n is None else lambda x: stdtr(n, x)
        points, weights = np.polynomial.legendre.leggauss(_NODES)
        # An average over the quantiles of one output of the probability that the others are below.
        quantiles = torch.from_numpy(ndtri((points + 1) / 2) if n is None else stdtrit(n, (points + 1) / 2))
        shares = torch.from_numpy(weights / 2)
        mean, scale = self.mean.cpu(), self.scale.cpu()
        own = torch.eye(mean.shape[1], dtype=torch.bool)[:, None, :]
        found = []
        for m, s in zip(mean.split(_BLOCK), scale.split(_BLOCK), strict=True):
            value = m[:, :, None] + s[:, :, None] * quantiles
            below = torch.from_numpy(cumulative(((value[..., None] - m[:, None, None]) / s[:, None, None]).numpy()))
            found.append(below.masked_fill(own, 1.0).prod(-1) @ shares)
        total = torch.cat(found)
        return (total / total.sum(1, keepdim=True)).to(self.mean)


class Process:
    """Exact inference from a kernel matrix; outputs are independent.

    Args:
        kernel: (n, n) of the training points, symmetric.
        y: (n,) or (n, outputs) what was observed, noise of this variance included; one-hot and centred for classes.
        noise: variance of the noise relative to the kernel's scale, positive.
        shape, rate: None for a Gaussian process, or the inverse-gamma prior's on the scale of every output, which
            multiplies kernel and noise: a Student-t process with 2 shape + n degrees of freedom.

    Raises:
        ValueError: shapes do not fit, a number is out of range or not finite, or kernel + noise is not positive definite.

    >>> K = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    >>> process = Process(K, torch.tensor([1.0, -1.0]), noise=0.1, shape=2.0, rate=2.0)
    >>> prediction = process.predict(torch.tensor([[0.9, 0.4]]), torch.tensor([1.0]))
    >>> prediction.freedom, bool(prediction.variance > 0)
    (6.0, True)
    """

    def __init__(
        self, kernel: Tensor, y: Tensor, *, noise: float, shape: float | None = None, rate: float | None = None
    ) -> None:
        if kernel.dim() != 2 or kernel.shape[0] != kernel.shape[1] or not len(kernel):
            raise ValueError(f"the kernel must be square and not empty, got shape {tuple(kernel.shape)}")
        if y.dim() not in (1, 2) or len(y) != len(kernel):
            raise ValueError(f"y must be ({len(kernel)},) or ({len(kernel)}, outputs), got {tuple(y.shape)}")
        if not 0 < noise < math.inf:
            raise ValueError(f"noise must be positive and finite, got {noise}")
        if (shape is None) != (rate is None) or not all(t is None or 0 < t < math.inf for t in (shape, rate)):
            raise ValueError(f"shape and rate must be given together, positive and finite, got {shape} and {rate}")
        k, self.y = kernel.double(), y.double().reshape(len(y), -1)
        if not bool(torch.isfinite(k).all() and torch.isfinite(self.y).all()):
            raise ValueError("kernel and y must be finite")
        if not torch.allclose(k, k.t(), rtol=1e-6, atol=1e-9 * float(k.abs().max())):
            raise ValueError("the kernel must be symmetric; only half of it would be looked at")
        self.noise, self.shape, self.rate = noise, shape, rate
        system = k + noise * torch.eye(len(k), dtype=k.dtype, device=k.device)
        self.factor, info = torch.linalg.cholesky_ex(system)
        if int(info):
            raise ValueError(f"kernel + noise is not positive definite (noise {noise:g}); raise the noise")
        self.weights = torch.cholesky_solve(self.y, self.factor)

    @property
    def freedom(self) -> float | None:
        """Degrees of freedom of the posterior."""
        return None if self.shape is None else 2 * self.shape + len(self.y)

    @property
    def scales(self) -> Tensor:
        """(outputs,) by which the posterior multiplies the variances of the unit process: 1 for a Gaussian process."""
        if self.shape is None or self.rate is None:
            return torch.ones_like(self.y[0])
        fit = (self.y * self.weights).sum(0)
        return (2 * self.rate + fit) / (2 * self.shape + len(self.y))

    def predict(self, cross: Tensor, diagonal: Tensor) -> Prediction:
        """The posterior of new observations, their noise included.

        Args:
            cross: (t, n) kernel between new and training points.
            diagonal: (t,) kernel of every new point with itself.

        Raises:
            ValueError: shapes do not fit.
        """
        if cross.dim() != 2 or cross.shape[1] != len(self.y) or diagonal.shape != cross.shape[:1]:
            raise ValueError(
                f"cross must be (t, {len(self.y)}) and diagonal (t,), got {tuple(cross.shape)} and {tuple(diagonal.shape)}"
            )
        c = cross.double()
        explained = torch.linalg.solve_triangular(self.factor, c.t(), upper=False).square().sum(0)
        left = (diagonal.double() + self.noise - explained).clamp_min(self.noise * 1e-12)
        return Prediction(mean=c @ self.weights, scale=(left[:, None] * self.scales).sqrt(), freedom=self.freedom)

    def log_evidence(self) -> Tensor:
        """(outputs,) logarithm of the density of the training observations: by it noise, shape and rate are chosen."""
        n, fit = len(self.y), (self.y * self.weights).sum(0)
        volume = self.factor.diagonal().log().sum()
        if self.shape is None or self.rate is None:
            return -0.5 * fit - volume - n / 2 * math.log(2 * math.pi)
        a, b = self.shape, self.rate
        constant = math.lgamma(a + n / 2) - math.lgamma(a) - n / 2 * math.log(2 * math.pi * b) - volume
        return constant - (a + n / 2) * torch.log1p(fit / (2 * b))
