"""The same network with different cores, side by side: one table and one page. Runs resume where they stopped."""

from __future__ import annotations

import gc
import json
import logging
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.profiler import ProfilerActivity, profile

import perron
from perron.certificates import Certificate, certify
from perron.data import ImageData
from perron.data.modules import DATA_MODULES
from perron.models.rivals import CORES, RivalNet, matched_width, parameter_count
from perron.nn import NeuralODE
from perron.report.comparison import text_table, write_comparison
from perron.training.callbacks import EpochLines
from perron.training.evaluation import evaluate
from perron.training.module import Classifier, equilibrium_layers
from perron.training.run import UsageError, ignore_known_warnings

__all__ = ["Settings", "compare", "peak_memory"]

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
    """

    data: str = "digits"
    parameters: int = 77_000
    epochs: int = 5
    batch_size: int = 64
    learning_rate: float = 5e-3
    weight_decay: float = 1.5e-2
    prove_training: bool = False
    limit: int | None = None


def peak_memory(run: Callable[[], Any]) -> float:
    """Most MiB of CPU tensors that are alive at once during a run, beyond those before it."""
    run()
    gc.collect()
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
    """Seconds of the training batches of each epoch, without validation; kept in checkpoints."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.begin = self.last = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.last = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds.append(self.last - self.begin)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = list(state_dict["seconds"])


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
    write: Callable[[str], None] = print,
) -> str:
    """Train every core with every seed that has no result yet; write the page and return the table.

    Args:
        cores: names in `perron.models.rivals.CORES`.
        seeds: how many seeds, from 0; they draw the initial weights, the split of the data is the same for all.
        settings: common to all.
        root: folder of all runs; results go to compare/<data>-<epochs>-epochs-<parameters>-parameters in it.
        data_dir: folder of the data files.
        budget: stop after so many seconds; what is unfinished then goes on at the next call.
        write: takes a line of progress.

    Raises:
        UsageError: an unknown core or data set, numbers out of range, or settings other than those of earlier results.
    """
    unknown = [c for c in cores if c not in CORES]
    if unknown or not cores:
        raise UsageError(f"unknown model {', '.join(unknown) or '(none)'}; choose among {', '.join(CORES)}")
    if settings.data not in DATA_MODULES:
        raise UsageError(f"unknown data {settings.data!r}; choose one of {', '.join(DATA_MODULES)}")
    if seeds < 1 or settings.epochs < 1 or settings.parameters < 1:
        raise UsageError("seeds, epochs and parameters must be at least 1")
    folder = root / "compare" / f"{settings.data}-{settings.epochs}-epochs-{settings.parameters}-parameters"
    _keep_settings(folder, settings)
    for name in ("lightning", "lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    end = None if budget is None else time.monotonic() + budget
    total, number = seeds * len(cores), 0
    for seed in range(seeds):
        for core in cores:
            number += 1
            path = folder / f"{core}-seed-{seed}.json"
            label = f"[{number}/{total}] {core}, seed {seed}"
            if path.is_file():
                write(f"{label}: kept from {path}")
                continue
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                write(f"{label}: left out, the budget is spent; the same command goes on here")
                continue
            result = _train(core, seed, settings, folder, data_dir, left, _Prefixed(label, write))
            if result is None:
                write(f"{label}: interrupted by the budget; the same command goes on here")
            else:
                path.write_text(json.dumps(result, indent=1) + "\n")
    return _report(folder, settings)


def _keep_settings(folder: Path, settings: Settings) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    if path.is_file() and json.loads(path.read_text()) != asdict(settings):
        raise UsageError(
            f"{folder} holds results with other settings ({path}); name another --runs folder, or delete this one"
        )
    path.write_text(json.dumps(asdict(settings), indent=1) + "\n")


def _train(
    core: str,
    seed: int,
    settings: Settings,
    folder: Path,
    data_dir: str | None,
    seconds: float | None,
    write: Callable[[str], None],
) -> dict[str, Any] | None:
    """The result of one run, from its last checkpoint on; None if the time was not enough."""
    data = DATA_MODULES[settings.data](data_dir=data_dir, batch_size=settings.batch_size, limit=settings.limit)
    pixels = math.prod(data.image_shape)
    classes = len(data.classes)
    width = matched_width(core, settings.parameters, pixels, classes)
    L.seed_everything(seed, verbose=False)
    module = Classifier(
        RivalNet(core, pixels, classes, width=width),
        classes=classes,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        certify_training=settings.prove_training,
    )
    checkpoints = folder / "checkpoints" / f"{core}-seed-{seed}"
    clock = _Clock()
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
            *([] if seconds is None else [_Budget(seconds)]),
            EpochLines(write),
            ModelCheckpoint(checkpoints, "last", save_on_train_epoch_end=True, enable_version_counter=False),
        ],
    )
    last = checkpoints / "last.ckpt"
    with warnings.catch_warnings():
        ignore_known_warnings()
        # The checkpoint is the run's own: it also holds plain Python objects.
        trainer.fit(module, data, ckpt_path=last if last.is_file() else None, weights_only=False)
    if trainer.interrupted:
        raise KeyboardInterrupt
    if trainer.current_epoch < settings.epochs:
        return None
    return {"core": core, "seed": seed, "width": width, **_measure(module, data, trainer, clock)}


def _measure(module: Classifier, data: ImageData, trainer: L.Trainer, clock: _Clock) -> dict[str, Any]:
    model = module.model
    data.setup("test")
    facts = {k: float(v) for k, v in trainer.callback_metrics.items()}
    images, labels = next(iter(data.train_dataloader()))
    images, labels = images.to(module.device), labels.to(module.device)

    def step() -> None:
        model.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()

    model.train()
    memory = peak_memory(step) if module.device.type == "cpu" else None
    evaluation = evaluate(model, data.test_dataloader(), len(data.classes))
    core = model[3]  # type: ignore[index]
    layers = evaluation["layers"].values()
    bounds = [b for layer in layers for b in layer["error_bound"]]
    return {
        "accuracy": evaluation["accuracy"],
        "validation accuracy": facts.get("val_acc"),
        "parameters": parameter_count(model),
        "forward steps": float(core.evaluations)
        if isinstance(core, NeuralODE)
        else facts.get("train_forward_steps_epoch"),
        "backward steps": facts.get("train_backward_steps_epoch"),
        "seconds per epoch": statistics.median(clock.seconds),
        "peak MiB": memory,
        "certificate": _certificate(model),
        "proven": evaluation["enclosures_proven"] / evaluation["enclosures"] if evaluation["enclosures"] else None,
        "largest certified error": max(bounds, default=None),
        "effective depth": _effective_depth(evaluation["depth"]) if layers else None,
        "depth": evaluation["depth"],
        "versions": {"perron": perron.__version__, "torch": torch.__version__, "python": platform.python_version()},
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
    results = [json.loads(p.read_text()) for p in sorted(folder.glob("*-seed-*.json"))]
    if not results:
        return "no model is finished yet"
    order = list(CORES)
    results.sort(key=lambda r: (order.index(r["core"]), r["seed"]))
    page = write_comparison(folder / "comparison.html", results, asdict(settings))
    return f"{text_table(results)}\npage: {page}"
