import math

import pytest
import torch

from perron.infinite_width import (
    GaussianMixture,
    ck_coefficients,
    explicit_ck,
    explicit_coefficients,
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


@pytest.mark.parametrize("name", ["relu", "tanh", "swish"])
def test_refined_forms_follow_the_norms(name: str) -> None:
    """Without labels, of all three kernels: nearer, and faster than the root of the dimension."""
    errors = []
    for p in (100, 400):
        sample = classes(p)
        found = implicit_kernels(sample.X, name, 0.3, 0.7)
        row = []
        for kernel, coefficients in (
            (found.ck, ck_coefficients(found.state)),
            (found.ntk("Av"), ntk_coefficients(found.state, "Av")),
            (found.ntk("ABv"), ntk_coefficients(found.state, "ABv")),
        ):
            plain, refined = (
                distance(kernel, spectral_equivalent(coefficients, sample.X, refined=r)) for r in (False, True)
            )
            assert refined < 0.45 * plain
            row.append(refined)
        errors.append(row)
    for early, late in zip(*errors, strict=True):
        assert late < 0.45 * early
    explicit, _ = explicit_coefficients([name], 1.0)
    with pytest.raises(ValueError, match="only coefficients of equilibrium"):
        spectral_equivalent(explicit, sample.X, refined=True)


def test_slopes_of_the_coefficients() -> None:
    """Against finite differences: kernels of two inputs whose norms change, the network's tau and shift fixed."""
    e1, e2 = torch.eye(2, 3, dtype=torch.float64)
    step, cosine = 1e-4, 1e-3
    for name in ("tanh", "swish"):
        state = solve_state(name, 0.3, 0.7, 1.0)
        for trained in (None, "Av", "ABv"):
            coefficients = ck_coefficients(state) if trained is None else ntk_coefficients(state, trained)
            diagonals, grams = [], []
            for sign in (-1, 1):
                first = math.sqrt(1 + sign * step) * e1
                second = cosine * e1 + math.sqrt(1 - cosine**2) * e2
                # The mean squared norm stays 1.
                third = torch.tensor([0, 0, math.sqrt(1 - sign * step)], dtype=torch.float64)
                found = implicit_kernels(torch.stack([first, second, third]), name, 0.3, 0.7)
                kernel = found.ck if trained is None else found.ntk(trained)
                diagonals.append(float(kernel[0, 0]))
                # An odd function of the correlation but for what does not depend on it.
                mirrored = implicit_kernels(torch.stack([first, -second, third]), name, 0.3, 0.7)
                against = mirrored.ck if trained is None else mirrored.ntk(trained)
                product = float(first @ second)
                grams.append(float(kernel[0, 1] - against[0, 1]) / (2 * product))
            assert (diagonals[1] - diagonals[0]) / (2 * step) == pytest.approx(
                float(coefficients.diagonal_slope), rel=1e-4
            )
            assert (grams[1] - grams[0]) / (2 * step) == pytest.approx(
                float(coefficients.gram_slope), rel=1e-2, abs=1e-8
            )


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
