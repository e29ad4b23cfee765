import math

import pytest
import torch

from perron.kernels import (
    GaussianMixture,
    ck_coefficients,
    explicit_ck,
    implicit_kernels,
    match_explicit,
    ntk_coefficients,
    solve_state,
    spectral_equivalent,
)


def classes(p: int, seed: int = 0):
    """Identity, a scaled identity, and AR(0.5); n = p."""
    place = torch.arange(p, dtype=torch.float64)
    ar = 0.5 ** (place[:, None] - place).abs()
    means = torch.zeros(3, p)
    means[1, :3], means[2, 3:6] = 2.0, -2.0
    scaled = (1 + 4 / math.sqrt(p)) * torch.eye(p)
    mixture = GaussianMixture(means, [torch.eye(p), scaled, ar])
    counts = [p // 3, p // 3, p - 2 * (p // 3)]
    return mixture.sample(counts, generator=torch.Generator().manual_seed(seed))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(a - b, 2))


@pytest.mark.parametrize("name", ["relu", "tanh"])
def test_kernels_approach_their_structured_form(name: str) -> None:
    errors = []
    for p in (100, 400):
        sample = classes(p)
        state = solve_state(name, 0.3, 0.7, float(sample.tau0))
        found = implicit_kernels(sample.X, name, 0.3, 0.7)
        with_labels = spectral_equivalent(ck_coefficients(state), sample.X, sample=sample)
        without = spectral_equivalent(ck_coefficients(state), sample.X)
        tangent = spectral_equivalent(ntk_coefficients(state, "ABv"), sample.X, sample=sample)
        errors.append(
            (distance(found.ck, with_labels), distance(found.ck, without), distance(found.ntk("ABv"), tangent))
        )
    for early, late in zip(*errors, strict=True):
        assert late < 0.72 * early
    assert errors[1][0] < 0.3


def test_matched_kernels_are_nearer_than_unmatched_ones() -> None:
    sample = classes(300)
    x = torch.nn.functional.normalize(sample.X)
    for name in ("tanh", "relu"):
        wanted = implicit_kernels(x, name, 0.3, 0.7).ck
        match = match_explicit(name, 0.3, 0.7, 1.0)
        matched = distance(explicit_ck(x, match.activations), wanted)
        # The same activation, the diagonal matched by a factor.
        plain = explicit_ck(x, [name])
        plain = plain * (wanted.diagonal().mean() / plain.diagonal().mean())
        assert matched < 0.2 * distance(plain, wanted)


def test_samples_have_the_moments_of_their_classes() -> None:
    sample = classes(300)
    assert sample.X.shape == (300, 300)
    assert sample.J.sum(0).tolist() == [100, 100, 100]
    assert float(sample.X.square().sum(1).mean()) == pytest.approx(float(sample.tau0**2), rel=0.05)
    assert float(sample.T[0, 1]) == pytest.approx(1 + 4 / math.sqrt(300), rel=1e-6)
    ar = sample.X[200:] - sample.X[200:].mean(0)
    assert float((ar[:, 1:] * ar[:, :-1]).sum(1).mean()) == pytest.approx(0.5, abs=0.03)
    again = classes(300)
    assert torch.equal(sample.X, again.X)
    small = GaussianMixture(torch.zeros(1, 4), [torch.diag(torch.tensor([4.0, 1.0, 1.0, 0.0]))]).sample([20])
    assert bool((small.X[:, 3] == 0).all())


def test_misuse() -> None:
    with pytest.raises(ValueError, match="means"):
        GaussianMixture(torch.zeros(2, 3), [torch.eye(3)])
    with pytest.raises(ValueError, match="covariance 0 is not"):
        GaussianMixture(torch.zeros(1, 2), [torch.diag(torch.tensor([1.0, -1.0]))])
    with pytest.raises(ValueError, match="covariance 0 is not"):
        GaussianMixture(torch.zeros(1, 2), [torch.tensor([[1.0, 0.5], [0.0, 1.0]])])
    mixture = GaussianMixture(torch.zeros(2, 3), [torch.eye(3)] * 2)
    for counts in ([1], [0, 0], [-1, 3]):
        with pytest.raises(ValueError, match="number of samples"):
            mixture.sample(counts)
    with pytest.raises(ValueError, match="finite"):
        spectral_equivalent(ck_coefficients(solve_state("relu", 0.3, 0.7, 1.0)), torch.full((2, 2), torch.nan))
