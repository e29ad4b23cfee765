"""The same network with different cores, side by side, on images. Trainings resume where they stopped."""

from __future__ import annotations

import gc
import itertools
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.profiler import ProfilerActivity, profile

from perron._errors import UsageError
from perron.data import ImageData, image_data
from perron.models.baselines import (
    CONVOLUTIONAL_CORES,
    CORES,
    BaselineConvNet,
    BaselineNet,
    matched_width,
    parameter_count,
)
from perron.nn import NeuralODE
from perron.nn.penalties import PENALTIES
from perron.report.comparison import COLUMNS, by_core, write_comparison
from perron.report.tables import Columns, Results
from perron.studies.study import Sitting, Study, Trial
from perron.theory.certificate import Certificate
from perron.theory.certify import certify
from perron.training.callbacks import EpochLines
from perron.training.evaluation import evaluate
from perron.training.module import Classifier, Penalty, equilibrium_layers
from perron.training.records import Provenance, read_checkpoint
from perron.training.run import quiet_lightning, train

__all__ = ["ImageTrial", "Images", "peak_memory"]

# A depth is enough if its accuracy is within this of the full solve's.
_DEPTH_MARGIN = 1e-3


@dataclass(frozen=True, kw_only=True)
class ImageTrial(Trial):
    """One core, and the seed that draws its initial weights; the split of the data is the same for all."""

    core: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Images(Study[ImageTrial]):
    """Train implicit models and their baselines on images, at equal numbers of parameters; writes a table and a page.

    Attributes:
        data: name of the data set: digits, mnist, fashion-mnist, cifar10, svhn.
        network: what the core stands in: `perron.models.BaselineNet`, or `BaselineConvNet` of one block.
        models: names, separated by commas, of `perron.models.CORES` or `CONVOLUTIONAL_CORES`; none for all.
        seeds: how many seeds, from 0.
        parameters: that every network is to have, as nearly as its width allows.
        epochs: of training.
        batch_size: of training.
        learning_rate: of AdamW with a one-cycle schedule.
        weight_decay: of AdamW.
        prove_training: prove enclosures in training steps too; the test does in any case.
        limit: use only so many training images.
        penalty: on the states of training; see `perron.nn.penalties`.
        penalty_weight: of that penalty.
        data_dir: folder of the data files (default $PERRON_DATA).
    """

    trial = ImageTrial
    free = frozenset({"models", "seeds", "data_dir"})
    measures = (
        "width",
        "accuracy",
        "parameters",
        "forward steps",
        "backward steps",
        "seconds per epoch",
        "peak MiB",
        "certificate",
        "proven",
        "largest certified error",
        "effective depth",
        "depth",
        "versions",
        "threads",
    )

    data: str = "digits"
    network: Literal["linear", "conv"] = "linear"
    models: tuple[str, ...] = ()
    seeds: int = 1
    parameters: int = 77_000
    epochs: int = 5
    batch_size: int = 64
    learning_rate: float = 5e-3
    weight_decay: float = 1.5e-2
    prove_training: bool = False
    limit: int | None = None
    penalty: Penalty | None = None
    penalty_weight: float = 0.1
    data_dir: str | None = None

    @property
    def cores(self) -> dict[str, Callable[[int], nn.Module]]:
        """The cores this kind of network takes."""
        return CORES if self.network == "linear" else CONVOLUTIONAL_CORES

    @property
    def folder(self) -> str:
        parts = [self.data, *(["conv"] if self.network == "conv" else []), f"{self.epochs}-epochs"]
        parts.append(f"{self.parameters}-parameters")
        if self.penalty is not None:
            parts.append(f"{self.penalty}-{self.penalty_weight:g}")
        return "images/" + "-".join(parts)

    def check(self) -> None:
        if self.network not in ("linear", "conv"):
            raise UsageError(f"unknown network {self.network!r}; choose linear or conv")
        if unknown := [core for core in self.models if core not in self.cores]:
            raise UsageError(f"unknown model {', '.join(unknown)}; choose among {', '.join(self.cores)}")
        image_data(self.data)
        if self.seeds < 1 or self.epochs < 1 or self.parameters < 1:
            raise UsageError("seeds, epochs and parameters must be at least 1")
        if self.penalty is not None and self.penalty not in PENALTIES:
            raise UsageError(f"unknown penalty {self.penalty!r}; choose one of {', '.join(PENALTIES)}")
        if self.penalty_weight < 0:
            raise UsageError(f"the weight of a penalty must not be negative, got {self.penalty_weight}")

    def prepare(self) -> None:
        self.load().setup("fit")

    def trials(self) -> list[ImageTrial]:
        chosen = itertools.product(range(self.seeds), self.models or self.cores)
        return [ImageTrial(core=core, seed=seed) for seed, core in chosen]

    def rank(self, trial: ImageTrial) -> tuple[int, int]:
        return list(self.cores).index(trial.core), trial.seed

    def load(self) -> ImageData:
        """The data, not read yet."""
        try:
            return image_data(self.data)(data_dir=self.data_dir, batch_size=self.batch_size, limit=self.limit)
        except ValueError as error:
            raise UsageError(str(error)) from error

    def build(self, core: str, data: ImageData, width: int) -> nn.Module:
        """The network of this width around a core."""
        channels, side, _ = data.image_shape
        if self.network == "linear":
            return BaselineNet(core, math.prod(data.image_shape), len(data.classes), width=width)
        return BaselineConvNet(core, channels, len(data.classes), widths=[width], image_size=side)

    def measure(self, trial: ImageTrial, sitting: Sitting) -> dict[str, Any] | None:
        """Train from the last checkpoint on; then evaluate."""
        data = self.load()
        width = matched_width(partial(self.build, trial.core, data), self.parameters)
        L.seed_everything(trial.seed, verbose=False)
        module = Classifier(
            self.build(trial.core, data, width),
            classes=len(data.classes),
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            certify_training=self.prove_training,
            penalty=self.penalty,
            penalty_weight=self.penalty_weight,
        )
        checkpoints = sitting.folder / "checkpoints" / trial.name
        last = _last_checkpoint(checkpoints, trial)
        clock, provenance = _Clock(), Provenance(f"study images {trial.name}")
        quiet_lightning()
        trainer = L.Trainer(
            max_epochs=self.epochs,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            reload_dataloaders_every_n_epochs=1,
            default_root_dir=str(sitting.folder),
            callbacks=[
                clock,
                provenance,
                *([] if sitting.left is None else [_Budget(sitting.left)]),
                EpochLines(sitting.write),
                ModelCheckpoint(checkpoints, "last", save_on_train_epoch_end=True, enable_version_counter=False),
            ],
        )
        with warnings.catch_warnings():
            train(trainer, module, data, last)
        if trainer.current_epoch < self.epochs:
            return None
        return {"width": width, **_measure(module, data, clock), "versions": provenance.versions()}

    def said(self, result: Mapping[str, Any]) -> str:
        return f"test {result['accuracy']:.2%}"

    def columns(self, results: Results) -> Columns:
        return COLUMNS

    def groups(self, results: Results) -> list[Results]:
        return by_core(results)

    def page(self, path: Path, results: Results) -> None:
        write_comparison(path, results, self.settings)


def _last_checkpoint(folder: Path, trial: Trial) -> Path | None:
    last = folder / "last.ckpt"
    if not last.is_file():
        return None
    try:
        read_checkpoint(last)
    except UsageError as error:
        raise UsageError(f"{error}; delete it to train {trial.name} from its beginning") from error
    return last


def peak_memory(run: Callable[[], Any]) -> float:
    """Most MiB of CPU tensors that are alive at once during a run, beyond those before it."""
    run()
    gc.collect()
    # Else the profiler announces its beginning and its end.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            run()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most / 2**20


class _Clock(L.Callback):
    """Seconds of the training batches of each epoch, without validation, and the metrics of the last; kept in checkpoints."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.metrics: dict[str, float] = {}

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.begin = self.last = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.last = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds.append(self.last - self.begin)
        self.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "metrics": self.metrics}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds, self.metrics = list(state_dict["seconds"]), dict(state_dict["metrics"])


class _Budget(L.Callback):
    """Stops after the epoch in which the time ran out."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if time.monotonic() > self.end:
            trainer.should_stop = True


def _measure(module: Classifier, data: ImageData, clock: _Clock) -> dict[str, Any]:
    model, facts = module.model, clock.metrics
    data.setup("test")
    images, labels = next(iter(data.train_dataloader()))
    images, labels = images.to(module.device), labels.to(module.device)

    def step() -> None:
        model.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()

    model.train()
    memory = peak_memory(step) if module.device.type == "cpu" else None
    evaluation = evaluate(model, data.test_dataloader(), len(data.classes))
    flow = next((m for m in model.modules() if isinstance(m, NeuralODE)), None)
    layers = evaluation["layers"].values()
    bounds = [b for layer in layers for b in layer["error_bound"]]
    return {
        "accuracy": evaluation["accuracy"],
        "validation accuracy": facts.get("val_acc"),
        "parameters": parameter_count(model),
        "forward steps": facts.get("train_forward_steps_epoch") if flow is None else float(flow.evaluations),
        "backward steps": facts.get("train_backward_steps_epoch"),
        "seconds per epoch": statistics.median(clock.seconds),
        "peak MiB": memory,
        "certificate": _certificate(model),
        "proven": evaluation["enclosures_proven"] / evaluation["enclosures"] if evaluation["enclosures"] else None,
        "largest certified error": max(bounds, default=None),
        "effective depth": _effective_depth(evaluation["depth"]) if layers else None,
        "depth": evaluation["depth"],
        "threads": torch.get_num_threads(),
    }


def _certificate(model: nn.Module) -> dict[str, Any]:
    if not equilibrium_layers(model):
        return {"kind": "not needed", "rate": None, "refusal": None}
    whole = certify(model)
    part: Certificate = whole.parts[0][1]
    return {"kind": part.kind if part else "refused", "rate": part.rate, "refusal": part.refusal}


def _effective_depth(depth: dict[str, float]) -> int | None:
    """The least cut whose accuracy is within a tenth of a point of the full solve's; None if none of them is."""
    cuts = sorted(int(k) for k in depth if k != "full")
    return next((c for c in cuts if depth[str(c)] >= depth["full"] - _DEPTH_MARGIN), None)
