"""Linear read-out on frozen random features: how equilibrium, matched and unmatched networks compare at finite width.

Accuracy does not discriminate between them (equal accuracies prove nothing); the distance of their kernels does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from perron.infinite_width.activations import ScalarFunction, scalar_function
from perron.infinite_width.kernels import explicit_ck, implicit_kernels
from perron.infinite_width.matching import Match
from perron.infinite_width.networks import ExplicitEquivalent, GaussianEquilibrium
from perron.solvers import Auto

__all__ = ["MODELS", "Spectra", "Split", "feature_map", "kernel_distance", "normalised", "read_out", "spectra"]

MODELS = ("implicit", "matched", "unmatched")

# Ridge penalties, relative to the mean eigenvalue of the features' Gram matrix.
_PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
# Samples whose features are computed at a time.
_BATCH = 1000
_REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Split:
    """Inputs (n, p) and labels (n,)."""

    X: Tensor
    y: Tensor


def normalised(images: Tensor, mean: Tensor) -> Tensor:
    """Flattened, less the mean, every row of unit norm: what the theory asks of data."""
    return F.normalize(images.flatten(1).double() - mean)


def feature_map(
    model: str, match: Match, in_features: int, width: int, generator: torch.Generator
) -> Callable[[Tensor], Tensor]:
    """The frozen network of a model, float32: "implicit" solves for its equilibrium, the others are explicit.

    Raises:
        ValueError: the model is unknown.
    """
    if model not in MODELS:
        raise ValueError(f"unknown model {model!r}; choose one of {', '.join(MODELS)}")
    state = match.state
    tau0 = float(state.tau0)
    if model == "implicit":
        return GaussianEquilibrium(
            in_features,
            width,
            state.phi,
            sa=float(state.sa),
            sb=float(state.sb),
            tau0=tau0,
            solver=Auto(tol=1e-4, on_failure="ignore"),
            generator=generator,
        )
    layers: tuple[str | ScalarFunction, ...] = match.activations if model == "matched" else (state.phi,)
    return ExplicitEquivalent(in_features, width, layers, tau0, generator=generator)


@torch.no_grad()
def _features(net: Callable[[Tensor], Tensor], X: Tensor) -> Tensor:
    return torch.cat([net(part.float()) for part in X.split(_BATCH)]).double()


@torch.no_grad()
def read_out(
    net: Callable[[Tensor], Tensor], train: Split, validation: Split, test: Split, classes: int
) -> dict[str, float]:
    """Ridge regression on the features, its penalty chosen on the validation set.

    Args:
        net: (n, p) inputs to (n, width) features.
        train, validation, test: the data.
        classes: number of labels.

    Returns:
        accuracies on "validation" and "test", "penalty", and "seconds per sample" for the test features.
    """
    z, z_validation = _features(net, train.X), _features(net, validation.X)
    z_test = _features(net, test.X)
    targets = F.one_hot(train.y, classes).double()
    # In the smaller of both spaces.
    values, vectors = torch.linalg.eigh(z.t() @ z if z.shape[1] <= len(z) else z @ z.t())
    scale = values.clamp_min(0).mean()

    def weights(penalty: float) -> Tensor:
        inverse = 1 / (values.clamp_min(0) + penalty * scale)
        if z.shape[1] <= len(z):
            return vectors @ (inverse[:, None] * (vectors.t() @ (z.t() @ targets)))
        return z.t() @ (vectors @ (inverse[:, None] * (vectors.t() @ targets)))

    best = max((_accuracy(z_validation @ weights(p), validation.y), p) for p in _PENALTIES)
    return {
        "validation": best[0],
        "test": _accuracy(z_test @ weights(best[1]), test.y),
        "penalty": best[1],
        "seconds per sample": _seconds(net, test.X[:_BATCH]),
    }


def kernel_distance(net: Callable[[Tensor], Tensor], X: Tensor, kernel: Tensor) -> float:
    """Relative Frobenius norm of the difference between the features' Gram matrix and the kernel of infinite width.

    Falls with the root of the width: one draw of a Monte Carlo estimate.
    """
    z = _features(net, X)
    return float((z @ z.t() - kernel).norm() / kernel.norm())


def _seconds(net: Callable[[Tensor], Tensor], X: Tensor) -> float:
    """Of the features of a sample in a batch: the least of several times, since whatever disturbs adds to it."""
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        _features(net, X)
        times.append(time.perf_counter() - start)
    return min(times) / len(X)


def _accuracy(scores: Tensor, y: Tensor) -> float:
    return float((scores.argmax(1) == y).double().mean())


@dataclass(frozen=True, kw_only=True)
class Spectra:
    """The conjugate kernels of infinitely wide networks on one data set, compared.

    Attributes:
        eigenvalues: by model, (n,) falling; the unmatched kernel scaled to the diagonal of the implicit one.
        distance: by model, operator norm of the difference to the implicit kernel, relative to it.
        overlap: by model, (top,) |cosine| between its leading eigenvectors and those of the implicit kernel.
        kernels: by model, (n, n), not scaled: what its features approach.
    """

    eigenvalues: dict[str, Tensor]
    distance: dict[str, float]
    overlap: dict[str, Tensor]
    kernels: dict[str, Tensor]


def spectra(X: Tensor, match: Match, *, top: int = 10) -> Spectra:
    """Of the equilibrium network, the matched one, and the same function in one layer, its diagonal matched.

    Args:
        X: (n, p) inputs.
        match: what the matched network is made of.
        top: leading eigenvectors.
    """
    state = match.state
    wanted = implicit_kernels(X, state.phi, state.sa, state.sb).ck
    plain = explicit_ck(X, [scalar_function(state.phi)])
    kernels = {
        "implicit": wanted,
        "matched": explicit_ck(X, match.activations),
        "unmatched": plain,
    }
    # The unmatched features, too, may be scaled: a read-out does not see it.
    scaled = {**kernels, "unmatched": plain * (wanted.diagonal().mean() / plain.diagonal().mean())}
    found = {name: torch.linalg.eigh(kernel) for name, kernel in scaled.items()}
    leading = {name: vectors[:, -top:].flip(1) for name, (_, vectors) in found.items()}
    size = float(found["implicit"][0].abs().max())
    return Spectra(
        eigenvalues={name: values.flip(0) for name, (values, _) in found.items()},
        distance={name: float(torch.linalg.eigvalsh(k - wanted).abs().max()) / size for name, k in scaled.items()},
        overlap={name: (v * leading["implicit"]).sum(0).abs() for name, v in leading.items()},
        kernels=kernels,
    )
