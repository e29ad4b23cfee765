"""What is recorded of an epoch is of that epoch."""

import csv
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from perron.data import Digits
from perron.models import PositiveConcaveLinearNet
from perron.training import Classifier, History
from perron.training.callbacks import EpochLines, StopAfter
from perron.training.module import Schedule


class Witness(L.Callback):
    """Notes loss, accuracy and size of every training batch, by epoch."""

    def __init__(self) -> None:
        self.steps: dict[int, list[tuple[float, int]]] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.steps.setdefault(trainer.current_epoch, []).append((float(outputs["loss"]), len(batch[1])))

    def mean(self, epoch: int) -> float:
        steps = self.steps[epoch]
        return sum(loss * size for loss, size in steps) / sum(size for _, size in steps)


def train(
    folder: Path, *more: L.Callback, checkpoint: Path | None = None, schedule: Schedule = "one_cycle", **options
) -> tuple[Witness, list[str]]:
    witness, lines = Witness(), []
    last = ModelCheckpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False)
    torch.manual_seed(0)
    trainer = L.Trainer(
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        reload_dataloaders_every_n_epochs=1,
        callbacks=[History(folder), EpochLines(lines.append), witness, *more, last],
        **options,
    )
    # 180 images in batches of 50: the last has 30.
    data = Digits(limit=200, batch_size=50)
    module = Classifier(PositiveConcaveLinearNet(64, 10, width=8), schedule=schedule)
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=False)
    return witness, lines


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("epochs", [1, 3])
def test_training_loss_of_every_epoch_is_its_own(tmp_path, epochs: int) -> None:
    witness, lines = train(tmp_path, max_epochs=epochs)
    found = rows(tmp_path)
    assert len(found) == len(lines) == epochs
    for epoch, row in enumerate(found):
        assert float(row["train_loss_epoch"]) == pytest.approx(witness.mean(epoch), rel=1e-6)
        assert f"loss {witness.mean(epoch):.3f}," in lines[epoch]
        assert float(row["train_forward_steps_epoch"]) > 0
        assert float(row["train_error_bound"]) < 1


def test_after_a_resume(tmp_path) -> None:
    first, _ = train(tmp_path, StopAfter(1), max_epochs=3)
    second, _ = train(tmp_path, max_epochs=3, checkpoint=tmp_path / "last.ckpt")
    found = rows(tmp_path)
    assert [float(r["epoch"]) for r in found] == [0, 1, 2]
    means = [first.mean(0), second.mean(1), second.mean(2)]
    assert [float(r["train_loss_epoch"]) for r in found] == pytest.approx(means, rel=1e-6)


def test_an_epoch_cut_short_has_a_row_of_its_steps(tmp_path) -> None:
    witness, _ = train(tmp_path, max_epochs=3, max_steps=6)
    found = rows(tmp_path)
    assert [len(steps) for steps in witness.steps.values()] == [4, 2]
    assert float(found[1]["train_loss_epoch"]) == pytest.approx(witness.mean(1), rel=1e-6)


def test_more_epochs_go_on_in_their_own_schedule(tmp_path) -> None:
    """As if the first had been of the same schedule: whatever the learning rate ended at."""
    for schedule in ("one_cycle", "cosine"):
        folder, whole = tmp_path / schedule, tmp_path / f"{schedule}-whole"
        train(folder, max_epochs=1, schedule=schedule)
        train(folder, max_epochs=3, schedule=schedule, checkpoint=folder / "last.ckpt")
        train(whole, max_epochs=3, schedule=schedule)
        rates = [[float(r["learning_rate"]) for r in rows(f)] for f in (folder, whole)]
        assert rates[0][0] < rates[1][0] / 3
        assert rates[0][1:] == pytest.approx(rates[1][1:], rel=1e-9)


def test_an_epoch_without_validation_has_no_validation_loss(tmp_path) -> None:
    _, lines = train(tmp_path, max_epochs=3, check_val_every_n_epoch=2)
    found = rows(tmp_path)
    assert [bool(r["val_loss"]) for r in found] == [False, True, False]
    assert ["val_loss" in line for line in lines] == [False, True, False]


class Interrupt(L.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.current_epoch == 1 and batch_idx == 2:
            raise RuntimeError("stop")


def test_an_epoch_that_was_interrupted_has_no_row(tmp_path) -> None:
    with pytest.raises(RuntimeError, match="stop"):
        train(tmp_path, Interrupt(), max_epochs=3)
    assert [float(r["epoch"]) for r in rows(tmp_path)] == [0]


def test_rows_of_epochs_that_the_checkpoint_does_not_have_go_at_once(tmp_path) -> None:
    """As after a kill between the row and the checkpoint."""
    train(tmp_path, StopAfter(1), max_epochs=2)
    train(tmp_path / "more", max_epochs=2)
    (tmp_path / "more" / "history.csv").replace(tmp_path / "history.csv")
    assert len(rows(tmp_path)) == 2
    with pytest.raises(RuntimeError, match="stop"):
        train(tmp_path, Interrupt(), max_epochs=2, checkpoint=tmp_path / "last.ckpt")
    assert [float(r["epoch"]) for r in rows(tmp_path)] == [0]
