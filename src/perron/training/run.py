"""A run: one folder with checkpoints, history, evaluations and report, from its start to its report."""

from __future__ import annotations

import csv
import logging
import shutil
import sys
import time
import warnings
from argparse import ArgumentError
from collections.abc import Collection
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import perron
from perron._errors import UsageError
from perron._files import lock, new_folder, read_json, replacing, write_json
from perron.cells.refusal import Refusal
from perron.data import ImageData
from perron.data.graphs import GRAPHS
from perron.report import write_report
from perron.report.tables import at_least, at_most
from perron.training.callbacks import EpochLines, History, Progress
from perron.training.evaluation import evaluate
from perron.training.module import Classifier
from perron.training.records import (
    BestCheckpoint,
    OutdatedError,
    Provenance,
    WholeCheckpoints,
    differences,
    outdated,
    read_checkpoint,
    versions,
    written_by,
)
from perron.verify import certify_classes

__all__ = [
    "Loaded",
    "certify_run",
    "fit",
    "load",
    "predict",
    "preset",
    "presets",
    "quiet_lightning",
    "report",
    "test",
    "train",
    "validate",
]

# What a run can be given anew: it is used, and recorded. All else is part of what is trained, or kept in the checkpoint.
_WHEN_RESUMED = (
    "trainer.max_epochs",
    "trainer.max_time",
    "trainer.callbacks",
    "trainer.accelerator",
    "trainer.logger",
    "trainer.log_every_n_steps",
    "trainer.profiler",
    "trainer.enable_progress_bar",
    "trainer.default_root_dir",
    "data.init_args.data_dir",
)
_WHEN_EVALUATED = ("data.init_args.data_dir", "data.init_args.batch_size")


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A trained network with its data and its folder.

    Attributes:
        folder: of the run.
        checkpoint: from which the network was read.
        epochs, step: how many it was trained for; the step tells the weights of one run apart.
        module, data: the network and its data.
        provenance, history: of the whole run, which may have gone on after this checkpoint.
    """

    folder: Path
    checkpoint: Path
    epochs: int
    step: int
    module: Classifier
    data: ImageData
    provenance: dict[str, Any]
    history: list[dict[str, float]]

    @property
    def weights(self) -> str:
        return f"{self.checkpoint.name}, epoch {self.epochs}"


def _instantiate(arguments: list[str], defaults: dict[str, Any]) -> LightningCLI:
    quiet_lightning()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter.*")
        try:
            return LightningCLI(
                Classifier,
                ImageData,
                subclass_mode_data=True,
                run=False,
                args=arguments,
                trainer_defaults=defaults,
                save_config_callback=None,
                seed_everything_default=0,
                parser_kwargs={"exit_on_error": False},
            )
        except (ArgumentError, ValueError, MisconfigurationException) as error:
            raise UsageError(" ".join(str(error).split())) from error


def _check_readable(checkpoint: Path, state: dict[str, Any]) -> None:
    """Refuse what another version wrote and this one cannot read: the classes, the options or the weights.

    Raises:
        OutdatedError: one of them is not known here.
    """
    if written_by(state) == perron.__version__:
        return
    stored = ["--config", state["callbacks"]["Provenance"]["config"]]
    try:
        cli = _instantiate(stored, {"logger": False, "enable_checkpointing": False})
        cli.model.load_state_dict(state["state_dict"])
    except (RuntimeError, TypeError) as error:
        raise outdated(checkpoint, written_by(state), error) from error


def _data_arguments(data_dir: str | None) -> list[str]:
    return [] if data_dir is None else ["--data.init_args.data_dir", str(data_dir)]


def _runs(root: Path, name: str) -> list[Path]:
    """The runs of a preset, oldest first."""
    folders = [p for p in (root / name).glob("run-*") if p.name[4:].isdigit()]
    return sorted(folders, key=lambda p: int(p.name[4:]))


def _parsed(cli: LightningCLI, text: str) -> dict[str, Any]:
    """A configuration with every default filled in."""
    options: dict[str, Any] = yaml.safe_load(cli.parser.dump(cli.parser.parse_string(text), skip_none=False))
    return options


def _check_changes(cli: LightningCLI, stored: str, free: Collection[str], rule: str) -> None:
    given = yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))
    if changed := differences(_parsed(cli, stored), given, free):
        raise UsageError(f"{'; '.join(changed)}: {rule}, but for {', '.join(free)}")


def presets() -> dict[str, Path]:
    """The files of the presets by their names."""
    folder = Path(str(resources.files("perron"))) / "training" / "presets"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def preset(name: str) -> Path:
    """The file of a preset, or the .yaml file of this name.

    Raises:
        UsageError: there is none.
    """
    if name in GRAPHS:
        raise UsageError(f"{name} is a graph: `perron study graphs --data {name}` trains on it")
    path = presets().get(name, Path(name))
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        raise UsageError(f"no preset {name!r}; choose one of {', '.join(presets())}, or a .yaml file")
    return path


def fit(config: Path, root: Path, data_dir: str | None, rest: list[str], *, resume: bool, command: str) -> str:
    """Train a preset into a new run folder, or continue its latest run; then evaluate it and write the report.

    Args:
        config: the YAML of the preset.
        root: folder of all runs; those of a preset are `root/<its name>/run-N`.
        data_dir: folder of the data files.
        rest: further options of Lightning's command line.
        resume: continue the latest run.
        command: for the record.

    Raises:
        UsageError: there is nothing to resume, what there is is damaged, or of another version that had other classes, or
            an option differs that a run cannot change.
        DataError: the data is missing or damaged.
        BusyError: another process trains this run.
    """
    parent = root / config.stem
    if resume:
        # A run that was stopped before its first epoch was over has nothing to go on from.
        every = _runs(root, config.stem)
        earlier = [run for run in every if (run / "checkpoints" / "last.ckpt").is_file()]
        if not earlier:
            where = f"{every[-1]} has no checkpoint" if every else f"no run of {config.stem!r} in {root}"
            raise UsageError(f"nothing to resume: {where}; run `perron fit {config.stem}` without --resume")
        with lock(earlier[-1] / ".lock"):
            _resume(earlier[-1], config, [*_data_arguments(data_dir), *rest], command)
        folder = earlier[-1]
    else:
        folder = new_folder(parent, "run")
        with lock(folder / ".lock"):
            _start(folder, config, [*_data_arguments(data_dir), *rest], command)
    return report(load(str(folder), root, data_dir, []))


def _start(folder: Path, config: Path, arguments: list[str], command: str) -> None:
    provenance = Provenance(command, config.read_text())
    try:
        cli = _trainable(folder, ["--config", str(config), *arguments], provenance)
        cli.datamodule.setup("fit")
    except BaseException:
        # Nothing was trained: no run.
        shutil.rmtree(folder)
        raise
    _train(folder, cli, provenance, None)


def _resume(folder: Path, config: Path, arguments: list[str], command: str) -> None:
    last = folder / "checkpoints" / "last.ckpt"
    try:
        state = read_checkpoint(last)
    except OutdatedError:
        raise
    except UsageError as error:
        raise UsageError(f"{error}; copy best.ckpt over it to go on from there, or start a new run") from error
    _check_readable(last, state)
    record = state["callbacks"]["Provenance"]
    if record["source"] and yaml.safe_load(record["source"]) != yaml.safe_load(config.read_text()):
        raise UsageError(
            f"{config} is not what {folder} was started from: give what is to change as an option, or start a new run"
        )
    provenance = Provenance(command)
    here = ["--trainer.default_root_dir", str(folder), "--trainer.enable_progress_bar", str(sys.stdout.isatty())]
    cli = _trainable(folder, ["--config", _stored(folder, record["config"]), *here, *arguments], provenance)
    _check_changes(cli, record["config"], _WHEN_RESUMED, f"{folder} goes on with the settings it was started with")
    if reason := _finished(cli.trainer, state):
        print(f"{folder} is finished already: {reason}")
        return
    cli.datamodule.setup("fit")
    _train(folder, cli, provenance, last)


def _stored(folder: Path, text: str) -> str:
    """The run's config.yaml, which may be ahead of its last checkpoint; that of the checkpoint where it is missing."""
    path = folder / "config.yaml"
    if not path.is_file():
        return text
    try:
        found = path.read_text()
        if yaml.safe_load(found).keys() == yaml.safe_load(text).keys():
            return found
    except (yaml.YAMLError, AttributeError, UnicodeDecodeError):
        pass
    raise UsageError(f"{path} is damaged; delete it to go on with the copy in the run's checkpoint")


def _finished(trainer: L.Trainer, state: dict[str, Any]) -> str | None:
    """Why there is nothing left to train, if so."""
    epochs = state["epoch"] + 1
    if trainer.max_epochs is not None and 0 <= trainer.max_epochs <= epochs:
        return f"{epochs} epochs of {trainer.max_epochs}; a larger --trainer.max_epochs goes on"
    if 0 <= trainer.max_steps <= state["global_step"]:
        return f"{state['global_step']} steps of {trainer.max_steps}"
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        kept = state["callbacks"].get(callback.state_key) if isinstance(callback, EarlyStopping) else None
        if kept and kept["wait_count"] >= kept["patience"]:
            return f"stopped early after {epochs} epochs; --trainer.callbacks [] goes on without"
    return None


def _trainable(folder: Path, arguments: list[str], provenance: Provenance) -> LightningCLI:
    shown = Progress() if sys.stdout.isatty() else EpochLines(lambda line: print(line, flush=True))
    last = ModelCheckpoint(folder / "checkpoints", "last", save_on_train_epoch_end=True, enable_version_counter=False)
    return _instantiate(
        arguments,
        {
            "callbacks": [History(folder), BestCheckpoint(folder / "checkpoints"), last, provenance, shown],
            "enable_progress_bar": isinstance(shown, Progress),
            "default_root_dir": str(folder),
            "logger": False,
            # Each epoch draws its own batches from (seed, epoch), so that a resumed run sees the same ones.
            "reload_dataloaders_every_n_epochs": 1,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
        },
    )


def _train(folder: Path, cli: LightningCLI, provenance: Provenance, checkpoint: Path | None) -> None:
    provenance.config = cli.parser.dump(cli.config, skip_none=False)
    with replacing(folder / "config.yaml") as file:
        file.write(provenance.config)
    train(cli.trainer, cli.model, cli.datamodule, checkpoint)


def train(trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule, checkpoint: Path | None) -> None:
    """Fit, from a checkpoint on if there is one, which is the run's own. Ctrl-C stays a KeyboardInterrupt."""
    trainer.strategy.checkpoint_io = WholeCheckpoints()
    _ignore_known_warnings()
    try:
        # Its checkpoints also hold plain Python objects.
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=False)
    except SystemExit as stop:
        # Lightning makes an exit of it; the command line says how to go on.
        raise KeyboardInterrupt from stop
    if trainer.interrupted:
        raise KeyboardInterrupt


def quiet_lightning() -> None:
    """Without its greetings; its warnings stay."""
    for name in ("lightning", "lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _ignore_known_warnings() -> None:
    """What says nothing to the person at the command line: the data is in memory, and Lightning's own use of torch."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Resuming writes into the same folder on purpose, also where it was moved.
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*The dirpath has changed.*")
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
    """Load a preset's latest run, a run folder or a checkpoint. Only load checkpoints you trust: they are pickles.

    Args:
        target: name of the preset, or a path.
        root: folder of all runs.
        data_dir: folder of the data files.
        rest: further options; a run is evaluated as it was trained, so few can differ.

    Raises:
        UsageError: there is no such run, its checkpoint is damaged, or of another version that had other classes, or an
            option differs that cannot.
    """
    checkpoint = _find(target, root)
    state = read_checkpoint(checkpoint)
    _check_readable(checkpoint, state)
    config = state["callbacks"]["Provenance"]["config"]
    # A checkpoint that was copied elsewhere is evaluated where it lies.
    folder = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    cli = _instantiate(
        ["--config", config, *_data_arguments(data_dir), *rest],
        {
            "logger": False,
            "default_root_dir": str(folder),
            "enable_checkpointing": False,
            "enable_model_summary": False,
        },
    )
    if rest:
        _check_changes(cli, config, _WHEN_EVALUATED, "a run is evaluated with the settings it was trained with")
    module: Classifier = cli.model
    try:
        module.load_state_dict(state["state_dict"])
    except RuntimeError as error:
        raise UsageError(f"{checkpoint} does not fit this version of perron: {error}") from error
    whole_run = _latest(checkpoint, state)["callbacks"]
    return Loaded(
        folder=folder,
        checkpoint=checkpoint,
        epochs=state["epoch"] + 1,
        step=state["global_step"],
        module=module.eval(),
        data=cli.datamodule,
        provenance=whole_run["Provenance"],
        history=whole_run.get("History", {}).get("rows", []),
    )


def _latest(checkpoint: Path, state: dict[str, Any]) -> dict[str, Any]:
    """The state of the last epoch of the checkpoint's run, as far as there is one."""
    last = checkpoint.with_name("last.ckpt")
    try:
        return read_checkpoint(last) if checkpoint.name == "best.ckpt" and last.is_file() else state
    except UsageError:
        return state


def _kept(loaded: Loaded, split: str) -> dict[str, Any]:
    """The last evaluation on this split, of these weights or of others; empty where there is none."""
    path = loaded.folder / f"evaluation-{split}.json"
    found = read_json(path)
    if found is None and path.is_file():
        raise UsageError(f"{path} is damaged, and with it the number of evaluations; delete it to count anew")
    return found or {}


def _evaluate(loaded: Loaded, split: str) -> dict[str, Any]:
    loaded.data.setup("test" if split == "test" else "validate")
    loader = loaded.data.test_dataloader() if split == "test" else loaded.data.val_dataloader()
    _kept(loaded, split)
    result = {
        **evaluate(loaded.module.model, loader, len(loaded.data.classes)),
        "checkpoint": loaded.checkpoint.name,
        "epochs": loaded.epochs,
        "step": loaded.step,
        "evaluated": time.strftime("%Y-%m-%d %H:%M:%S"),
        "versions": versions(),
    }
    with lock(loaded.folder / ".evaluations.lock", wait=True):
        result["times_evaluated"] = _kept(loaded, split).get("times_evaluated", 0) + 1
        write_json(loaded.folder / f"evaluation-{split}.json", result)
    return result


def _line(split: str, result: dict[str, Any]) -> str:
    worst = max(
        (max(layer["error_bound"], default=float("inf")) for layer in result["layers"].values()), default=float("nan")
    )
    return (
        f"{split} accuracy {result['accuracy']:.2%} on {result['samples']} images ({result['checkpoint']}, epoch "
        f"{result['epochs']}); enclosures proven {result['enclosures_proven']}/{result['enclosures']}, largest certified "
        f"relative error {at_most(worst, '.2e')}"
    )


def validate(loaded: Loaded) -> str:
    line = _line("validation", _evaluate(loaded, "validation"))
    return f"{line}\nkept in {loaded.folder / 'evaluation-validation.json'}"


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
    with torch.no_grad(), replacing(path) as file:
        writer = csv.writer(file)
        writer.writerow(["index", "class", "step"])
        index = 0
        for x, _ in loaded.data.predict_dataloader():
            for k in loaded.module(x).argmax(1).tolist():
                writer.writerow([index, loaded.data.classes[k], loaded.step])
                index += 1
    return f"{index} predictions of {loaded.weights} (step {loaded.step}) written to {path}"


def certify_run(loaded: Loaded, split: str) -> str:
    """The certificate in words, and the count of samples whose class is constant over the enclosures."""
    loaded.data.setup("test" if split == "test" else "validate")
    loader = loaded.data.test_dataloader() if split == "test" else loaded.data.val_dataloader()
    certificate = perron.certify(loaded.module.model)
    constant: list[bool] = []
    margin: list[float] = []
    right: list[bool] = []
    path = loaded.folder / f"certified-{split}.csv"
    try:
        with replacing(path) as file:
            writer = csv.writer(file)
            writer.writerow(["index", "class", "constant_over_enclosure", "margin", "step"])
            for x, y in loader:
                found = certify_classes(loaded.module.model, x)
                rows = zip(found.predicted.tolist(), found.constant.tolist(), found.margin.tolist(), strict=True)
                for p, c, m in rows:
                    writer.writerow([len(constant), loaded.data.classes[p], c, at_least(m, ".6e"), loaded.step])
                    constant.append(c)
                    margin.append(m)
                right += (found.predicted == y).tolist()
    except Refusal as refusal:
        return f"{certificate}\n{split}: the class over whole enclosures is not verified: {refusal}"
    both = sum(c and r for c, r in zip(constant, right, strict=True))
    return "\n".join(
        [
            str(certificate),
            f"{split}: the class is proven constant over the whole enclosure of every equilibrium layer for "
            f"{sum(constant)} of {len(constant)} images ({both} of them classified correctly)",
            f"smallest proven logit margin {at_least(min(margin, default=float('nan')), '.4f')}; per image: {path}",
        ]
    )


def report(loaded: Loaded) -> str:
    """Write the page about these weights; evaluations of others are left out, and named."""
    kept = {split: _kept(loaded, split) for split in ("validation", "test")}
    evaluations = {split: e for split, e in kept.items() if e.get("step") == loaded.step}
    if not evaluations:
        evaluations = {"validation": _evaluate(loaded, "validation")}
    path = write_report(
        loaded.folder / "report.html",
        title=loaded.folder.parent.name,
        history=loaded.history,
        evaluations=evaluations,
        classes=loaded.data.classes,
        provenance=loaded.provenance,
    )
    lines = [_line(split, result) for split, result in evaluations.items()]
    lines += [
        f"left out: the {split} evaluation of {_source(e)}; `perron {command}` evaluates {loaded.weights}"
        for split, command in (("validation", "validate"), ("test", "test"))
        if (e := kept[split]) and split not in evaluations
    ]
    return "\n".join([*lines, f"report: {path}"])


def _source(evaluation: dict[str, Any]) -> str:
    known = "checkpoint" in evaluation
    return f"{evaluation['checkpoint']}, epoch {evaluation['epochs']}" if known else "weights that were not recorded"
