import gzip
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from perron.data import CIFAR10, MNIST, SVHN, DataError, Digits, FashionMNIST
from perron.data.modules import augmented
from perron.data.sources import CLASSES, read_cifar10, read_digits, read_fashion_mnist, read_mnist, read_svhn

SHARED = Path(os.environ.get("PERRON_DATA", Path(__file__).parents[3] / "shared" / "data"))


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def test_digits_are_split_without_overlap() -> None:
    train, test = read_digits(None, "train"), read_digits(None, "test")
    assert len(train[1]) + len(test[1]) == 1797
    assert len(test[1]) == 360
    assert train[0].shape[1:] == (1, 8, 8)
    assert train[0].dtype == np.uint8


def test_modules_split_and_stages() -> None:
    data = Digits(validation=0.2, seed=3)
    data.setup("fit")
    assert "test" not in data.splits, "fit must not read the test set"
    assert len(data.splits["train"]) + len(data.splits["validation"]) == 1437
    again = Digits(validation=0.2, seed=3)
    again.setup("fit")
    assert (again.splits["train"].tensors[1] == data.splits["train"].tensors[1]).all()
    first = [y.tolist() for _, y in data.train_dataloader()]
    assert sum(map(len, first)) == len(data.splits["train"])
    assert min(map(len, first)) > 1, "no batch of one sample: it has no batch statistics"
    assert first == [y.tolist() for _, y in data.train_dataloader()]
    with pytest.raises(ValueError, match="batch_size"):
        Digits(batch_size=1)
    with pytest.raises(ValueError, match="validation"):
        Digits(validation=1.0)


def test_missing_files_are_named(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("PERRON_DATA", raising=False)
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.*PERRON_DATA"):
        read_mnist(tmp_path, "train")
    with pytest.raises(DataError, match="zalandoresearch"):
        read_fashion_mnist(tmp_path, "test")
    with pytest.raises(DataError, match="cifar-10-python"):
        read_cifar10(tmp_path, "test")
    with pytest.raises(DataError, match="not embedded"):
        MNIST().setup("fit")
    with pytest.raises(DataError, match="does not exist"):
        MNIST(str(tmp_path / "nowhere")).setup("fit")


def test_idx_round_trip_and_damage(tmp_path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (10_000, 28, 28), dtype=np.uint8)
    labels = np.random.default_rng(0).integers(0, 10, 10_000).astype(np.uint8)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(labels))
    packed = gzip.compress(idx(images), 1)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(packed)
    x, y = read_mnist(tmp_path, "test")
    assert (x[:, 0] == images).all()
    assert (y == labels).all()
    for damage in (packed[:-100], b"not gzip at all", gzip.compress(idx(images)[:-5], 1), gzip.compress(b"", 1)):
        path.write_bytes(damage)
        with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz is damaged"):
            read_mnist(tmp_path, "test")
    path.write_bytes(packed)
    labels[7] = 200
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(labels))
    with pytest.raises(DataError, match="label 200"):
        read_mnist(tmp_path, "test")


def test_damaged_cifar(tmp_path) -> None:
    archive = tmp_path / "cifar10-jpeg.zip"
    archive.write_bytes(b"PK not a zip")
    with pytest.raises(DataError, match=r"cifar10-jpeg\.zip is damaged"):
        read_cifar10(tmp_path, "test")
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("test/cat/0001.jpg", b"x")
    with pytest.raises(DataError, match="holds 1 images in test/, expected 10000"):
        read_cifar10(tmp_path, "test")
    archive.unlink()
    (tmp_path / "test_batch").write_bytes(b"cos\nsystem\n(S'echo unsafe'\ntR.")
    with pytest.raises(DataError, match="md5"):
        read_cifar10(tmp_path, "test")


def test_cifar_zip(tmp_path, monkeypatch) -> None:
    from PIL import Image

    monkeypatch.setattr("perron.data.sources._CIFAR_COUNTS", {"train": 20, "test": 10})
    with zipfile.ZipFile(tmp_path / "cifar10.zip", "w") as file:
        for k, name in enumerate(CLASSES["cifar10"]):
            buffer = io.BytesIO()
            Image.new("RGB", (32, 32), (20 * k, 0, 0)).save(buffer, "PNG")
            file.writestr(f"test/{name}/0000.png", buffer.getvalue())
    x, y = read_cifar10(tmp_path, "test")
    assert sorted(y.tolist()) == list(range(10))
    assert (x[:, 0, 0, 0] == 20 * y).all()


@pytest.mark.skipif(not (SHARED / "mnist").is_dir(), reason="real data sets not present")
def test_real_files() -> None:
    for module in (MNIST, FashionMNIST):
        data = module(str(SHARED))
        data.setup()
        x, _ = data.splits["train"].tensors
        assert abs(float(x.mean())) < 0.01
        assert abs(float(x.std()) - 1) < 0.01
        assert len(data.splits["test"]) == 10_000
    assert CIFAR10.image_shape == (3, 32, 32)


def svhn(folder: Path, monkeypatch, **changes: np.ndarray) -> None:
    """A small file of SVHN's form."""
    from scipy.io import savemat

    monkeypatch.setattr("perron.data.sources._SVHN_COUNTS", {"train": 5, "test": 5})
    images = np.arange(32 * 32 * 3 * 5).reshape(32, 32, 3, 5).astype(np.uint8)
    labels = np.array([[10], [1], [2], [9], [10]], np.uint8)
    folder.mkdir(exist_ok=True)
    savemat(folder / "train_32x32.mat", {"X": images, "y": labels, **changes})


def test_svhn_is_read_and_checked(tmp_path, monkeypatch) -> None:
    svhn(tmp_path / "svhn", monkeypatch)
    images, labels = read_svhn(tmp_path, "train")
    assert images.shape == (5, 3, 32, 32)
    assert images.flags.c_contiguous
    assert labels.tolist() == [0, 1, 2, 9, 0]
    # Rows, columns, channels, images in the file.
    assert images[4, 2, 1, 7] == (((1 * 32 + 7) * 3 + 2) * 5 + 4) % 256
    data = SVHN(str(tmp_path))
    data.setup("fit")
    assert data.classes[0] == "0"
    with pytest.raises(DataError, match=r"missing test_32x32.mat.*housenumbers"):
        read_svhn(tmp_path, "test")
    with pytest.raises(DataError, match="not embedded"):
        read_svhn(None, "test")


@pytest.mark.parametrize(
    "changes",
    [
        {"X": np.zeros((32, 32, 3, 4), np.uint8)},
        {"X": np.zeros((32, 32, 3, 5), np.float64)},
        {"y": np.array([[1], [2], [3], [4], [11]], np.uint8)},
        {"y": np.zeros((0, 0), np.uint8)},
    ],
)
def test_damaged_svhn_is_refused(tmp_path, monkeypatch, changes) -> None:
    svhn(tmp_path, monkeypatch, **changes)
    with pytest.raises(DataError, match=r"train_32x32.mat holds.*expected"):
        read_svhn(tmp_path, "train")
    (tmp_path / "train_32x32.mat").write_bytes(b"no MATLAB file")
    with pytest.raises(DataError, match="damaged"):
        read_svhn(tmp_path, "train")


def test_augmentation_moves_and_mirrors() -> None:
    images = torch.rand(200, 2, 6, 5)
    found = augmented(images, 2, torch.Generator().manual_seed(0))
    assert torch.equal(found, augmented(images, 2, torch.Generator().manual_seed(0)))
    seen = set()
    for image, new in zip(images, found, strict=True):
        matches = []
        for mirrored in (False, True):
            for down in range(-2, 3):
                for right in range(-2, 3):
                    # What is moved out is lost, zeros come in.
                    moved = torch.zeros(2, 10, 9)
                    moved[:, 2 + down : 8 + down, 2 + right : 7 + right] = image
                    moved = moved[:, 2:8, 2:7]
                    if torch.equal(moved.flip(2) if mirrored else moved, new):
                        matches.append((mirrored, down, right))
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 40
    assert torch.equal(augmented(images, 0, torch.Generator()).sort(-1).values, images.sort(-1).values)
    with pytest.raises(ValueError, match="augment"):
        Digits(augment=8)


def test_augmentation_is_for_training_only() -> None:
    class Trainer:
        training, global_step = True, 3

    data, batch = Digits(augment=1), (torch.rand(4, 1, 8, 8), torch.zeros(4))
    assert data.on_after_batch_transfer(batch, 0) is batch
    data.trainer = Trainer()
    first = data.on_after_batch_transfer(batch, 0)[0]
    assert torch.equal(first, data.on_after_batch_transfer(batch, 0)[0])
    Trainer.global_step = 4
    assert not torch.equal(first, data.on_after_batch_transfer(batch, 0)[0])
    Trainer.training = False
    assert data.on_after_batch_transfer(batch, 0) is batch
