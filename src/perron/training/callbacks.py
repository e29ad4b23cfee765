"""What a run keeps: a history that survives interruptions."""

from __future__ import annotations

import csv
import os
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from perron.certificates import spectral_radius_bound
from perron.training.module import equilibrium_layers

__all__ = ["History"]


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
            weight = getattr(layer, "weight", None)
            if isinstance(weight, torch.Tensor):
                matrix = weight.detach().flatten(2).sum(2) if weight.dim() > 2 else weight.detach()
                row[f"spectral_radius {name}"] = spectral_radius_bound(matrix)
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
