"""Explicit networks of infinite width at several depths, and the classifiers that they are in the limit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perron._errors import UsageError
from perron.data import image_data
from perron.infinite_width import DepthLimit, deep_classify, depth_limit, optimal_activation
from perron.infinite_width.readout import Split
from perron.report.deep_networks import columns, write_depth
from perron.report.tables import Columns, Results, said_versions
from perron.studies.kernels import load_splits
from perron.studies.study import Sitting, Study, Trial
from perron.training.records import versions

__all__ = ["Depth", "DepthTrial"]

# Activation, and whether its mean is taken off.
_ACTIVATIONS = {
    "relu": ("relu", False),
    "swish": ("swish", False),
    "sigmoid": ("sigmoid", False),
    "relu, centred": ("relu", True),
    "tanh": ("tanh", False),
    "abs, centred": ("abs", True),
}
# Share of labels of the toy that are wrong: the least possible error.
_NOISE = 0.2
_TOY_SIZES, _TOY_TEST = (30, 100, 300, 1000, 2000), 2000


@dataclass(frozen=True, kw_only=True)
class DepthTrial(Trial):
    """An activation, of which there are three kinds, and a number of layers."""

    activation: str
    depth: int


@dataclass(frozen=True, kw_only=True)
class Depth(Study[DepthTrial]):
    """Classify by explicit networks at several depths, and in the limit of their depth; writes a table and a page.

    Attributes:
        data: name of the data set: digits, mnist, fashion-mnist, cifar10, svhn.
        depths: numbers of layers, separated by commas.
        images: training and test images, at most.
        data_dir: folder of the data files (default $PERRON_DATA).
    """

    trial = DepthTrial
    free = frozenset({"depths", "data_dir"})
    measures = ("accuracy", "agreement")

    data: str = "digits"
    depths: tuple[int, ...] = (1, 4, 16, 64, 256)
    images: int = 2000
    data_dir: str | None = None

    @property
    def folder(self) -> str:
        return f"depth/{self.data}-{self.images}-images"

    def check(self) -> None:
        image_data(self.data)
        if not self.depths or min(self.depths) < 1 or self.images < 20:
            raise UsageError("depths must be at least 1, and images at least 20")

    def prepare(self) -> None:
        _ = self._splits

    def trials(self) -> list[DepthTrial]:
        return [DepthTrial(activation=name, depth=depth) for name in _ACTIVATIONS for depth in self.depths]

    def rank(self, trial: DepthTrial) -> tuple[int, int]:
        return list(_ACTIVATIONS).index(trial.activation), trial.depth

    @cached_property
    def _splits(self) -> tuple[Split, Split]:
        """Training and test images."""
        splits = load_splits(image_data(self.data)(data_dir=self.data_dir), self.images)
        return splits["train"], Split(X=splits["test"].X[: self.images], y=splits["test"].y[: self.images])

    @cached_property
    def _limits(self) -> dict[str, tuple[DepthLimit, Tensor]]:
        """Of each activation: the classifier in the limit, and its labels of the test images."""
        train, test = self._splits
        limits = {name: depth_limit(phi, centred=centred) for name, (phi, centred) in _ACTIVATIONS.items()}
        return {name: (limit, limit.classify(train.X, train.y, test.X)) for name, limit in limits.items()}

    def measure(self, trial: DepthTrial, sitting: Sitting) -> dict[str, Any]:
        (train, test), (phi, centred) = self._splits, _ACTIVATIONS[trial.activation]
        try:
            found = deep_classify(train.X, train.y, test.X, phi, trial.depth, centred=centred)
        except ValueError as error:
            # Deeper than float64 can tell: that is what was found.
            return {"accuracy": None, "agreement": None, "reason": str(error)}
        wanted = self._limits[trial.activation][1]
        return {"accuracy": _share(found == test.y), "agreement": _share(found == wanted)}

    def said(self, result: Mapping[str, Any]) -> str:
        if result["accuracy"] is None:
            return str(result["reason"])
        return f"{result['accuracy']:.2%} right, {result['agreement']:.2%} as in the limit"

    def columns(self, results: Results) -> Columns:
        return columns(self._rows(results))

    def groups(self, results: Results) -> list[Results]:
        return [[row] for row in self._rows(results)]

    def _rows(self, results: Results) -> list[dict[str, Any]]:
        """One for each activation: facts of its limit, and the results of its depths."""
        names, test = dict.fromkeys(r["activation"] for r in results), self._splits[1]
        rows = []
        for name in names:
            limit, wanted = self._limits[name]
            depths = {r["depth"]: r for r in results if r["activation"] == name}
            right = _share(wanted == test.y)
            rows.append({"activation": name, **_facts(limit), "limit": right, "depths": depths})
        return rows

    def summary(self, results: Results) -> dict[str, Any]:
        return {"results": self._rows(results), "toy": _toy()["errors"]}

    def page(self, path: Path, results: Results) -> None:
        train, test = self._splits
        measured_by = said_versions([{"versions": versions()}, *results])
        facts = f"{self.data}, {len(train.y):,} training and {len(test.y):,} test images; {measured_by}"
        write_depth(path, self._rows(results), _toy(), facts)


def _share(right: Tensor) -> float:
    return float(right.double().mean())


def _facts(limit: DepthLimit) -> dict[str, Any]:
    return {
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


@cache
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
