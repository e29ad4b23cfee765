import pytest
import torch

from perron.models import PRESETS, PositiveConcaveConvNet, PositiveConcaveLinearNet
from perron.theory import certify


def norm(width: int) -> int:
    return 2 * width


def linear(pixels: int, width: int, classes: int = 10) -> int:
    return (pixels + 1) * width + norm(width) + width**2 + norm(width) + (width + 1) * classes


def conv(channels: int, widths: tuple[int, ...], classes: int = 10) -> int:
    total = 0
    for before, width in zip((channels, *widths), widths, strict=False):
        total += (9 * before + 1) * width + norm(width) + 9 * width**2 + norm(width)
    return total


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("mnist-linear", linear(784, 80)),
        ("mnist-conv", conv(1, (82,)) + (82 * 16 + 1) * 10),
        # 28 -> 14 -> 7 pixels: pooled by one, 7x7 remain.
        ("mnist-multi", conv(1, (12, 24, 48)) + (48 * 49 + 1) * 10),
        ("cifar10-conv", conv(3, (125,)) + (125 * 16 + 1) * 10),
        ("cifar10-multi", conv(3, (20, 50, 80)) + (80 * 16 + 1) * 10),
        ("cifar10-augmented", conv(3, (100, 120, 140)) + (140 * 16 + 1) * 10),
    ],
)
def test_parameter_counts(name: str, count: int) -> None:
    kind, arguments = PRESETS[name]
    assert sum(p.numel() for p in kind(**arguments).parameters()) == count


def test_mnist_linear_by_hand() -> None:
    kind, arguments = PRESETS["mnist-linear"]
    assert sum(p.numel() for p in kind(**arguments).parameters()) == 62_800 + 160 + 6_400 + 160 + 810


@pytest.mark.parametrize("activation", ["tanh", "softsign", "relu6", "sigmoid"])
def test_networks_train_and_are_certified(activation: str) -> None:
    nets = [
        (PositiveConcaveLinearNet(64, 10, width=12, activation=activation), torch.randn(6, 1, 8, 8)),
        (PositiveConcaveConvNet(1, 10, widths=(3, 4), image_size=8, activation=activation), torch.randn(6, 1, 8, 8)),
    ]
    for net, x in nets:
        logits = net(x)
        assert logits.shape == (6, 10)
        logits.square().sum().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
        assert certify(net)


def test_too_small_images() -> None:
    with pytest.raises(ValueError, match="pixels"):
        PositiveConcaveConvNet(1, 10, widths=(3, 4, 5), image_size=8)


def test_a_network_can_be_sliced() -> None:
    net = PositiveConcaveLinearNet(6, width=4).eval()
    x = torch.randn(3, 6)
    torch.testing.assert_close(net[3:](net[:3](x)), net(x))
