"""What runs and studies keep of a training: only what did happen, and whole."""

from __future__ import annotations

import importlib
import platform
import textwrap
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

import perron
from perron._errors import UsageError
from perron._files import whole

__all__ = [
    "BestCheckpoint",
    "OutdatedError",
    "Provenance",
    "WholeCheckpoints",
    "differences",
    "outdated",
    "read_checkpoint",
    "versions",
    "written_by",
]


def versions() -> dict[str, str]:
    return {"perron": perron.__version__, "torch": torch.__version__, "python": platform.python_version()}


class OutdatedError(UsageError):
    """What another version of perron wrote, and this one cannot read."""


def outdated(path: Path, written: str | None, reason: object) -> OutdatedError:
    """The error of a file that the perron of that version wrote, if it is known; the reason is cut to one line."""
    writer = f"perron {written}" if written else "another version of perron"
    remedy = f"install perron {written}" if written else "install the version that wrote it"
    why = textwrap.shorten(str(reason), 200, placeholder=" ...")
    return OutdatedError(
        f"{path} was written by {writer}, and perron {perron.__version__} cannot read it ({why}); {remedy} to go on with "
        "it, or train again"
    )


def written_by(state: Mapping[str, Any]) -> str:
    """The version of perron that wrote a checkpoint."""
    version: str = state["callbacks"]["Provenance"]["sittings"][-1]["versions"]["perron"]
    return version


class Provenance(L.Callback):
    """Keeps the configuration, and the command and versions of every sitting, in every checkpoint.

    Args:
        command: of this sitting.
        source: text of the file from which the run was configured.
    """

    def __init__(self, command: str, source: str = "") -> None:
        super().__init__()
        self.config, self.source = "", source
        self.sittings: list[dict[str, Any]] = [
            {
                "command": command,
                "started": time.strftime("%Y-%m-%d %H:%M:%S"),
                "epoch": 0,
                "versions": {**versions(), "lightning": L.__version__},
            }
        ]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.sittings[-1]["epoch"] = trainer.current_epoch

    def state_dict(self) -> dict[str, Any]:
        return {"config": self.config, "source": self.source, "sittings": self.sittings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        earlier = _with_sittings(state_dict)
        self.source = earlier["source"]
        self.sittings = [*earlier["sittings"], *self.sittings]

    def versions(self) -> dict[str, str]:
        """Of all sittings: where they differ, one after the other."""
        names = self.sittings[-1]["versions"]
        return {name: ", ".join(dict.fromkeys(s["versions"][name] for s in self.sittings)) for name in names}


def _with_sittings(record: dict[str, Any]) -> dict[str, Any]:
    """A record from before sittings were told apart had one start and one set of versions."""
    if "sittings" in record:
        return record
    one = {"started": record["started"], "epoch": 0, "versions": record["versions"]}
    return {"config": record["config"], "source": "", "sittings": [{"command": c, **one} for c in record["commands"]]}


class BestCheckpoint(ModelCheckpoint):
    """best.ckpt, of the epoch with the least validation loss; it stays known as that where the run's folder is moved."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "best", monitor="val_loss", save_on_train_epoch_end=True, enable_version_counter=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["best_k_models"]:
            path = str(Path(str(self.dirpath)) / "best.ckpt")
            (score,) = state_dict["best_k_models"].values()
            state_dict = {**state_dict, "dirpath": self.dirpath, "best_model_path": path, "kth_best_model_path": path}
            state_dict["best_k_models"] = {path: score}
        super().load_state_dict(state_dict)


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that take their place in one step.

    Lightning's own are moved there from the system's folder of temporary files, which is a copy if that is on another disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with whole(Path(path)) as partial:
            torch.save(checkpoint, partial)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint holds. Only read checkpoints you trust: they are pickles.

    Raises:
        OutdatedError: it holds objects of another version of perron.
        UsageError: it is damaged, or of something else.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False)
        for name in ("epoch", "global_step", "state_dict"):
            state[name]
        callbacks = state["callbacks"]
        callbacks["Provenance"] = _with_sittings(callbacks["Provenance"])
    except (KeyError, TypeError) as error:
        raise UsageError(f"{path} is not a checkpoint of perron ({type(error).__name__}: {error})") from error
    except (AttributeError, ImportError) as error:
        # A class that was pickled stands elsewhere, or no more.
        if "perron" not in str(error):
            raise UsageError(f"{path} needs what is not installed ({error})") from error
        raise outdated(path, None, error) from error
    except Exception as error:
        # Unpickling damaged bytes can raise anything.
        raise UsageError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    return state


def differences(stored: Mapping[str, Any], given: Mapping[str, Any], free: Collection[str]) -> list[str]:
    """Options, in words, that differ in two configurations and are not free.

    Args:
        stored, given: nested dictionaries.
        free: options with their dots. Of callbacks, those that keep a state go on with it, and with it the arguments they had.
    """
    before, after = _flat(stored), _flat(given)
    names = [k for k in dict.fromkeys([*before, *after]) if k not in free]
    found = [
        f"{name} is {before.get(name)!r} there, {after.get(name)!r} was given"
        for name in names
        if before.get(name) != after.get(name)
    ]
    old, new = _callbacks(before), _callbacks(after)
    return found + [
        f"{name} has {old[name]} there, {new[name]} was given"
        for name in old
        if name in new and old[name] != new[name] and _has_state(name)
    ]


def _flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _callbacks(options: Mapping[str, Any]) -> dict[str, Any]:
    return {c["class_path"]: c.get("init_args", {}) for c in options.get("trainer.callbacks") or []}


def _has_state(class_path: str) -> bool:
    module, _, name = class_path.rpartition(".")
    return getattr(importlib.import_module(module), name).state_dict is not L.Callback.state_dict
