"""What a run keeps: a history that survives interruptions."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

from perron.training.module import equilibrium_layers, spectral_radius

__all__ = ["EpochLines", "History", "Progress", "StopAfter"]


SHOWN = {
    "loss": ".3f",
    "acc": ".1%",
    "forward_steps": ".1f",
    "backward_steps": ".1f",
    "error_bound": ".0e",
}
_SHORT = {"forward_steps": "fwd", "backward_steps": "bwd", "error_bound": "error"}


def _summary(metrics: Mapping[str, Any], suffix: str) -> dict[str, str]:
    """Short names and formatted values: of training (with `suffix` behind the name), then of validation."""
    found = {}
    for name, form in SHOWN.items():
        if f"train_{name}{suffix}" in metrics:
            found[_SHORT.get(name, name)] = format(float(metrics[f"train_{name}{suffix}"]), form)
    for name in ("loss", "acc"):
        if f"val_{name}" in metrics:
            found[f"val_{name}"] = format(float(metrics[f"val_{name}"]), SHOWN[name])
    return found


class Progress(TQDMProgressBar):
    """One line: loss, accuracy, solver steps forward and backward, largest certified error, validation."""

    def get_metrics(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        return dict(_summary(trainer.progress_bar_metrics, "_step"))


class EpochLines(L.Callback):
    """The same once an epoch as a line of text, where there is no terminal.

    Args:
        write: takes the line.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        super().__init__()
        self.write = write

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        parts = [f"{k} {v}" for k, v in _summary(trainer.callback_metrics, "_epoch").items()]
        self.write(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}: " + ", ".join(parts))


class History(L.Callback):
    """One row of metrics per epoch, kept in the checkpoints and rewritten whole to `history.csv` after every epoch.

    Args:
        folder: where `history.csv` goes.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.rows: list[dict[str, float]] = []
        self._started = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._started = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Before the checkpoint of this epoch is written: it then holds this row, less the training averages.
        if not trainer.sanity_checking and trainer.training:
            self._record(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._record(trainer, pl_module)
        self.write()

    def _record(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        row = {"epoch": float(trainer.current_epoch), "seconds": time.perf_counter() - self._started}
        row |= {k: float(v) for k, v in trainer.callback_metrics.items() if not k.endswith("_step")}
        row["learning_rate"] = trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else float("nan")
        for name, layer in equilibrium_layers(pl_module):
            if (radius := spectral_radius(layer)) is not None:
                row[f"spectral_radius {name}"] = radius
        self.rows = [r for r in self.rows if r["epoch"] != row["epoch"]] + [row]

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        partial = self.folder / "history.csv.part"
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(partial, self.folder / "history.csv")

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])


class StopAfter(L.Callback):
    """End this sitting after so many epochs; the schedule stays that of the whole run, to be continued by `--resume`.

    Args:
        epochs: of this sitting.
    """

    def __init__(self, epochs: int) -> None:
        super().__init__()
        self.left = epochs

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.left -= 1
        if self.left <= 0:
            trainer.should_stop = True
