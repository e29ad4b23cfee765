"""The Lightning module: any classifier with equilibrium layers, AdamW, one-cycle learning rate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from perron.nn import Equilibrium
from perron.solvers import IterativeSolver

__all__ = ["Classifier", "equilibrium_layers"]


def equilibrium_layers(module: nn.Module) -> list[tuple[str, Equilibrium]]:
    """Names and equilibrium layers of a module, in order."""
    return [(name, m) for name, m in module.named_modules() if isinstance(m, Equilibrium)]


class Classifier(L.LightningModule):
    """Cross-entropy classification.

    Args:
        model: returns logits (batch, classes).
        classes: number of classes.
        learning_rate: peak of the one-cycle schedule.
        weight_decay: of AdamW, on matrices and kernels; biases and normalisation go without.
        certify_training: prove the enclosures in training steps too; validation and test always do.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        classes: int = 10,
        learning_rate: float = 5e-3,
        weight_decay: float = 1.5e-2,
        certify_training: bool = True,
    ) -> None:
        super().__init__()
        if learning_rate <= 0 or weight_decay < 0:
            raise ValueError(
                f"learning_rate must be positive and weight_decay not negative, got {learning_rate}, {weight_decay}"
            )
        self.model = model
        self.learning_rate, self.weight_decay, self.certify_training = learning_rate, weight_decay, certify_training
        self.accuracy = nn.ModuleDict(
            {f"{stage}_accuracy": MulticlassAccuracy(classes, average="micro") for stage in ("train", "val", "test")}
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def _verify_in(self, dtype: torch.dtype | None) -> None:
        for _, layer in equilibrium_layers(self.model):
            if isinstance(layer.solver, IterativeSolver) and layer.solver.verify != dtype:
                layer.solver = replace(layer.solver, verify=dtype)

    def on_train_epoch_start(self) -> None:
        self._verify_in(torch.float64 if self.certify_training else None)

    def on_validation_epoch_start(self) -> None:
        self._verify_in(torch.float64)

    def on_validation_epoch_end(self) -> None:
        # Lightning validates inside the training epoch.
        self._verify_in(torch.float64 if self.certify_training else None)

    def on_test_epoch_start(self) -> None:
        self._verify_in(torch.float64)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return self._step(batch, "train", on_step=True)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self._step(batch, "val", on_step=False)

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self._step(batch, "test", on_step=False)

    def predict_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return self.model(batch[0]).argmax(1)

    def _step(self, batch: tuple[Tensor, Tensor], prefix: str, *, on_step: bool) -> Tensor:
        x, y = batch
        logits = self.model(x)
        loss = F.cross_entropy(logits, y)
        accuracy = self.accuracy[f"{prefix}_accuracy"]
        accuracy(logits, y)
        shown: dict[str, Any] = {"prog_bar": True, "on_step": on_step, "on_epoch": True, "batch_size": len(y)}
        self.log(f"{prefix}_loss", loss, **shown)
        self.log(f"{prefix}_acc", accuracy, **shown)  # type: ignore[arg-type]
        solutions = [s for _, layer in equilibrium_layers(self.model) if (s := layer.last_solution) is not None]
        if solutions:
            steps = torch.stack([s.steps.float().mean() for s in solutions]).sum()
            error = torch.stack([s.error_bound.max() for s in solutions]).max()
            self.log(f"{prefix}_forward_steps", steps, **{**shown, "prog_bar": on_step})
            self.log(f"{prefix}_error_bound", error.float(), reduce_fx="max", **{**shown, "prog_bar": on_step})
        return loss

    def on_after_backward(self) -> None:
        adjoints = [
            s.adjoint
            for _, layer in equilibrium_layers(self.model)
            if (s := layer.last_solution) is not None and s.adjoint
        ]
        if adjoints:
            steps = torch.stack([a.steps.float().mean() for a in adjoints]).sum()
            self.log("train_backward_steps", steps, prog_bar=True, on_step=True, on_epoch=True)
            error = torch.stack([a.error_bound.max() for a in adjoints]).max().float()
            self.log("train_adjoint_error_bound", error, on_step=False, on_epoch=True, reduce_fx="max")

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.parameters() if p.dim() > 1]
        vectors = [p for p in self.parameters() if p.dim() <= 1]
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": self.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=self.learning_rate,
        )
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=max(total, 2))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
