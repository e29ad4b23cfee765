"""Read-outs on frozen features of implicit, matched and unmatched explicit networks, and how near their kernels are."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perron._errors import UsageError
from perron.data import ImageData, image_data
from perron.infinite_width import Match, UnstableError, match_explicit
from perron.infinite_width.readout import (
    MODELS,
    Spectra,
    Split,
    feature_map,
    kernel_distance,
    normalised,
    read_out,
    spectra,
)
from perron.report.equivalents import COLUMNS, by_width_and_model, distances, write_kernels
from perron.report.tables import Columns, Results
from perron.studies.study import Sitting, Study, Trial
from perron.training.records import versions

__all__ = ["KernelTrial", "Kernels", "load_splits"]


def load_splits(data: ImageData, count: int) -> dict[str, Split]:
    """So many training images, a tenth as many for validation, and all test images: centered, of unit norm."""
    data.setup("fit")
    data.setup("test")
    mean = data.splits["train"].tensors[0][:count].flatten(1).double().mean(0)
    counts = {"train": count, "validation": max(count // 10, 1), "test": None}
    parts = {name: [t[:most] for t in data.splits[name].tensors] for name, most in counts.items()}
    return {name: Split(X=normalised(x, mean), y=y) for name, (x, y) in parts.items()}


@dataclass(frozen=True, kw_only=True)
class KernelTrial(Trial):
    """The features of one model; the seed draws its weights."""

    model: str
    width: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Kernels(Study[KernelTrial]):
    """Compare an equilibrium network with its explicit equivalent: kernels, read-outs, times; writes a table and a page.

    Attributes:
        data: name of the data set: digits, mnist, fashion-mnist, cifar10, svhn.
        activation: of the equilibrium network: tanh, relu, swish, ...
        sa: variance of its recurrent weights; that of the others is 1 - sa.
        widths: of the networks, separated by commas.
        seeds: how many, from 0.
        images: training images of the read-out, at most; a tenth more for validation.
        kernel_images: images on which the kernels are compared.
        data_dir: folder of the data files (default $PERRON_DATA).
    """

    trial = KernelTrial
    free = frozenset({"widths", "seeds", "data_dir"})
    measures = ("test", "seconds per sample", "kernel distance")

    data: str = "digits"
    activation: str = "tanh"
    sa: float = 0.3
    widths: tuple[int, ...] = (32, 128, 512, 2048)
    seeds: int = 3
    images: int = 8000
    kernel_images: int = 1000
    data_dir: str | None = None

    @property
    def folder(self) -> str:
        inputs = f"{self.images}-images-{self.kernel_images}-in-kernels"
        return f"kernels/{self.data}-{self.activation}-sa-{self.sa:g}-{inputs}"

    def check(self) -> None:
        image_data(self.data)
        if self.seeds < 1 or not self.widths or min(self.widths) < 1 or min(self.images, self.kernel_images) < 20:
            raise UsageError("seeds and widths must be at least 1, and images at least 20")
        if not 0 <= self.sa < 1:
            raise UsageError(f"sa must be in [0, 1), sb being 1 - sa; got {self.sa:g}")
        _ = self.match

    def prepare(self) -> None:
        _ = self.splits

    @cached_property
    def match(self) -> Match:
        """The explicit network; raises UsageError if there is none."""
        try:
            return match_explicit(self.activation, self.sa, 1 - self.sa)
        except (UnstableError, ValueError) as error:
            raise UsageError(str(error)) from error

    @cached_property
    def splits(self) -> dict[str, Split]:
        return load_splits(image_data(self.data)(data_dir=self.data_dir), self.images)

    @cached_property
    def found(self) -> Spectra:
        """The kernels of infinite width."""
        return spectra(self._inputs, self.match)

    @property
    def _inputs(self) -> Tensor:
        return self.splits["train"].X[: self.kernel_images]

    def trials(self) -> list[KernelTrial]:
        chosen = itertools.product(self.widths, range(self.seeds), MODELS)
        return [KernelTrial(model=model, width=width, seed=seed) for width, seed, model in chosen]

    def rank(self, trial: KernelTrial) -> tuple[int, int, int]:
        return trial.width, trial.seed, MODELS.index(trial.model)

    def measure(self, trial: KernelTrial, sitting: Sitting) -> dict[str, Any]:
        generator, X = torch.Generator().manual_seed(trial.seed), self._inputs
        net = feature_map(trial.model, self.match, X.shape[1], trial.width, generator)
        parts, classes = self.splits, len(image_data(self.data)().classes)
        rates = read_out(net, parts["train"], parts["validation"], parts["test"], classes)
        return {**rates, "kernel distance": kernel_distance(net, X, self.found.kernels[trial.model])}

    def said(self, result: Mapping[str, Any]) -> str:
        return f"test {result['test']:.2%}, {1e6 * result['seconds per sample']:.0f} microseconds a sample"

    def columns(self, results: Results) -> Columns:
        return COLUMNS

    def groups(self, results: Results) -> list[Results]:
        return by_width_and_model(results)

    def text(self, results: Results) -> str:
        return distances(results, self.found) + super().text(results)

    def summary(self, results: Results) -> dict[str, Any]:
        def lists(tensors: dict[str, Tensor]) -> dict[str, list[float]]:
            return {name: t.tolist() for name, t in tensors.items()}

        found = self.found
        return {
            "eigenvalues": lists(found.eigenvalues),
            "distance": found.distance,
            "overlap": lists(found.overlap),
        }

    def page(self, path: Path, results: Results) -> None:
        write_kernels(path, results, self.found, self.match, self.settings, versions())
