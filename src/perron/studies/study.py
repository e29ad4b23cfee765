"""What all studies have in common: trials measured one by one, every result kept whole, a table and a page of what there is.

A study is a frozen record of its settings that says which trials it has, how one is measured, and what is shown of the
results. Its folder is written by one process at a time and holds results of one set of settings: settings.json, one file a
trial, table.md and report.html, which are written anew whenever a trial is over. Whatever ends a study, the same call goes
on: whole results are kept, anything else is measured again.
"""

from __future__ import annotations

import json
import re
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from html import escape
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from perron._errors import UsageError
from perron._files import lock, read_json, replacing, write_json
from perron.report import write_page
from perron.report.tables import Columns, Results, html_table, said_versions, text_table
from perron.training.records import differences, versions

__all__ = ["Executor", "Job", "Serial", "Sitting", "Study", "Trial", "result_of"]

Write = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One thing that a study measures, told from the others by its fields: what it is, then what numbers it has."""

    @property
    def label(self) -> str:
        """In words, such as "mondeq, seed 0"."""
        (_, what), *numbers = asdict(self).items()
        return ", ".join([str(what), *(f"{name} {value}" for name, value in numbers)])

    @property
    def name(self) -> str:
        """Of its files, such as "mondeq-seed-0"."""
        return re.sub(r"[^\w.]+", "-", self.label)


T = TypeVar("T", bound=Trial)


@dataclass(frozen=True, kw_only=True)
class Sitting:
    """The circumstances in which a trial is measured.

    Attributes:
        folder: of the study; a trial that can go on where it stopped keeps there what it needs for that.
        left: seconds of the budget when the sitting begins, or None without a budget.
        write: takes a line of progress.
    """

    folder: Path
    left: float | None
    write: Write


class Study(ABC, Generic[T]):
    """A frozen keyword-only dataclass of settings; subclasses say what is measured.

    Attributes:
        trial: class of the trials.
        measures: what a whole result has.
        free: names of fields that choose trials or name places, and may differ from call to call. All others are settings:
            results in a folder have them in common. A setting that is added later defaults to what was done before.
    """

    trial: ClassVar[type[Trial]]
    measures: ClassVar[tuple[str, ...]]
    free: ClassVar[frozenset[str]]

    @property
    @abstractmethod
    def folder(self) -> str:
        """Of the results, in the folder of all runs."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What is known of the data; results in a folder have it in common, like the settings."""
        return {}

    def check(self) -> None:
        """Raise UsageError if a setting is unknown or out of range."""

    def prepare(self) -> None:
        """Called before the first trial that is measured, to raise what would be the same error in all of them."""

    @abstractmethod
    def trials(self) -> Sequence[T]:
        """What is to be measured, in this order."""

    @abstractmethod
    def rank(self, trial: T) -> Any:
        """Where a result stands in the table: a key to sort by. Raises ValueError if the trial is none of such a study."""

    @abstractmethod
    def measure(self, trial: T, sitting: Sitting) -> Mapping[str, Any] | None:
        """The result of a trial; None if the budget ended it and the next call goes on."""

    def said(self, result: Mapping[str, Any]) -> str:
        """A result in a few words."""
        return "done"

    @abstractmethod
    def columns(self, results: Results) -> Columns:
        """Of the table."""

    def groups(self, results: Results) -> Sequence[Results]:
        """The rows of the table: the results that each is made of."""
        return [[r] for r in results]

    def text(self, results: Results) -> str:
        """The table in Markdown."""
        return text_table(self.columns(results), self.groups(results))

    def summary(self, results: Results) -> Mapping[str, Any] | None:
        """What is found of all results together, if anything; kept in summary.json."""
        return None

    def page(self, path: Path, results: Results) -> None:
        """Write the page."""
        common = ", ".join(
            f"{name.replace('_', ' ')} {value}" for name, value in {**self.settings, **self.facts}.items()
        )
        title = type(self).__name__
        about = f"<h1>{title}</h1><p class='soft'>{escape(common)}; {escape(said_versions(results))}</p>"
        write_page(path, title, about + html_table(self.columns(results), self.groups(results)))

    @property
    def settings(self) -> dict[str, Any]:
        """All fields that are not free."""
        return {name: value for name, value in self._fields().items() if name not in self.free}

    def _fields(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    def _defaults(self) -> dict[str, Any]:
        """What earlier results are taken to have been measured with where their settings do not say it."""
        known = {f.name: f.default for f in fields(self) if f.default is not MISSING}  # type: ignore[arg-type]
        return {**{name: value for name, value in known.items() if name not in self.free}, **self.facts}

    def __getstate__(self) -> dict[str, Any]:
        # Another process computes again what is cached here: it may be large.
        return self._fields()

    def run(
        self,
        root: Path,
        *,
        budget: float | None = None,
        executor: Executor | None = None,
        write: Write = print,
    ) -> str:
        """Measure every trial that has no result yet; the table, and where the page is.

        Args:
            root: folder of all runs.
            budget: stop after so many seconds; the same call then goes on.
            executor: how trials are run; one after the other by default.
            write: takes a line of progress.

        Raises:
            UsageError: something is unknown or out of range, the folder has results with other settings, or trials failed:
                the others are finished first.
            BusyError: another process works in the folder.
        """
        self.check()
        folder = (root / self.folder).resolve()
        end = None if budget is None else time.time() + budget
        with self._guarded(folder):
            trials = self.trials()
            jobs = [
                Job(study=self, trial=trial, folder=folder, end=end, number=f"[{number}/{len(trials)}]")
                for number, trial in enumerate(trials, 1)
            ]
            left = [job for job in jobs if not job.kept(write)]
            if left:
                self.prepare()
            for job in (executor or Serial()).run(left, write):
                if job.over(write):
                    self._publish(folder)
            shown = self._publish(folder)
        failed = [job for job in left if job.error.is_file()]
        if failed:
            write(shown)
            raise UsageError(f"{len(failed)} of {len(jobs)} trials failed; the first: {failed[0].failure}")
        if waiting := sum(job.found is None for job in left):
            write(f"the budget is spent, {waiting} of {len(jobs)} trials are left; the same command goes on here")
        return shown

    @contextmanager
    def _guarded(self, folder: Path) -> Iterator[None]:
        """The folder of results that were all measured with these settings, for this process alone."""
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder / ".lock"):
            path = folder / "settings.json"
            given, defaults = _as_json({**self.settings, **self.facts}), _as_json(self._defaults())
            before = read_json(path)
            if before is None and path.is_file():
                raise UsageError(f"{path} is damaged, and with it unknown what the results there were measured with")
            if before is not None and (changed := differences({**defaults, **before}, given, ())):
                raise UsageError(
                    f"{folder} holds results with other settings ({'; '.join(changed)}); name another --runs folder, or "
                    "delete this one"
                )
            write_json(path, given)
            yield

    def _publish(self, folder: Path) -> str:
        """Table and page of all results that there are, those of other calls included."""
        results = self._results(folder)
        if not results:
            return "no trial is finished yet"
        text, page = self.text(results), folder / "report.html"
        with replacing(folder / "table.md") as file:
            file.write(text + "\n")
        if (summary := self.summary(results)) is not None:
            write_json(folder / "summary.json", {**summary, "versions": versions()})
        self.page(page, results)
        return f"{text}\npage: {page}"

    def _results(self, folder: Path) -> list[dict[str, Any]]:
        asked = {trial.name: trial for trial in self.trials()}
        found = []
        for path in folder.glob("*.json"):
            trial = asked[path.stem] if path.stem in asked else self._trial(path)
            if trial is not None and (result := result_of(path, asdict(trial), self.measures)) is not None:
                found.append((self.rank(trial), result))
        return [result for _, result in sorted(found, key=lambda pair: pair[0])]

    def _trial(self, path: Path) -> T | None:
        """The trial whose result a file holds; None if it is of none that such a study could have."""
        kept = read_json(path) or {}
        try:
            trial: Any = self.trial(**{f.name: kept[f.name] for f in fields(self.trial)})
            self.rank(trial)
        except (KeyError, ValueError):
            return None
        return trial if trial.name == path.stem else None


@dataclass(frozen=True, kw_only=True)
class Job:
    """A trial to be measured: a call does it, in this process or in another that shares the folder, and writes what came.

    Attributes:
        study, trial: which.
        folder: of the study.
        end: seconds since the epoch at which the budget is spent, or None.
        number: of the trial, in words.
    """

    study: Study[Any]
    trial: Trial
    folder: Path
    end: float | None
    number: str

    @property
    def label(self) -> str:
        return f"{self.number} {self.trial.label}"

    @property
    def result(self) -> Path:
        return self.folder / f"{self.trial.name}.json"

    @property
    def error(self) -> Path:
        """There if the trial failed: what was wrong, and where it happened."""
        return self.folder / f"{self.trial.name}.error"

    @property
    def found(self) -> dict[str, Any] | None:
        """The result, if there is a whole one."""
        return result_of(self.result, asdict(self.trial), self.study.measures)

    @property
    def failure(self) -> str:
        return f"{self.label}: {self.error.read_text(encoding='utf-8').splitlines()[0]}; see {self.error}"

    def __call__(self, write: Write) -> None:
        left = None if self.end is None else self.end - time.time()
        if left is not None and left <= 0:
            return
        sitting = Sitting(folder=self.folder, left=left, write=lambda line: write(f"{self.label}: {line}"))
        try:
            measured = self.study.measure(self.trial, sitting)
            if measured is None:
                sitting.write("interrupted by the budget; the same command goes on here")
            else:
                write_json(self.result, {**asdict(self.trial), "versions": versions(), **measured})
        except Exception as error:
            words = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
            self.fail(f"{' '.join(words.split())}\n\n{traceback.format_exc()}")

    def fail(self, text: str) -> None:
        """Keep why there is no result; the first line says it."""
        with replacing(self.error) as file:
            file.write(text)

    def kept(self, write: Write) -> bool:
        """Whether an earlier call measured this already; says so, and clears away what it left of a failure."""
        self.error.unlink(missing_ok=True)
        if self.found is not None:
            write(f"{self.label}: kept from {self.result}")
            return True
        if self.result.is_file():
            write(f"{self.label}: {self.result} is no result of it, and done again")
        return False

    def over(self, write: Write) -> bool:
        """Whether there is a result now; says what came of it."""
        found = self.found
        if found is not None:
            write(f"{self.label}: {self.study.said(found)}")
        elif self.error.is_file():
            write(f"failed: {self.failure}")
        return found is not None


class Executor(Protocol):
    """A way to run jobs, on this machine or on several that share the folder."""

    def run(self, jobs: Sequence[Job], write: Write) -> Iterator[Job]:
        """Call every job, and yield it as soon as it is over, in any order. `Job.fail` if it could not come to its end."""
        ...


class Serial:
    """One job after the other, in this process."""

    def run(self, jobs: Sequence[Job], write: Write) -> Iterator[Job]:
        for job in jobs:
            job(write)
            yield job


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from a file: tuples are lists there."""
    read: dict[str, Any] = json.loads(json.dumps(value))
    return read


def result_of(path: Path, identity: Mapping[str, Any], measures: Collection[str]) -> dict[str, Any] | None:
    """The result in a file; None where there is none, or half of one, or that of something else.

    Args:
        path: of the JSON.
        identity: what the result is of; it may be missing in it, but not differ.
        measures: what a result has.
    """
    found = read_json(path)
    if found is None or any(found.get(k, v) != v for k, v in identity.items()) or not set(measures) <= found.keys():
        return None
    return {**identity, **found}
