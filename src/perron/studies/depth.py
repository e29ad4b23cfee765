"""`perron kernels depth`: explicit networks of infinite width at several depths, and the classifiers they are in the limit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perron._files import write_json
from perron.infinite_width import DepthLimit, deep_classify, depth_limit, optimal_activation
from perron.report.deep_networks import text_table, write_depth
from perron.report.tables import said_versions
from perron.studies.equivalents import known_data, load_splits
from perron.training.records import UsageError, measured, study, versions

__all__ = ["compare_depths"]

# Activation, and whether its mean is taken off.
_ACTIVATIONS = (
    ("relu", False),
    ("swish", False),
    ("sigmoid", False),
    ("relu", True),
    ("tanh", False),
    ("abs", True),
)
# What the table and the page are made of.
_KEYS = ("accuracy", "agreement")
# Share of labels of the toy that are wrong: the least possible error.
_NOISE = 0.2
_TOY_SIZES, _TOY_TEST = (30, 100, 300, 1000, 2000), 2000


def compare_depths(
    data: str,
    depths: Sequence[int],
    root: Path,
    *,
    images: int = 2000,
    data_dir: str | None = None,
    write: Callable[[str], None] = print,
) -> str:
    """Classify test images in the limit and at every depth that has no result yet, for activations of all three kinds.

    Args:
        data: a name in `perron.data.DATA_MODULES`.
        depths: numbers of layers.
        root: folder of all runs; results go to kernels/depth-<data>-<images>-images in it.
        images: training and test images, at most.
        data_dir: folder of the data files.
        write: takes a line of progress.

    Returns:
        the table, and where the page is that it writes.

    Raises:
        UsageError: unknown data, numbers out of range, or settings other than those of earlier results.
        BusyError: another process works in the same folder.
    """
    if not depths or min(depths) < 1 or images < 20:
        raise UsageError("depths must be at least 1, and images at least 20")
    splits = load_splits(known_data(data)(data_dir=data_dir), images)
    train, test = splits["train"], splits["test"]
    X_test, y_test = test.X[:images], test.y[:images]
    folder = root / "kernels" / f"depth-{data}-{images}-images"
    results: list[dict[str, Any]] = []

    def measure(name: str, centred: bool, depth: int, wanted: Tensor) -> dict[str, float]:
        found = deep_classify(train.X, train.y, X_test, name, depth, centred=centred)
        return {"accuracy": _share(found == y_test), "agreement": _share(found == wanted)}

    with study(folder, {"data": data, "images": images}):
        for name, centred in _ACTIVATIONS:
            limit = depth_limit(name, centred=centred)
            wanted = limit.classify(train.X, train.y, X_test)
            row = {**_facts(limit), "limit": _share(wanted == y_test), "depths": {}}
            write(f"{row['activation']}: {row['kind']}, {row['limit']:.2%} of test images right in the limit")
            for depth in depths:
                path = folder / f"{name}{'-centred' if centred else ''}-depth-{depth}.json"
                identity = {"activation": row["activation"], "depth": depth}
                try:
                    shares = measured(path, identity, _KEYS, partial(measure, name, centred, depth, wanted))
                except ValueError as error:
                    write(f"{row['activation']}, depth {depth}: {error}")
                    continue
                row["depths"][depth] = shares
                write(
                    f"{row['activation']}, depth {depth}: {shares['accuracy']:.2%} right, {shares['agreement']:.2%} as in the limit"
                )
            results.append(row)
        toy = _toy()
        write_json(folder / "depth.json", {"results": results, "toy": toy["errors"], "versions": versions()})
        measured_by = said_versions(
            [{"versions": versions()}, *(shares for row in results for shares in row["depths"].values())]
        )
        facts = f"{data}, {len(train.y):,} training and {len(y_test):,} test images; {measured_by}"
        page = write_depth(folder / "report.html", results, toy, facts)
    return f"{text_table(results)}\npage: {page}"


def _share(right: Tensor) -> float:
    return float(right.double().mean())


def _facts(limit: DepthLimit) -> dict[str, Any]:
    return {
        "activation": f"{limit.phi.name}{', centred' if limit.centred else ''}",
        "kind": limit.kind,
        "mean": limit.mean,
        "slope": limit.slope,
        "energy": limit.energy,
        "exponent": limit.exponent,
    }


@dataclass(frozen=True)
class _Arc:
    """Points on a quarter of the circle with labels 0 and 1 in four stretches, some of them wrong."""

    angle: Tensor
    y: Tensor

    @property
    def X(self) -> Tensor:
        return torch.stack([self.angle.cos(), self.angle.sin()], 1)

    @staticmethod
    def truth(angle: Tensor) -> Tensor:
        return (angle * 8 / math.pi).long() % 2

    @classmethod
    def draw(cls, count: int, seed: int) -> _Arc:
        generator = torch.Generator().manual_seed(seed)
        angle = torch.rand(count, generator=generator, dtype=torch.float64) * math.pi / 2
        wrong = torch.rand(count, generator=generator) < _NOISE
        return cls(angle, cls.truth(angle) ^ wrong.long())


def _toy() -> dict[str, Any]:
    """The three classifiers on the arc: their votes along it, and their errors as the training set grows."""
    limits = {
        "majority vote": depth_limit("relu"),
        "nearest neighbour": depth_limit("abs", centred=True),
        "singular kernel, alpha = 1": depth_limit(optimal_activation(1.0)),
    }
    train, test = _Arc.draw(60, 0), _Arc.draw(_TOY_TEST, 1)
    angle = torch.linspace(0, math.pi / 2, 601, dtype=torch.float64)
    along = _Arc(angle, _Arc.truth(angle))
    votes = {name: limit.classify(train.X, train.y, along.X).tolist() for name, limit in limits.items()}
    errors: dict[str, list[float]] = {name: [] for name in limits}
    for size in _TOY_SIZES:
        sample = _Arc.draw(size, 2)
        for name, limit in limits.items():
            errors[name].append(_share(limit.classify(sample.X, sample.y, test.X) != test.y))
    return {
        "angle": angle.tolist(),
        "truth": along.y.tolist(),
        "votes": votes,
        "training angle": train.angle.tolist(),
        "training labels": train.y.tolist(),
        "sizes": list(_TOY_SIZES),
        "errors": errors,
        "least error": _NOISE,
    }
