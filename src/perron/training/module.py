"""The Lightning module: any classifier with equilibrium layers, AdamW, one-cycle learning rate."""

from __future__ import annotations

import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from perron.nn import Equilibrium
from perron.nn.penalties import PENALTIES, State, observe
from perron.solvers import IterativeSolver, Solution
from perron.theory.positive_concave import spectral_radius_bound

__all__ = ["Classifier", "Penalty", "Schedule", "certified_errors", "equilibrium_layers", "spectral_radius"]

Penalty = Literal["jacobian", "residual_ratio", "picard_steps"]
Schedule = Literal["one_cycle", "cosine"]

# Of these an epoch has the largest value, not the mean; and training steps between two values on the progress line.
_LARGEST, _SHOW_EVERY = ("error_bound", "adjoint_error_bound"), 10


def equilibrium_layers(module: nn.Module) -> list[tuple[str, Equilibrium]]:
    """Names and equilibrium layers of a module, in order."""
    return [(name, m) for name, m in module.named_modules() if isinstance(m, Equilibrium)]


def spectral_radius(layer: nn.Module) -> float | None:
    """A bound on the spectral radius of a layer's recurrent weight; None where it has none, or one of mixed signs."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or bool((weight < 0).any()):
        return None
    return spectral_radius_bound(weight.detach().flatten(2).sum(2) if weight.dim() > 2 else weight)


_Scheduler = torch.optim.lr_scheduler.OneCycleLR | torch.optim.lr_scheduler.CosineAnnealingLR


class _OfEpoch(Metric):
    """A value of every training step of an epoch: their mean over the samples, or the largest.

    Logged once an epoch and computed when it is asked for, thus complete for callbacks at the end of the epoch, which come
    before the module's own hook. Lightning's own bookkeeping of a step takes longer than the step of a small network.
    """

    def __init__(self, largest: bool) -> None:
        super().__init__(sync_on_compute=False)
        self.largest = largest
        self.values: list[Tensor] = []
        self.sizes: list[int] = []

    def update(self, value: Tensor, size: int) -> None:
        self.values.append(value)
        self.sizes.append(size)

    def compute(self) -> Tensor:
        values = torch.stack(self.values).float()
        if self.largest:
            return values.max()
        weights = torch.tensor(self.sizes, dtype=torch.float32, device=values.device)
        return (values * weights).sum() / weights.sum()


def certified_errors(solution: Solution) -> Tensor:
    """(batch,) its error bounds where they are proven, inf where they are not."""
    proven = solution.proven if solution.proof_dtype is not None else torch.zeros_like(solution.proven)
    return torch.where(proven, solution.error_bound, torch.inf)


class Classifier(L.LightningModule):
    """Cross-entropy classification.

    Args:
        model: returns logits (batch, classes).
        classes: number of classes.
        learning_rate: peak of the one-cycle schedule, or start of the cosine, which ends at 1e-6.
        weight_decay: of AdamW, on matrices and kernels; biases and normalisation go without.
        certify_training: prove the enclosures in training steps too; validation and test always do.
        penalty: None, or a name in `perron.nn.penalties.PENALTIES`: its mean over every equilibrium layer's batch, summed
            over layers, is added to the loss with `penalty_weight`.
        schedule: of the learning rate, "one_cycle" or "cosine".
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        classes: int = 10,
        learning_rate: float = 5e-3,
        weight_decay: float = 1.5e-2,
        certify_training: bool = True,
        penalty: Penalty | None = None,
        penalty_weight: float = 0.1,
        schedule: Schedule = "one_cycle",
    ) -> None:
        super().__init__()
        if learning_rate <= 0 or weight_decay < 0 or penalty_weight < 0:
            raise ValueError(
                "learning_rate must be positive, weight_decay and penalty_weight not negative, got "
                f"{learning_rate}, {weight_decay} and {penalty_weight}"
            )
        if penalty is not None and penalty not in PENALTIES:
            raise ValueError(f"unknown penalty {penalty!r}; choose one of {', '.join(PENALTIES)}")
        if schedule not in ("one_cycle", "cosine"):
            raise ValueError(f"schedule must be 'one_cycle' or 'cosine', got {schedule!r}")
        self.penalty, self.penalty_weight, self.schedule = penalty, penalty_weight, schedule
        self.model = model
        self.learning_rate, self.weight_decay, self.certify_training = learning_rate, weight_decay, certify_training
        self.accuracy = nn.ModuleDict(
            {f"{stage}_accuracy": MulticlassAccuracy(classes, average="micro") for stage in ("val", "test")}
        )
        self._of_epoch: dict[str, _OfEpoch] = {}
        self._size = 0
        # Of this module's own schedule, in steps; None where another was configured.
        self._total: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def _verify_in(self, dtype: torch.dtype | None) -> None:
        for _, layer in equilibrium_layers(self.model):
            if isinstance(layer.solver, IterativeSolver) and layer.solver.proof_dtype != dtype:
                layer.solver = replace(layer.solver, proof_dtype=dtype)

    def on_train_epoch_start(self) -> None:
        self._of_epoch = {}
        self._verify_in(torch.float64 if self.certify_training else None)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # From (seed, step) alone: dropout and penalties of a resumed run draw the very same numbers.
        torch.manual_seed(int(os.environ.get("PL_GLOBAL_SEED", "0")) * 1_000_003 + self.global_step)

    def on_validation_epoch_start(self) -> None:
        self._verify_in(torch.float64)

    def on_validation_epoch_end(self) -> None:
        # Lightning validates inside the training epoch.
        self._verify_in(torch.float64 if self.certify_training else None)

    def on_test_epoch_start(self) -> None:
        self._verify_in(torch.float64)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        watch: AbstractContextManager[list[State]] = nullcontext([]) if self.penalty is None else observe(self.model)
        with watch as states:
            logits = self.model(x)
        loss = F.cross_entropy(logits, y)
        now = {"loss": loss.detach(), "acc": (logits.argmax(1) == y).float().mean(), **self._forward_facts()}
        if self.penalty is not None and states:
            extra = torch.stack([PENALTIES[self.penalty](s).mean() for s in states]).sum()
            loss = loss + self.penalty_weight * extra
            now["penalty"] = extra.detach()
        self._size = len(y)
        self._note(now)
        if index % _SHOW_EVERY == 0:
            self._show(now)
        return loss

    def on_after_backward(self) -> None:
        adjoints = [s.adjoint for s in self._solutions() if s.adjoint]
        if adjoints:
            steps = torch.stack([a.steps.float().mean() for a in adjoints]).sum()
            self._note({"backward_steps": steps})
            if bounded := [a for a in adjoints if a.bounded]:
                error = torch.stack([a.error_bound.max() for a in bounded]).max().float()
                self._note({"adjoint_error_bound": error})

    def _note(self, values: dict[str, Tensor]) -> None:
        """Keep the values of a training step for its epoch."""
        for name, value in values.items():
            if name not in self._of_epoch:
                self._of_epoch[name] = metric = _OfEpoch(name in _LARGEST)
                logged = f"train_{name}" + ("" if name in _LARGEST else "_epoch")
                self.log(logged, metric, on_step=False, on_epoch=True, metric_attribute=logged)
            self._of_epoch[name].update(value, self._size)

    def _show(self, values: dict[str, Tensor]) -> None:
        """On the progress line."""
        shown = {f"train_{name}_step": value.float() for name, value in values.items()}
        if backward := self._of_epoch.get("backward_steps"):
            shown["train_backward_steps_step"] = backward.values[-1]
        self.log_dict(shown, prog_bar=True, on_step=True, on_epoch=False, batch_size=self._size)

    def _solutions(self) -> list[Solution]:
        return [s for _, layer in equilibrium_layers(self.model) if (s := layer.last_solution) is not None]

    def _forward_facts(self) -> dict[str, Tensor]:
        """Evaluations of f per sample, all layers together, and the largest certified error where proofs were wanted."""
        solutions = self._solutions()
        facts = {}
        if solutions:
            facts["forward_steps"] = torch.stack([s.steps.float().mean() for s in solutions]).sum()
        if proved := [s for s in solutions if s.proof_dtype is not None]:
            facts["error_bound"] = torch.stack([certified_errors(s).max() for s in proved]).max().float()
        return facts

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self._evaluate(batch, "test")

    def predict_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return self.model(batch[0]).argmax(1)

    def _evaluate(self, batch: tuple[Tensor, Tensor], prefix: str) -> None:
        x, y = batch
        logits = self.model(x)
        accuracy = self.accuracy[f"{prefix}_accuracy"]
        accuracy(logits, y)
        shown: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": len(y)}
        self.log(f"{prefix}_loss", F.cross_entropy(logits, y), prog_bar=True, **shown)
        self.log(f"{prefix}_acc", accuracy, prog_bar=True, **shown)  # type: ignore[arg-type]
        for name, value in self._forward_facts().items():
            self.log(f"{prefix}_{name}", value, reduce_fx="max" if name in _LARGEST else "mean", **shown)

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.parameters() if p.dim() > 1]
        vectors = [p for p in self.parameters() if p.dim() <= 1]
        optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": self.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=self.learning_rate,
        )
        self._total = max(int(self.trainer.estimated_stepping_batches), 2)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self._scheduler(optimizer, self._total), "interval": "step"},
        }

    def _scheduler(self, optimizer: torch.optim.Optimizer, total: int) -> _Scheduler:
        if self.schedule == "one_cycle":
            return torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=total)
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total, eta_min=1e-6)

    def on_train_start(self) -> None:
        """A run that is resumed with another number of epochs goes on in the schedule of that number."""
        if self._total is None:
            return
        config = self.trainer.lr_scheduler_configs[0]
        before: Any = config.scheduler
        if (before.total_steps if self.schedule == "one_cycle" else before.T_max) == self._total:
            return
        for group in before.optimizer.param_groups:
            group["lr"] = self.learning_rate
        config.scheduler = self._scheduler(before.optimizer, self._total)
        with warnings.catch_warnings():
            # That the optimiser took no step in between.
            warnings.simplefilter("ignore")
            for _ in range(before.last_epoch):
                config.scheduler.step()
