"""What a run keeps: a history that survives interruptions."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

from perron._files import replacing
from perron.report.tables import at_most
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
            shown = at_most if name == "error_bound" else format
            found[_SHORT.get(name, name)] = shown(float(metrics[f"train_{name}{suffix}"]), form)
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


class _AtEpochEnd(L.Callback):
    """What is known at the end of an epoch."""

    def __init__(self) -> None:
        super().__init__()
        self._validated = False

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validated = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validated = not trainer.sanity_checking

    def metrics(self, trainer: L.Trainer) -> dict[str, float]:
        """Of this epoch alone: Lightning keeps those of the last validation until the next."""
        return {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if not name.endswith("_step") and (self._validated or not name.startswith("val_"))
        }


class EpochLines(_AtEpochEnd):
    """The same once an epoch as a line of text, where there is no terminal.

    Args:
        write: takes the line.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        super().__init__()
        self.write = write

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        parts = [f"{k} {v}" for k, v in _summary(self.metrics(trainer), "_epoch").items()]
        self.write(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}: " + ", ".join(parts))


class History(_AtEpochEnd):
    """One row of metrics per epoch, kept in the checkpoints and rewritten whole to `history.csv` after every epoch.

    An epoch that was interrupted has no row; one that a limit on the steps cuts short has that of its steps.

    Args:
        folder: where `history.csv` goes.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.rows: list[dict[str, float]] = []
        self._started = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # A kill after the row of an epoch and before its checkpoint leaves a row of weights that are lost.
        if self.rows:
            self.write()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self._started = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        row = {"epoch": float(trainer.current_epoch), "seconds": time.perf_counter() - self._started}
        row |= self.metrics(trainer)
        row["learning_rate"] = trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else float("nan")
        for name, layer in equilibrium_layers(pl_module):
            if (radius := spectral_radius(layer)) is not None:
                row[f"spectral_radius {name}"] = radius
        self.rows = [r for r in self.rows if r["epoch"] != row["epoch"]] + [row]
        self.write()

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        with replacing(self.folder / "history.csv") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)

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
