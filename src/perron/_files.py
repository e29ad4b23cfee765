"""Files that are there whole or not at all, and folders into which one process writes at a time."""

from __future__ import annotations

import itertools
import json
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO
from uuid import uuid4

from perron._errors import UsageError

try:
    import fcntl
except ImportError:  # pragma: no cover
    # Windows has no advisory locks of this kind: there, nothing is locked.
    fcntl = None  # type: ignore[assignment]

__all__ = ["BusyError", "lock", "new_folder", "read_json", "replacing", "whole", "write_json"]


class BusyError(UsageError):
    """Another process writes there; the message says which."""


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path in the same folder; what the block writes there takes the place of `path` when it has ended well, else nothing
    changes."""
    partial = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        yield partial
        with partial.open("rb+") as file:
            # Else a power cut could leave the new name with nothing behind it.
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """The same as an open text file."""
    with whole(path) as partial, partial.open("x", encoding="utf-8", newline="") as file:
        yield file


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all; makes the folder."""
    text = json.dumps(value, indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text)


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no file, or something else in it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


@contextmanager
def lock(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock file, which names the process that holds it. The system frees it when that process ends, however it does.

    Args:
        path: of the lock file, which is made, and left there empty: whoever deleted it could delete another's.
        wait: for its release, instead of raising.

    Raises:
        BusyError: another process, or another block of this one, holds it.
    """
    with path.open("a+", encoding="utf-8") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise BusyError(f"{holder} is writing into {path.parent}; wait for its end, or stop it") from error
        except OSError as error:
            warnings.warn(
                f"{path} cannot be locked here ({error}): see that no other process writes there", stacklevel=3
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def new_folder(parent: Path, stem: str) -> Path:
    """Make parent/stem-N and return it, N being the least number above all that are there; no two callers get the same."""
    parent.mkdir(parents=True, exist_ok=True)
    taken = [int(p.name[len(stem) + 1 :]) for p in parent.glob(f"{stem}-*") if p.name[len(stem) + 1 :].isdigit()]
    for number in itertools.count(max(taken, default=0) + 1):
        folder = parent / f"{stem}-{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError("there are more numbers than folders")
