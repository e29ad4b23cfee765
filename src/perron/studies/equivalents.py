"""`perron kernels compare`: read-outs on frozen features of implicit, matched and unmatched networks, and their kernels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perron._files import write_json
from perron.data import DATA_MODULES, ImageData
from perron.infinite_width import UnstableError, match_explicit
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
from perron.report.equivalents import text_table, write_kernels
from perron.training.records import UsageError, measured, study, versions

__all__ = ["KernelSettings", "compare_kernels", "known_data", "load_splits"]


# What the table and the page are made of.
_KEYS = ("test", "seconds per sample", "kernel distance")


@dataclass(frozen=True)
class KernelSettings:
    """What all networks of a comparison have in common.

    Attributes:
        data: a name in `perron.data.DATA_MODULES`.
        activation, sa: of the equilibrium network; sb is 1 - sa.
        images: training images of the read-out, at most; a tenth more for validation.
        kernel_images: images on which the kernels are compared.
    """

    data: str = "digits"
    activation: str = "tanh"
    sa: float = 0.3
    images: int = 8000
    kernel_images: int = 1000

    @property
    def folder(self) -> str:
        """The name of the results."""
        return f"{self.data}-{self.activation}-sa-{self.sa:g}-{self.images}-images-{self.kernel_images}-in-kernels"


def known_data(name: str) -> type[ImageData]:
    """The data module of this name.

    Raises:
        UsageError: there is none.
    """
    if name not in DATA_MODULES:
        raise UsageError(f"unknown data {name!r}; choose one of {', '.join(DATA_MODULES)}")
    return DATA_MODULES[name]


def load_splits(data: ImageData, count: int) -> dict[str, Split]:
    """So many training images, a tenth as many for validation, and all test images: centered, of unit norm."""
    data.setup("fit")
    data.setup("test")
    mean = data.splits["train"].tensors[0][:count].flatten(1).double().mean(0)
    counts = {"train": count, "validation": max(count // 10, 1), "test": None}
    parts = {name: [t[:most] for t in data.splits[name].tensors] for name, most in counts.items()}
    return {name: Split(normalised(x, mean), y) for name, (x, y) in parts.items()}


def compare_kernels(
    settings: KernelSettings,
    widths: Sequence[int],
    seeds: int,
    root: Path,
    *,
    data_dir: str | None = None,
    write: Callable[[str], None] = print,
) -> str:
    """Read out the features of every model, width and seed that has no result yet; write the page, return the table.

    Args:
        settings: common to all.
        widths: of the networks.
        seeds: how many, from 0; they draw the weights.
        root: folder of all runs; results go to kernels/<settings.folder> in it.
        data_dir: folder of the data files.
        write: takes a line of progress.

    Raises:
        UsageError: unknown data or activation, an unstable equilibrium, numbers out of range, or settings other than those of
            earlier results.
        BusyError: another process works in the same folder.
    """
    module = known_data(settings.data)
    if seeds < 1 or not widths or min(widths) < 1 or min(settings.images, settings.kernel_images) < 20:
        raise UsageError("seeds and widths must be at least 1, and images at least 20")
    if not 0 <= settings.sa < 1:
        raise UsageError(f"sa must be in [0, 1), sb being 1 - sa; got {settings.sa:g}")
    try:
        match = match_explicit(settings.activation, settings.sa, 1 - settings.sa)
    except (UnstableError, ValueError) as error:
        raise UsageError(str(error)) from error
    data = module(data_dir=data_dir)
    splits = load_splits(data, settings.images)
    write(
        f"matched by {', '.join(map(str, match.activations))}; largest residual {float(match.residuals.abs().max()):.1e}"
    )
    X = splits["train"].X[: settings.kernel_images]
    found = spectra(X, match)
    for name in MODELS[1:]:
        write(f"{name}: kernel at a relative distance of {found.distance[name]:.5f}")

    def measure(model: str, width: int, seed: int) -> dict[str, Any]:
        net = feature_map(model, match, X.shape[1], width, torch.Generator().manual_seed(seed))
        rates = read_out(net, splits["train"], splits["validation"], splits["test"], len(data.classes))
        return {**rates, "kernel distance": kernel_distance(net, X, found.kernels[model])}

    results = []
    folder = root / "kernels" / settings.folder
    with study(folder, asdict(settings)):
        for width, seed, model in itertools.product(widths, range(seeds), MODELS):
            path = folder / f"{model}-width-{width}-seed-{seed}.json"
            identity = {"model": model, "width": width, "seed": seed}
            result = measured(path, identity, _KEYS, partial(measure, model, width, seed))
            results.append(result)
            write(
                f"{model}, width {width}, seed {seed}: test {result['test']:.2%}, "
                f"{1e6 * result['seconds per sample']:.0f} microseconds a sample"
            )
        write_json(folder / "spectra.json", {**_as_lists(found), "versions": versions()})
        page = write_kernels(folder / "report.html", results, found, match, asdict(settings), versions())
    return f"{text_table(results, found)}\npage: {page}"


def _as_lists(found: Spectra) -> dict[str, object]:
    def lists(tensors: dict[str, Tensor]) -> dict[str, list[float]]:
        return {name: t.tolist() for name, t in tensors.items()}

    return {"eigenvalues": lists(found.eigenvalues), "distance": found.distance, "overlap": lists(found.overlap)}
