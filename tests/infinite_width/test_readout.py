import pytest
import torch
import torch.nn.functional as F

from perron.infinite_width import match_explicit
from perron.infinite_width.readout import MODELS, Split, feature_map, kernel_distance, normalised, read_out, spectra


def split(n: int, seed: int) -> Split:
    """Two classes on either side of a plane, of unit norm."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 20, generator=generator, dtype=torch.float64)
    y = (x[:, 0] > 0).long()
    x[:, 0] += 2 * (2 * y - 1)
    return Split(X=F.normalize(x), y=y)


@pytest.mark.parametrize("width", [50, 400])
@pytest.mark.parametrize("model", MODELS)
def test_read_outs_learn(model: str, width: int) -> None:
    match = match_explicit("relu", 0.3, 0.7)
    net = feature_map(model, match, 20, width, torch.Generator().manual_seed(0))
    found = read_out(net, split(200, 0), split(100, 1), split(100, 2), 2)
    assert found["test"] > 0.93
    assert found["validation"] > 0.93
    assert found["seconds per sample"] > 0


def test_ridge_in_both_spaces_is_the_same() -> None:
    """More samples than features, and fewer: against the normal equations."""
    for n in (30, 200):
        train, other = split(n, 0), split(50, 1)
        identity = lambda x: torch.cat([x, x**2, x**3], 1)
        found = read_out(identity, train, other, other, 2)
        z, z_test = identity(train.X.float()).double(), identity(other.X.float()).double()
        gram = z.t() @ z
        # The mean eigenvalue of the smaller Gram matrix is the scale of the penalty.
        scale = gram.diagonal().sum() / min(gram.shape[0], n)
        w = torch.linalg.solve(gram + found["penalty"] * scale * torch.eye(60), z.t() @ F.one_hot(train.y, 2).double())
        assert found["test"] == float(((z_test @ w).argmax(1) == other.y).double().mean())


def test_spectra_of_matched_networks_are_nearer() -> None:
    match = match_explicit("tanh", 0.3, 0.7)
    found = spectra(split(80, 0).X, match, top=4)
    assert found.distance["implicit"] == 0
    assert found.distance["matched"] < 0.5 * found.distance["unmatched"]
    assert bool((found.overlap["implicit"] > 1 - 1e-9).all())
    assert bool((found.overlap["matched"] > 0.98).all())
    assert bool((found.eigenvalues["implicit"].diff() <= 0).all())


@pytest.mark.parametrize("model", MODELS)
def test_features_approach_their_own_kernel(model: str) -> None:
    """Not scaled, matched or not; and features that have the kernel are no distance away."""
    match, x = match_explicit("tanh", 0.3, 0.7), split(60, 0).X
    kernel = spectra(x, match, top=2).kernels[model]
    far, near = (
        kernel_distance(feature_map(model, match, 20, w, torch.Generator().manual_seed(1)), x, kernel)
        for w in (100, 1600)
    )
    assert near < 0.12
    assert far > 2.5 * near
    assert kernel_distance(torch.nn.Identity(), x, x @ x.t()) < 1e-6


def test_data_and_models() -> None:
    images = torch.rand(5, 1, 4, 4)
    x = normalised(images, images.flatten(1).double().mean(0))
    assert x.dtype == torch.float64
    assert torch.allclose(x.norm(dim=1), torch.ones(5).double())
    with pytest.raises(ValueError, match="implicit, matched"):
        feature_map("explicit", match_explicit("tanh", 0.3, 0.7), 4, 4, torch.Generator())
