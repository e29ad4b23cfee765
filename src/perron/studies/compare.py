"""The same network with different cores, side by side: one table and one page. Runs resume where they stopped."""

from __future__ import annotations

import gc
import itertools
import logging
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.profiler import ProfilerActivity, profile

from perron._files import write_json
from perron.data import ImageData
from perron.data.modules import DATA_MODULES
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
from perron.report.comparison import text_table, write_comparison
from perron.theory.certificate import Certificate
from perron.theory.certify import certify
from perron.training.callbacks import EpochLines
from perron.training.evaluation import evaluate
from perron.training.module import Classifier, Penalty, equilibrium_layers
from perron.training.records import (
    Provenance,
    UsageError,
    WholeCheckpoints,
    read_checkpoint,
    result_of,
    study,
)
from perron.training.run import ignore_known_warnings

__all__ = ["Run", "Settings", "compare", "peak_memory"]

# What the table and the page are made of.
_KEYS = (
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
# A depth is enough if its accuracy is within this of the full solve's.
_DEPTH_MARGIN = 1e-3


@dataclass(frozen=True)
class Settings:
    """What all models of a comparison have in common.

    Attributes:
        data: a name in `perron.data.DATA_MODULES`.
        parameters: that every network is to have, as nearly as its width allows.
        epochs, batch_size, learning_rate, weight_decay: of training; AdamW with a one-cycle schedule.
        prove_training: prove enclosures in training steps too; the test does in any case.
        limit: use only so many training images.
        network: "linear" or "conv", what the core stands in: `perron.models.BaselineNet` or `BaselineConvNet` of one block.
        penalty, penalty_weight: see `perron.training.module.Classifier`.
    """

    data: str = "digits"
    parameters: int = 77_000
    epochs: int = 5
    batch_size: int = 64
    learning_rate: float = 5e-3
    weight_decay: float = 1.5e-2
    prove_training: bool = False
    limit: int | None = None
    network: str = "linear"
    penalty: Penalty | None = None
    penalty_weight: float = 0.1

    @property
    def cores(self) -> dict[str, Callable[[int], nn.Module]]:
        """The cores this kind of network takes."""
        return CORES if self.network == "linear" else CONVOLUTIONAL_CORES

    @property
    def folder(self) -> str:
        """The name of the results: runs of one name can be compared."""
        parts = [self.data, *(["conv"] if self.network == "conv" else []), f"{self.epochs}-epochs"]
        parts.append(f"{self.parameters}-parameters")
        if self.penalty is not None:
            parts.append(f"{self.penalty}-{self.penalty_weight:g}")
        return "-".join(parts)

    def build(self, core: str, data: ImageData, width: int) -> nn.Module:
        """The network of this width around a core."""
        channels, side, _ = data.image_shape
        if self.network == "linear":
            return BaselineNet(core, math.prod(data.image_shape), len(data.classes), width=width)
        return BaselineConvNet(core, channels, len(data.classes), widths=[width], image_size=side)

    def check(self, cores: Sequence[str], seeds: int) -> None:
        """Raise UsageError if something is unknown or out of range."""
        if self.network not in ("linear", "conv"):
            raise UsageError(f"unknown network {self.network!r}; choose linear or conv")
        unknown = [c for c in cores if c not in self.cores]
        if unknown or not cores:
            raise UsageError(f"unknown model {', '.join(unknown) or '(none)'}; choose among {', '.join(self.cores)}")
        if self.data not in DATA_MODULES:
            raise UsageError(f"unknown data {self.data!r}; choose one of {', '.join(DATA_MODULES)}")
        if seeds < 1 or self.epochs < 1 or self.parameters < 1:
            raise UsageError("seeds, epochs and parameters must be at least 1")
        if self.penalty is not None and self.penalty not in PENALTIES:
            raise UsageError(f"unknown penalty {self.penalty!r}; choose one of {', '.join(PENALTIES)}")
        if self.penalty_weight < 0:
            raise UsageError(f"the weight of a penalty must not be negative, got {self.penalty_weight}")


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


@dataclass(frozen=True)
class _Prefixed:
    """Writes lines with a label before them."""

    label: str
    write: Callable[[str], None]

    def __call__(self, line: str) -> None:
        self.write(f"{self.label}: {line}")


class _Budget(L.Callback):
    """Stops after the epoch in which the time ran out."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if time.monotonic() > self.end:
            trainer.should_stop = True


def compare(
    cores: Sequence[str],
    seeds: int,
    settings: Settings,
    root: Path,
    *,
    data_dir: str | None = None,
    budget: float | None = None,
    ray: bool = False,
    write: Callable[[str], None] = print,
) -> str:
    """Train every core with every seed that has no result yet; write the page and return the table.

    Args:
        cores: names in `settings.cores`.
        seeds: how many seeds, from 0; they draw the initial weights, the split of the data is the same for all.
        settings: common to all.
        root: folder of all runs; results go to compare/<settings.folder> in it.
        data_dir: folder of the data files.
        budget: stop after so many seconds; what is unfinished then goes on at the next call.
        ray: spread the runs over processes, or over the machines of a Ray cluster that share `root`, by Ray Tune.
        write: takes a line of progress.

    Raises:
        UsageError: an unknown core or data set, numbers out of range, settings other than those of earlier results, a
            damaged checkpoint, or no Ray.
        BusyError: another process works in the same folder.
    """
    settings.check(cores, seeds)
    folder = (root / "compare" / settings.folder).resolve()
    with study(folder, asdict(settings), asdict(Settings())):
        end = None if budget is None else time.time() + budget
        left: list[Run] = []
        for number, (seed, core) in enumerate(itertools.product(range(seeds), cores), 1):
            run = Run(core, seed, settings, folder, data_dir, end, f"[{number}/{seeds * len(cores)}]")
            if run.found is not None:
                write(f"{run.label}: kept from {run.result}")
                continue
            if run.result.is_file():
                write(f"{run.label}: {run.result} is no result of it, and done again")
            left.append(run)
        if ray and left:
            from perron.studies.distribute import spread

            spread(left, write)
        else:
            for run in left:
                run(write)
        return _report(folder, settings)


@dataclass(frozen=True)
class Run:
    """One core with one seed: a call trains it, from its last checkpoint on, and writes its result.

    Attributes:
        core, seed, settings, folder, data_dir: see `compare`.
        end: seconds since the epoch at which the budget is spent, or None.
        number: of the run, in words.
    """

    core: str
    seed: int
    settings: Settings
    folder: Path
    data_dir: str | None
    end: float | None
    number: str

    @property
    def name(self) -> str:
        return f"{self.core}-seed-{self.seed}"

    @property
    def label(self) -> str:
        return f"{self.number} {self.core}, seed {self.seed}"

    @property
    def result(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def found(self) -> dict[str, Any] | None:
        """The result, if there is a whole one."""
        return result_of(self.result, {"core": self.core, "seed": self.seed}, _KEYS)

    def __call__(self, write: Callable[[str], None]) -> None:
        for name in ("lightning", "lightning.fabric", "lightning.pytorch"):
            logging.getLogger(name).setLevel(logging.WARNING)
        seconds = None if self.end is None else self.end - time.time()
        if seconds is not None and seconds <= 0:
            write(f"{self.label}: left out, the budget is spent; the same command goes on here")
            return
        found = _train(self, seconds, _Prefixed(self.label, write))
        if found is None:
            write(f"{self.label}: interrupted by the budget; the same command goes on here")
        else:
            write_json(self.result, found)


def _train(run: Run, seconds: float | None, write: Callable[[str], None]) -> dict[str, Any] | None:
    """The result of one run, from its last checkpoint on; None if the time was not enough."""
    settings, folder = run.settings, run.folder
    data = DATA_MODULES[settings.data](data_dir=run.data_dir, batch_size=settings.batch_size, limit=settings.limit)
    width = matched_width(partial(settings.build, run.core, data), settings.parameters)
    L.seed_everything(run.seed, verbose=False)
    module = Classifier(
        settings.build(run.core, data, width),
        classes=len(data.classes),
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        certify_training=settings.prove_training,
        penalty=settings.penalty,
        penalty_weight=settings.penalty_weight,
    )
    checkpoints = folder / "checkpoints" / run.name
    last = checkpoints / "last.ckpt"
    if last.is_file():
        try:
            read_checkpoint(last)
        except UsageError as error:
            raise UsageError(f"{error}; delete it to train {run.name} from its beginning") from error
    clock, provenance = _Clock(), Provenance(f"compare {run.name}")
    trainer = L.Trainer(
        max_epochs=settings.epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=1,
        default_root_dir=str(folder),
        callbacks=[
            clock,
            provenance,
            *([] if seconds is None else [_Budget(seconds)]),
            EpochLines(write),
            ModelCheckpoint(checkpoints, "last", save_on_train_epoch_end=True, enable_version_counter=False),
        ],
    )
    trainer.strategy.checkpoint_io = WholeCheckpoints()
    with warnings.catch_warnings():
        ignore_known_warnings()
        # The checkpoint is the run's own: it also holds plain Python objects.
        trainer.fit(module, data, ckpt_path=last if last.is_file() else None, weights_only=False)
    if trainer.interrupted:
        raise KeyboardInterrupt
    if trainer.current_epoch < settings.epochs:
        return None
    identity = {"core": run.core, "seed": run.seed, "width": width}
    return {**identity, **_measure(module, data, clock), "versions": provenance.versions()}


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


def _report(folder: Path, settings: Settings) -> str:
    order = list(settings.cores)
    files = [(p, *p.stem.rpartition("-seed-")[::2]) for p in folder.glob("*-seed-*.json")]
    named = [(order.index(core), int(seed), path) for path, core, seed in files if core in order and seed.isdigit()]
    whole = (result_of(path, {"core": order[core], "seed": seed}, _KEYS) for core, seed, path in sorted(named))
    results = [r for r in whole if r is not None]
    if not results:
        return "no model is finished yet"
    page = write_comparison(folder / "comparison.html", results, asdict(settings))
    return f"{text_table(results)}\npage: {page}"
