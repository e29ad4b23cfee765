"""A run: one folder with checkpoints, history, evaluations and report, from its start to its report."""

from __future__ import annotations

import csv
import json
import logging
import platform
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI

import perron
from perron.affine import Refusal
from perron.data import ImageData
from perron.report import write_report
from perron.training.callbacks import EpochLines, History, Progress
from perron.training.evaluation import evaluate
from perron.training.module import Classifier
from perron.verify import certify_classes

__all__ = [
    "Loaded",
    "Provenance",
    "UsageError",
    "certify_run",
    "fit",
    "ignore_known_warnings",
    "load",
    "predict",
    "report",
    "test",
    "validate",
]


class UsageError(RuntimeError):
    """What was asked for does not exist; the message says what does."""


class Provenance(L.Callback):
    """Keeps the whole configuration, the command and the versions in every checkpoint."""

    def __init__(self, command: str) -> None:
        super().__init__()
        self.record: dict[str, Any] = {
            "commands": [command],
            "config": "",
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
            "versions": {
                "perron": perron.__version__,
                "torch": torch.__version__,
                "lightning": L.__version__,
                "python": platform.python_version(),
            },
        }

    def state_dict(self) -> dict[str, Any]:
        return self.record

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        commands = [*state_dict["commands"], *self.record["commands"]]
        self.record = {**self.record, "commands": commands, "started": state_dict["started"]}


@dataclass(frozen=True)
class Loaded:
    """A trained network with its data and its folder."""

    folder: Path
    checkpoint: Path
    module: Classifier
    data: ImageData
    trainer: L.Trainer
    provenance: dict[str, Any]
    history: list[dict[str, float]]


def _instantiate(arguments: list[str], defaults: dict[str, Any]) -> LightningCLI:
    # Lightning's greetings; its warnings stay.
    logging.getLogger("lightning").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter.*")
        return LightningCLI(
            Classifier,
            ImageData,
            subclass_mode_data=True,
            run=False,
            args=arguments,
            trainer_defaults=defaults,
            save_config_callback=None,
            seed_everything_default=0,
        )


def _data_arguments(data_dir: str | None) -> list[str]:
    return [] if data_dir is None else ["--data.init_args.data_dir", str(data_dir)]


def _runs(root: Path, name: str) -> list[Path]:
    """The runs of a preset, oldest first."""
    folders = [p for p in (root / name).glob("run-*") if p.name[4:].isdigit()]
    return sorted(folders, key=lambda p: int(p.name[4:]))


def fit(config: Path, root: Path, data_dir: str | None, rest: list[str], *, resume: bool, command: str) -> Path:
    """Train a preset into a new run folder, or continue its latest run; then evaluate it and write the report."""
    name = config.stem
    earlier = _runs(root, name)
    checkpoint: Path | None = None
    if resume:
        if not earlier or not (earlier[-1] / "checkpoints" / "last.ckpt").is_file():
            raise UsageError(f"nothing to resume: no checkpoint of {name!r} in {root}; run `perron fit {name}` first")
        folder = earlier[-1]
        checkpoint = folder / "checkpoints" / "last.ckpt"
        config = folder / "config.yaml"
    else:
        folder = root / name / f"run-{int(earlier[-1].name[4:]) + 1 if earlier else 1}"
    history, provenance = History(folder), Provenance(command)
    shown = Progress() if sys.stdout.isatty() else EpochLines(lambda line: print(line, flush=True))
    best = ModelCheckpoint(folder / "checkpoints", "best", monitor="val_loss", enable_version_counter=False)
    last = ModelCheckpoint(folder / "checkpoints", "last", save_on_train_epoch_end=True, enable_version_counter=False)
    cli = _instantiate(
        ["--config", str(config), *_data_arguments(data_dir), *rest],
        {
            "callbacks": [history, best, last, provenance, shown],
            "enable_progress_bar": isinstance(shown, Progress),
            "default_root_dir": str(folder),
            "logger": False,
            # Each epoch draws its own batches from (seed, epoch), so that a resumed run sees the same ones.
            "reload_dataloaders_every_n_epochs": 1,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
        },
    )
    folder.mkdir(parents=True, exist_ok=True)
    written = cli.parser.dump(cli.config, skip_none=False)
    (folder / "config.yaml").write_text(written)
    provenance.record["config"] = written
    started = time.perf_counter()
    ignore_known_warnings()
    # The checkpoint is the run's own: it also holds plain Python objects.
    try:
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=checkpoint, weights_only=False)
    except SystemExit as stop:
        # Lightning turns Ctrl-C into an exit; the command line says how to go on.
        raise KeyboardInterrupt from stop
    if cli.trainer.interrupted:
        raise KeyboardInterrupt
    seconds = time.perf_counter() - started
    loaded = load(str(folder / "checkpoints" / "best.ckpt"), root, data_dir, [])
    _evaluate(loaded, "validation", seconds=seconds)
    print(report(loaded))
    return folder


def ignore_known_warnings() -> None:
    """What says nothing to the person at the command line: the data is in memory, and Lightning's own use of torch."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Resuming writes into the same folder on purpose.
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")


def _find(target: str, root: Path) -> Path:
    path = Path(target)
    if path.is_file():
        return path
    folders = [path] if (path / "checkpoints").is_dir() else _runs(root, target)[::-1]
    for folder in folders:
        for name in ("best.ckpt", "last.ckpt"):
            if (folder / "checkpoints" / name).is_file():
                return folder / "checkpoints" / name
    raise UsageError(f"no checkpoint, run folder or finished run named {target!r} (runs are looked for in {root})")


def load(target: str, root: Path, data_dir: str | None, rest: list[str]) -> Loaded:
    """Load a preset's latest run, a run folder or a checkpoint. Only load checkpoints you trust: they are pickles."""
    checkpoint = _find(target, root)
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=False)
        provenance = state["callbacks"]["Provenance"]
    except (KeyError, EOFError, RuntimeError, ValueError, TypeError, ModuleNotFoundError, OSError) as error:
        raise UsageError(f"{checkpoint} is not a checkpoint of `perron fit`, or it is damaged ({error})") from error
    except Exception as error:
        # Unpickling damaged bytes can raise anything.
        raise UsageError(f"{checkpoint} is damaged ({type(error).__name__}: {error})") from error
    folder = checkpoint.parent.parent
    cli = _instantiate(
        ["--config", provenance["config"], *_data_arguments(data_dir), *rest],
        {
            "logger": False,
            "default_root_dir": str(folder),
            "enable_checkpointing": False,
            "enable_model_summary": False,
        },
    )
    module: Classifier = cli.model
    module.load_state_dict(state["state_dict"])
    history = state["callbacks"].get("History", {}).get("rows", [])
    return Loaded(folder, checkpoint, module.eval(), cli.datamodule, cli.trainer, provenance, history)


def _evaluate(loaded: Loaded, split: str, **more: Any) -> dict[str, Any]:
    loaded.data.setup("test" if split == "test" else "validate")
    loader = loaded.data.test_dataloader() if split == "test" else loaded.data.val_dataloader()
    path = loaded.folder / f"evaluation-{split}.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    result = {**before, **evaluate(loaded.module.model, loader, len(loaded.data.classes)), **more}
    result["times_evaluated"] = before.get("times_evaluated", 0) + 1
    path.write_text(json.dumps(result))
    return result


def _line(split: str, result: dict[str, Any]) -> str:
    worst = max(
        (max(layer["error_bound"], default=float("inf")) for layer in result["layers"].values()), default=float("nan")
    )
    return (
        f"{split} accuracy {result['accuracy']:.2%} on {result['samples']} images; enclosures proven "
        f"{result['enclosures_proven']}/{result['enclosures']}, largest certified relative error {worst:.2e}"
    )


def validate(loaded: Loaded) -> str:
    return _line("validation", _evaluate(loaded, "validation"))


def test(loaded: Loaded) -> str:
    result = _evaluate(loaded, "test")
    lines = [_line("test", result)]
    if result["times_evaluated"] > 1:
        lines.append(
            f"note: this is evaluation {result['times_evaluated']} of this run on the test set; do not choose models by it"
        )
    return "\n".join([*lines, report(loaded)])


def predict(loaded: Loaded) -> str:
    loaded.data.setup("predict")
    path = loaded.folder / "predictions.csv"
    with torch.no_grad(), path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "class"])
        index = 0
        for x, _ in loaded.data.predict_dataloader():
            for k in loaded.module(x).argmax(1).tolist():
                writer.writerow([index, loaded.data.classes[k]])
                index += 1
    return f"{index} predictions written to {path}"


def certify_run(loaded: Loaded, split: str) -> str:
    """The certificate in words, and the count of samples whose class is constant over the enclosures."""
    loaded.data.setup("test" if split == "test" else "validate")
    loader = loaded.data.test_dataloader() if split == "test" else loaded.data.val_dataloader()
    certificate = perron.certify(loaded.module.model)
    constant: list[bool] = []
    margin: list[float] = []
    right: list[bool] = []
    path = loaded.folder / f"certified-{split}.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "class", "constant_over_enclosure", "margin"])
        for x, y in loader:
            try:
                found = certify_classes(loaded.module.model, x)
            except Refusal as refusal:
                return f"{certificate}\n{split}: the class over whole enclosures is not verified: {refusal}"
            for p, c, m in zip(found.predicted.tolist(), found.constant.tolist(), found.margin.tolist(), strict=True):
                writer.writerow([len(constant), loaded.data.classes[p], c, f"{m:.6g}"])
                constant.append(c)
                margin.append(m)
            right += (found.predicted == y).tolist()
    both = sum(c and r for c, r in zip(constant, right, strict=True))
    return "\n".join(
        [
            str(certificate),
            f"{split}: the class is proven constant over the whole enclosure of every equilibrium layer for "
            f"{sum(constant)} of {len(constant)} images ({both} of them classified correctly)",
            f"smallest proven logit margin {min(margin, default=float('nan')):.4g}; per image: {path}",
        ]
    )


def report(loaded: Loaded) -> str:
    evaluations = {
        split: json.loads(path.read_text())
        for split in ("validation", "test")
        if (path := loaded.folder / f"evaluation-{split}.json").is_file()
    }
    if not evaluations:
        evaluations = {"validation": _evaluate(loaded, "validation")}
    history = _full_history(loaded)
    path = write_report(
        loaded.folder / "report.html",
        title=loaded.folder.parent.name,
        history=history,
        evaluations=evaluations,
        classes=loaded.data.classes,
        provenance=loaded.provenance,
    )
    lines = [_line(split, result) for split, result in evaluations.items()]
    return "\n".join([*lines, f"report: {path}"])


def _full_history(loaded: Loaded) -> list[dict[str, float]]:
    """The best checkpoint's history ends at the best epoch; history.csv goes on to the last."""
    path = loaded.folder / "history.csv"
    if not path.is_file():
        return loaded.history
    with path.open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
