"""Read image data sets from local files into arrays; never downloads, and says what to get from where.

Every reader returns `(images, labels)`: uint8 (n, channels, height, width) and int64 (n,).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from perron._errors import UsageError

__all__ = ["CLASSES", "DataError", "read_cifar10", "read_digits", "read_fashion_mnist", "read_mnist", "read_svhn"]

Split = Literal["train", "test"]
Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]

_DIGIT_CLASSES = tuple(str(d) for d in range(10))
CLASSES: dict[str, tuple[str, ...]] = {
    "digits": _DIGIT_CLASSES,
    "mnist": _DIGIT_CLASSES,
    "fashion-mnist": (
        "T-shirt",
        "trouser",
        "pullover",
        "dress",
        "coat",
        "sandal",
        "shirt",
        "sneaker",
        "bag",
        "ankle boot",
    ),
    "svhn": _DIGIT_CLASSES,
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}

_IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", 60_000),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte", 10_000),
}
_HELP = {
    "mnist": "the four IDX files of yann.lecun.com/exdb/mnist (mirror: ossci-datasets.s3.amazonaws.com/mnist)",
    "fashion-mnist": "the four IDX files of github.com/zalandoresearch/fashion-mnist",
    "svhn": "train_32x32.mat and test_32x32.mat of ufldl.stanford.edu/housenumbers",
    "cifar10": "cifar-10-python.tar.gz of www.cs.toronto.edu/~kriz/cifar.html, unpacked to cifar-10-batches-py, "
    "or a zip of class folders named cifar10-jpeg.zip (train/CLASS/NNNN.jpg, test/CLASS/NNNN.jpg)",
}


class DataError(UsageError):
    """A data file is missing or damaged; the message names it and says how to get it."""


def _get(dataset: str) -> str:
    return f"Get {_HELP[dataset]}, put it into one folder, and name the folder with --data-dir or $PERRON_DATA."


def read_digits(folder: Path | None, split: Split) -> Arrays:
    """scikit-learn's 8x8 digits (1,797 images), embedded: every fifth image, in a fixed shuffle, is a test image."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits data needs scikit-learn: pip install perron[train]") from error
    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    test = np.arange(len(order)) % 5 == 0
    chosen = order[test if split == "test" else ~test]
    images = np.rint(bunch.images[chosen] * (255 / 16)).astype(np.uint8)
    return images[:, None], bunch.target[chosen].astype(np.int64)


def _read_bytes(folder: Path, name: str, dataset: str) -> tuple[bytes, Path]:
    """A file of that name, plain or with .gz behind it, in the folder or in the data set's own folder below it."""
    candidates = [place / (name + suffix) for place in (folder, folder / dataset) for suffix in ("", ".gz")]
    for path in candidates:
        if path.is_file():
            try:
                return (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()), path
            except (OSError, EOFError, zlib.error) as error:
                raise DataError(f"{path} is damaged ({error}). {_get(dataset)}") from error
    raise DataError(f"missing {name} or {name}.gz in {folder} and {folder / dataset}. {_get(dataset)}")


def _read_idx(folder: Path, name: str, shape: tuple[int, ...], dataset: str) -> NDArray[np.uint8]:
    """An IDX file: two zero bytes, type 8 (uint8), the number of dimensions, the dimensions (big endian), the data."""
    raw, path = _read_bytes(folder, name, dataset)
    header = 4 + 4 * len(shape)
    expected = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
    if raw[:header] != expected or len(raw) != header + int(np.prod(shape)):
        raise DataError(
            f"{path} is damaged: expected an IDX file of shape {shape} ({header + int(np.prod(shape))} bytes uncompressed), "
            f"got {len(raw)} bytes starting {raw[:8].hex()}. {_get(dataset)}"
        )
    return np.frombuffer(raw, dtype=np.uint8, offset=header).reshape(shape).copy()


def _idx_reader(dataset: str) -> Callable[[Path | None, Split], Arrays]:
    def read(folder: Path | None, split: Split) -> Arrays:
        if folder is None:
            raise DataError(f"{dataset} is not embedded. {_get(dataset)}")
        images_name, labels_name, count = _IDX_FILES[split]
        images = _read_idx(folder, images_name, (count, 28, 28), dataset)
        labels = _read_idx(folder, labels_name, (count,), dataset)
        if labels.max() > 9:
            raise DataError(f"{labels_name} in {folder} has the label {labels.max()}, expected 0 to 9. {_get(dataset)}")
        return images[:, None], labels.astype(np.int64)

    read.__doc__ = f"{dataset} from its IDX files, gzipped or not."
    return read


read_mnist = _idx_reader("mnist")
read_fashion_mnist = _idx_reader("fashion-mnist")

_CIFAR_COUNTS = {"train": 50_000, "test": 10_000}
# md5 of the members of the standard archive, which are pickles: only the known files are ever unpickled.
_CIFAR_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}


def read_cifar10(folder: Path | None, split: Split) -> Arrays:
    """CIFAR-10 from its standard Python batches, or from a zip of class folders."""
    if folder is None:
        raise DataError(f"cifar10 is not embedded. {_get('cifar10')}")
    for place in (
        folder,
        folder / "cifar10",
        folder / "cifar-10-batches-py",
        folder / "cifar10" / "cifar-10-batches-py",
    ):
        if (place / "test_batch").is_file():
            return _read_cifar_batches(place, split)
        for archive in sorted(place.glob("*cifar*.zip")):
            return _read_cifar_zip(archive, split)
    raise DataError(f"missing cifar-10-batches-py or a *cifar*.zip in {folder}. {_get('cifar10')}")


def _read_cifar_batches(folder: Path, split: Split) -> Arrays:
    names = ["test_batch"] if split == "test" else [f"data_batch_{k}" for k in range(1, 6)]
    images, labels = [], []
    for name in names:
        path = folder / name
        if not path.is_file():
            raise DataError(f"missing {path}. {_get('cifar10')}")
        raw = path.read_bytes()
        found = hashlib.md5(raw, usedforsecurity=False).hexdigest()
        if found != _CIFAR_MD5[name]:
            raise DataError(f"{path} is damaged: md5 {found}, expected {_CIFAR_MD5[name]}. {_get('cifar10')}")
        batch = pickle.loads(raw, encoding="bytes")
        images.append(np.asarray(batch[b"data"], dtype=np.uint8).reshape(-1, 3, 32, 32))
        labels.append(np.asarray(batch[b"labels"], dtype=np.int64))
    return np.concatenate(images), np.concatenate(labels)


def _read_cifar_zip(path: Path, split: Split) -> Arrays:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading images needs Pillow: pip install perron[train]") from error
    expected = _CIFAR_COUNTS[split]
    label = {name: k for k, name in enumerate(CLASSES["cifar10"])}
    images = np.empty((expected, 3, 32, 32), dtype=np.uint8)
    labels = np.empty(expected, dtype=np.int64)
    member = ""
    try:
        with zipfile.ZipFile(path) as archive:
            members = sorted(n for n in archive.namelist() if f"{split}/" in n and n.lower().endswith((".jpg", ".png")))
            if len(members) != expected:
                raise DataError(
                    f"{path} holds {len(members)} images in {split}/, expected {expected}. {_get('cifar10')}"
                )
            for k, member in enumerate(members):
                with Image.open(io.BytesIO(archive.read(member))) as image:
                    images[k] = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
                labels[k] = label[member.split("/")[-2]]
    except (zipfile.BadZipFile, OSError, zlib.error, KeyError, ValueError) as error:
        raise DataError(f"{path} is damaged at {member or 'its directory'} ({error}). {_get('cifar10')}") from error
    return images, labels


_SVHN_COUNTS = {"train": 73_257, "test": 26_032}


def read_svhn(folder: Path | None, split: Split) -> Arrays:
    """SVHN's cropped digits from their MATLAB files; the digit 0 is labelled 10 there."""
    if folder is None:
        raise DataError(f"svhn is not embedded. {_get('svhn')}")
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError("reading MATLAB files needs scipy: pip install perron[train]") from error
    name = f"{split}_32x32.mat"
    path = next((p for p in (folder / name, folder / "svhn" / name) if p.is_file()), None)
    if path is None:
        raise DataError(f"missing {name} in {folder} and {folder / 'svhn'}. {_get('svhn')}")
    try:
        content = loadmat(path)
        images, labels = content["X"], content["y"].reshape(-1).astype(np.int64)
    except Exception as error:
        # A damaged file can raise anything.
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}). {_get('svhn')}") from error
    count = _SVHN_COUNTS[split]
    known = len(labels) > 0 and labels.min() >= 0 and labels.max() <= 10
    if images.shape != (32, 32, 3, count) or images.dtype != np.uint8 or len(labels) != count or not known:
        raise DataError(
            f"{path} holds {images.dtype} images of shape {images.shape} and {len(labels)} labels, expected uint8 "
            f"(32, 32, 3, {count}) and digits 1 to 10. {_get('svhn')}"
        )
    return np.ascontiguousarray(images.transpose(3, 2, 0, 1)), labels % 10
