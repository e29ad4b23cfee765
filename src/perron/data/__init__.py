"""Data sets for the examples and presets: digits embedded, others from a folder. Needs perron[train]."""

from perron.data.modules import CIFAR10, DATA_MODULES, MNIST, Digits, FashionMNIST, ImageData
from perron.data.sources import DataError

__all__ = ["CIFAR10", "DATA_MODULES", "MNIST", "DataError", "Digits", "FashionMNIST", "ImageData"]
