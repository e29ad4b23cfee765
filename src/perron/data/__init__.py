"""Data sets for the examples and presets: digits embedded, others from a folder. Needs perron[train]."""

from perron.data.modules import CIFAR10, DATA_MODULES, MNIST, SVHN, Digits, FashionMNIST, ImageData, image_data
from perron.data.sources import DataError

__all__ = ["CIFAR10", "DATA_MODULES", "MNIST", "SVHN", "DataError", "Digits", "FashionMNIST", "ImageData", "image_data"]
