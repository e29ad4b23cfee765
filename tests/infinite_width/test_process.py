import math

import numpy as np
import pytest
import torch
from scipy import stats

from perron.infinite_width import implicit_ck
from perron.infinite_width.process import Prediction, Process


def problem(n: int = 12, t: int = 5):
    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(n + t, 8, dtype=torch.float64))
    k = implicit_ck(x, "tanh", 0.3, 0.7)
    y = torch.sin(3 * x[:, 0]) + 0.1 * torch.randn(n + t, dtype=torch.float64)
    return k[:n, :n], y[:n], k[n:, :n], k.diagonal()[n:], y[n:]


def test_gaussian_posterior_is_that_of_the_joint_distribution() -> None:
    k, y, cross, own, new = problem()
    found = Process(k, y, noise=0.05).predict(cross, own)
    whole = torch.cat([torch.cat([k, cross.t()], 1), torch.cat([cross, torch.zeros(5, 5)], 1)])
    for i in range(5):
        joint = whole[[*range(12), 12 + i]][:, [*range(12), 12 + i]].clone()
        joint[-1, -1] = own[i]
        joint += 0.05 * torch.eye(13, dtype=torch.float64)
        # log p(new | y) = log p(new, y) - log p(y)
        both = stats.multivariate_normal(cov=joint.numpy()).logpdf(np.append(y, new[i]))
        alone = stats.multivariate_normal(cov=joint[:12, :12].numpy()).logpdf(y.numpy())
        assert float(found.log_density(new[:, None])[i]) == pytest.approx(both - alone, rel=1e-9)
    assert float(Process(k, y, noise=0.05).log_evidence()) == pytest.approx(alone, rel=1e-9)


def test_student_posterior_is_that_of_the_joint_distribution() -> None:
    """A multivariate t with 2a degrees of freedom and shape (b/a)(K + noise)."""
    k, y, cross, own, new = problem()
    a, b = 1.7, 0.6
    process = Process(k, y, noise=0.05, shape=a, rate=b)
    found = process.predict(cross, own)
    assert found.freedom == 2 * a + 12
    for i in range(5):
        joint = torch.zeros(13, 13, dtype=torch.float64)
        joint[:12, :12], joint[12, :12], joint[:12, 12], joint[12, 12] = k, cross[i], cross[i], own[i]
        joint += 0.05 * torch.eye(13, dtype=torch.float64)
        both = stats.multivariate_t(shape=(b / a * joint).numpy(), df=2 * a).logpdf(np.append(y, new[i]))
        alone = stats.multivariate_t(shape=(b / a * joint[:12, :12]).numpy(), df=2 * a).logpdf(y.numpy())
        assert float(found.log_density(new[:, None])[i]) == pytest.approx(both - alone, rel=1e-8)
    assert float(process.log_evidence()) == pytest.approx(alone, rel=1e-9)


def test_a_narrow_prior_is_a_gaussian_process() -> None:
    k, y, cross, own, new = problem()
    gauss = Process(k, y, noise=0.05).predict(cross, own)
    student = Process(k, y, noise=0.05, shape=1e8, rate=1e8).predict(cross, own)
    torch.testing.assert_close(student.mean, gauss.mean)
    torch.testing.assert_close(student.variance, gauss.variance, rtol=1e-5, atol=0)
    torch.testing.assert_close(student.log_density(new[:, None]), gauss.log_density(new[:, None]), rtol=1e-4, atol=1e-5)


def test_the_scale_follows_the_data() -> None:
    """A Gaussian process does not notice that all observations are ten times as large."""
    k, y, cross, own, _ = problem()
    one, ten = (Process(k, s * y, noise=0.05, shape=1e-6, rate=1e-6).predict(cross, own) for s in (1, 10))
    torch.testing.assert_close(ten.scale, 10 * one.scale, rtol=1e-4, atol=0)
    fixed = [Process(k, s * y, noise=0.05).predict(cross, own).scale for s in (1, 10)]
    torch.testing.assert_close(*fixed)


def test_several_outputs_are_independent() -> None:
    k, y, cross, own, new = problem()
    both = Process(k, torch.stack([y, 2 * y], 1), noise=0.05, shape=2.0, rate=1.0)
    found = both.predict(cross, own)
    alone = Process(k, 2 * y, noise=0.05, shape=2.0, rate=1.0).predict(cross, own)
    torch.testing.assert_close(found.mean[:, 1:], alone.mean)
    torch.testing.assert_close(found.scale[:, 1:], alone.scale)
    assert both.log_evidence().shape == (2,)
    with pytest.raises(ValueError, match="y must be"):
        found.log_density(new)


@pytest.mark.parametrize("freedom", [None, 2.5, 400.0])
def test_probabilities_of_classes(freedom: float | None) -> None:
    """Against as many draws as tell a thousandth, and for two Gaussians in closed form."""
    rng = np.random.default_rng(0)
    mean, scale = (
        torch.tensor([[0.0, 0.5, 1.0], [3.0, 0.0, -1.0]]).double(),
        torch.tensor([[1.0, 2.0, 0.3], [1.0, 1.0, 4.0]]).double(),
    )
    found = Prediction(mean=mean, scale=scale, freedom=freedom).probabilities()
    assert torch.allclose(found.sum(1), torch.ones(2).double())
    draws = rng.standard_normal((400_000, 3)) if freedom is None else rng.standard_t(freedom, (400_000, 3))
    for row in range(2):
        largest = (mean[row].numpy() + scale[row].numpy() * draws).argmax(1)
        share = np.bincount(largest, minlength=3) / len(draws)
        assert found[row].numpy() == pytest.approx(share, abs=4e-3)
    if freedom is None:
        two = Prediction(mean=mean[:, :2], scale=scale[:, :2], freedom=None).probabilities()[:, 0]
        wanted = stats.norm.cdf((mean[:, 0] - mean[:, 1]) / scale[:, :2].norm(dim=1))
        assert two.numpy() == pytest.approx(wanted, abs=1e-4)
    assert Prediction(mean=mean[:0], scale=scale[:0], freedom=freedom).probabilities().shape == (0, 3)


def test_misuse_and_heavy_tails() -> None:
    k, y, cross, own, _ = problem()
    for options in ({"noise": 0.0}, {"noise": 1.0, "shape": 1.0}, {"noise": 1.0, "shape": -1.0, "rate": 1.0}):
        with pytest.raises(ValueError, match="positive"):
            Process(k, y, **options)
    with pytest.raises(ValueError, match="square"):
        Process(k[:3], y[:3], noise=0.1)
    with pytest.raises(ValueError, match="y must be"):
        Process(k, y[:3], noise=0.1)
    with pytest.raises(ValueError, match="finite"):
        Process(k, torch.where(y > 0, y, torch.nan), noise=0.1)
    with pytest.raises(ValueError, match="symmetric"):
        Process(k + torch.triu(torch.ones(12, 12), 1), y, noise=0.1)
    with pytest.raises(ValueError, match="positive definite"):
        Process(-k, y, noise=0.1)
    with pytest.raises(ValueError, match="cross must be"):
        Process(k, y, noise=0.1).predict(cross[:, :3], own)
    one = torch.ones(1, 1, dtype=torch.float64)
    assert Prediction(mean=one, scale=one, freedom=2.0).variance == math.inf
