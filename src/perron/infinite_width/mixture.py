"""High-dimensional Gaussian mixtures, and the structured kernels that those of wide networks approach on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perron.infinite_width.coefficients import KernelCoefficients

__all__ = ["GaussianMixture", "MixtureSample", "spectral_equivalent"]


@dataclass(frozen=True, kw_only=True)
class MixtureSample:
    """Inputs with what the theory needs to know of them.

    Attributes:
        X: (n, p) inputs.
        labels: (n,) int64.
        tau0: root of tr(C0)/p, C0 the covariance of all classes together.
        t: (K,) tr(C_a - C0)/sqrt(p).
        T: (K, K) tr(C_a C_b)/p.
        psi: (n,) |x_i - mu_a/sqrt(p)|^2 - tr(C_a)/p.
    """

    X: Tensor
    labels: Tensor
    tau0: Tensor
    t: Tensor
    T: Tensor
    psi: Tensor

    @property
    def J(self) -> Tensor:
        """(n, K) which class a sample is of."""
        return torch.nn.functional.one_hot(self.labels, len(self.t)).to(self.X)


class GaussianMixture:
    """x = (mu_a + C_a^{1/2} g)/sqrt(p), g standard normal, a one of K classes.

    Args:
        means: (K, p) mu.
        covariances: K symmetric positive semidefinite (p, p) matrices.

    Raises:
        ValueError: shapes do not fit, or a covariance is not symmetric positive semidefinite.

    >>> sample = GaussianMixture(torch.zeros(2, 30), [torch.eye(30), 2 * torch.eye(30)]).sample([10, 10])
    >>> sample.X.shape, round(float(sample.tau0**2), 3)
    (torch.Size([20, 30]), 1.5)
    """

    def __init__(self, means: Tensor, covariances: Sequence[Tensor]) -> None:
        count, p = means.shape if means.dim() == 2 else (0, 0)
        if not count or len(covariances) != count or any(c.shape != (p, p) for c in covariances):
            raise ValueError(
                f"means must be (K, p) with K covariances (p, p), got {tuple(means.shape)}, {len(covariances)}"
            )
        self.means = means.double()
        self.covariances = torch.stack([c.double() for c in covariances])
        self.roots = torch.stack([_root(c, k) for k, c in enumerate(self.covariances)])

    def sample(self, counts: Sequence[int], *, generator: torch.Generator | None = None) -> MixtureSample:
        """So many samples of every class, in this order.

        Raises:
            ValueError: there is not one nonnegative number for every class, or no sample at all.
        """
        if len(counts) != len(self.means) or min(counts) < 0 or sum(counts) == 0:
            raise ValueError(f"a number of samples is needed for each of {len(self.means)} classes, got {list(counts)}")
        p = self.means.shape[1]
        labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        noise = torch.randn(len(labels), p, dtype=torch.float64, generator=generator)
        # The samples are in the order of their classes.
        noise = torch.cat([noise[labels == k] @ root for k, root in enumerate(self.roots)])
        shares = torch.tensor(counts, dtype=torch.float64) / len(labels)
        traces = torch.einsum("kii->k", self.covariances)
        mean_trace = shares @ traces
        return MixtureSample(
            X=(self.means[labels] + noise) / p**0.5,
            labels=labels,
            tau0=(mean_trace / p).sqrt(),
            t=(traces - mean_trace) / p**0.5,
            T=torch.einsum("aij,bji->ab", self.covariances, self.covariances) / p,
            psi=noise.square().sum(1) / p - traces[labels] / p,
        )


def _root(covariance: Tensor, number: int) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    scale = float(values.abs().max()) if len(values) else 0.0
    if not torch.allclose(covariance, covariance.t(), atol=1e-12 * scale) or not float(values[0]) >= -1e-10 * scale:
        raise ValueError(f"covariance {number} is not symmetric positive semidefinite")
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.t()


def spectral_equivalent(
    coefficients: KernelCoefficients, X: Tensor, *, sample: MixtureSample | None = None, refined: bool = False
) -> Tensor:
    """(n, n) the structured matrix that the kernel with these coefficients approaches, in operator norm.

    Args:
        coefficients: of a conjugate or a tangent kernel.
        X: (n, p) inputs.
        sample: what is known of the mixture; without it fluctuations of norms stand for the classes' traces, and squared
            correlations for T, which is no worse.
        refined: whether the diagonal and a1 follow the norms of the inputs: several times nearer.

    Raises:
        ValueError: X is not a finite matrix, or refined of coefficients that do not know how they follow norms.
    """
    x = X.double()
    if x.dim() != 2 or not bool(torch.isfinite(x).all()):
        raise ValueError(f"X must be a finite (n, p) matrix, got shape {tuple(X.shape)}")
    gram = x @ x.t()
    a1, tau0 = coefficients.a1, coefficients.tau0
    chi = gram.diagonal() - tau0**2
    rest = (coefficients.diagonal - a1 * tau0**2).expand_as(chi)
    structured = a1 * gram + (
        _by_norms(coefficients, gram, chi) if sample is None else _by_classes(coefficients, sample)
    )
    if refined:
        if coefficients.diagonal_slope is None or coefficients.gram_slope is None:
            raise ValueError("only coefficients of equilibrium networks know how they follow the norms of inputs")
        cross = coefficients.gram_slope * gram * (chi[:, None] + chi)
        structured = structured + cross - torch.diag(cross.diagonal())
        # a1 S is on the diagonal already.
        rest = rest + (coefficients.diagonal_slope - a1) * chi
    return structured + torch.diag(rest)


def _by_norms(coefficients: KernelCoefficients, gram: Tensor, chi: Tensor) -> Tensor:
    square = coefficients.a3 * gram**2 + coefficients.a2 * torch.outer(chi, chi)
    return square - torch.diag(square.diagonal())


def _by_classes(coefficients: KernelCoefficients, sample: MixtureSample) -> Tensor:
    a2, a3, t = coefficients.a2, coefficients.a3, sample.t.unsqueeze(1)
    v = torch.cat([sample.J / sample.X.shape[1] ** 0.5, sample.psi.unsqueeze(1)], 1)
    inner = torch.cat([a2 * t @ t.t() + a3 * sample.T, a2 * t], 1)
    inner = torch.cat([inner, torch.cat([a2 * t.t(), a2.reshape(1, 1)], 1)])
    return v @ inner @ v.t()
