"""Lightning data modules over the readers of `perron.data.sources`.

The validation split is cut from the training set; the test set is read by the `test` stage only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

from perron._errors import UsageError
from perron.data.sources import (
    CLASSES,
    Arrays,
    DataError,
    Split,
    read_cifar10,
    read_digits,
    read_fashion_mnist,
    read_mnist,
    read_svhn,
)

__all__ = ["CIFAR10", "DATA_MODULES", "MNIST", "SVHN", "Digits", "FashionMNIST", "ImageData", "image_data"]


class _EpochBatches(Sampler[list[int]]):
    """Batches of indices, shuffled by (seed, epoch) alone: a resumed run sees the very same batches."""

    def __init__(self, count: int, batch_size: int, seed: int, epoch: int) -> None:
        generator = np.random.default_rng([seed, epoch])
        self.order = generator.permutation(count)
        self.batch_size = batch_size
        # A last batch of one sample has no batch statistics.
        self.full = count - (1 if count % batch_size == 1 and count > 1 else 0)

    def __len__(self) -> int:
        return -(-self.full // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, self.full, self.batch_size):
            yield self.order[start : min(start + self.batch_size, self.full)].tolist()


class ImageData(L.LightningDataModule):
    """Images scaled to [0, 1], then by the training set's mean and standard deviation.

    Args:
        data_dir: folder of the files; default $PERRON_DATA.
        batch_size: of training; validation and test use four times as many.
        validation: fraction of the training set kept for validation, drawn by `seed`.
        seed: of the split and of the shuffling.
        limit: use only so many training images (for a quick look).
        augment: shift training images by up to `augment` pixels, zeros coming in, and mirror half of them; None for neither.
            Drawn from the seed and the number of the step alone.

    Raises:
        DataError: a file is missing or damaged.
        ValueError: an option is out of range.
    """

    name = ""
    read: Callable[[Path | None, Split], Arrays]
    image_shape: tuple[int, int, int] = (1, 28, 28)
    mean: float = 0.0
    std: float = 1.0

    def __init__(
        self,
        data_dir: str | None = None,
        *,
        batch_size: int = 64,
        validation: float = 0.1,
        seed: int = 0,
        limit: int | None = None,
        augment: int | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 2:
            raise ValueError(f"batch_size must be at least 2 (batch normalisation), got {batch_size}")
        if not 0 < validation < 1:
            raise ValueError(f"validation must be a fraction in (0, 1), got {validation}")
        if limit is not None and limit < 20:
            raise ValueError(f"limit must be at least 20, got {limit}")
        if augment is not None and not 0 <= augment < self.image_shape[1]:
            raise ValueError(f"augment must be a number of pixels below {self.image_shape[1]}, got {augment}")
        self.augment = augment
        self.data_dir, self.batch_size, self.validation, self.seed, self.limit = (
            data_dir,
            batch_size,
            validation,
            seed,
            limit,
        )
        self.splits: dict[str, TensorDataset] = {}

    @property
    def classes(self) -> tuple[str, ...]:
        return CLASSES[self.name]

    def _folder(self) -> Path | None:
        given = self.data_dir or os.environ.get("PERRON_DATA")
        if given is None:
            return None
        folder = Path(given).expanduser()
        if not folder.is_dir():
            raise DataError(f"the data folder {folder} does not exist; name another with --data-dir or $PERRON_DATA")
        return folder

    def _tensors(self, images: np.ndarray, labels: np.ndarray) -> TensorDataset:
        scaled = torch.from_numpy(images).float().div_(255).sub_(self.mean).div_(self.std)
        return TensorDataset(scaled, torch.from_numpy(labels))

    def setup(self, stage: str | None = None) -> None:
        """Read what the stage needs: "fit" and "validate" never touch the test files."""
        read = type(self).read
        if stage in ("fit", "validate", None) and "train" not in self.splits:
            images, labels = read(self._folder(), "train")
            order = np.random.default_rng(self.seed).permutation(len(labels))
            if self.limit is not None:
                order = order[: self.limit]
            held = max(1, round(self.validation * len(order)))
            self.splits["validation"] = self._tensors(images[order[:held]], labels[order[:held]])
            self.splits["train"] = self._tensors(images[order[held:]], labels[order[held:]])
        if stage in ("test", "predict", None) and "test" not in self.splits:
            self.splits["test"] = self._tensors(*read(self._folder(), "test"))

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Augment the images of a training step."""
        trainer = self.trainer
        if self.augment is None or trainer is None or not trainer.training:
            return batch
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + trainer.global_step)
        return augmented(batch[0], self.augment, generator), batch[1]

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        data = self.splits["train"]
        epoch = self.trainer.current_epoch if self.trainer is not None else 0
        return _loader(data, _EpochBatches(len(data), self.batch_size, self.seed, epoch))

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self._in_order("validation")

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self._in_order("test")

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self._in_order("test")

    def _in_order(self, split: str) -> DataLoader[tuple[Tensor, Tensor]]:
        data = self.splits[split]
        size = 4 * self.batch_size
        return _loader(data, [list(range(k, min(k + size, len(data)))) for k in range(0, len(data), size)])


def augmented(images: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """Every image, (batch, channels, height, width), moved by up to `shift` pixels and mirrored by a coin."""
    count, _, height, width = images.shape
    moves = torch.randint(0, 2 * shift + 1, (2, count), generator=generator).to(images.device)
    mirrored = (torch.rand(count, generator=generator) < 0.5).to(images.device)
    padded = F.pad(images, [shift] * 4)
    rows = moves[0, :, None] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    columns = moves[1, :, None] + torch.where(mirrored[:, None], columns.flip(0), columns)
    sample = torch.arange(count, device=images.device)[:, None, None]
    # Indexing puts the channels last.
    return padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _loader(data: Dataset, batches: object) -> DataLoader[tuple[Tensor, Tensor]]:
    # One indexing operation per batch instead of one per image.
    return DataLoader(data, sampler=batches, batch_size=None)  # type: ignore[arg-type]


class Digits(ImageData):
    """scikit-learn's 8x8 digits, embedded."""

    name = "digits"
    read = staticmethod(read_digits)
    image_shape = (1, 8, 8)
    mean, std = 0.305, 0.376


class MNIST(ImageData):
    """MNIST, 28x28, from IDX files."""

    name = "mnist"
    read = staticmethod(read_mnist)
    mean, std = 0.1307, 0.3081


class FashionMNIST(ImageData):
    """Fashion-MNIST, 28x28, from IDX files."""

    name = "fashion-mnist"
    read = staticmethod(read_fashion_mnist)
    mean, std = 0.2860, 0.3530


class CIFAR10(ImageData):
    """CIFAR-10, 3x32x32, from the standard batches or a zip of class folders."""

    name = "cifar10"
    read = staticmethod(read_cifar10)
    image_shape = (3, 32, 32)
    mean, std = 0.4734, 0.2516


class SVHN(ImageData):
    """Street View House Numbers, 3x32x32, from the cropped digits' MATLAB files."""

    name = "svhn"
    read = staticmethod(read_svhn)
    image_shape = (3, 32, 32)
    # Of the published per-channel values (0.438, 0.444, 0.473; 0.198, 0.201, 0.197), the means.
    mean, std = 0.4516, 0.1987


DATA_MODULES: dict[str, type[ImageData]] = {c.name: c for c in (Digits, MNIST, FashionMNIST, CIFAR10, SVHN)}


def image_data(name: str) -> type[ImageData]:
    """The data module of this name.

    Raises:
        UsageError: there is none.
    """
    if name not in DATA_MODULES:
        raise UsageError(f"unknown data {name!r}; choose one of {', '.join(DATA_MODULES)}")
    return DATA_MODULES[name]
