"""What every study does the same, on one that counts."""

import json
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path

import pytest

import perron
from perron._errors import UsageError
from perron._files import BusyError, lock
from perron.report.tables import Columns, Results
from perron.studies.study import Job, Serial, Sitting, Study, Trial, result_of
from perron.training.records import versions


@dataclass(frozen=True, kw_only=True)
class Sum(Trial):
    kind: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Sums(Study[Sum]):
    """Adds steps up, one at a time, and keeps each in a file: a trial goes on where it stopped.

    Attributes:
        breaks: kind of the trials that raise.
        wait: a file whose appearance a trial waits for.
    """

    trial = Sum
    free = frozenset({"kinds", "seeds", "breaks", "stops", "wait"})
    measures = ("total",)

    steps: int = 3
    scale: float = 1.0
    shape: tuple[int, ...] = (2, 3)
    kinds: tuple[str, ...] = ("odd", "even")
    seeds: int = 2
    breaks: str | None = None
    stops: BaseException | None = None
    wait: Path | None = None

    @property
    def folder(self) -> str:
        return "sums"

    def check(self) -> None:
        if self.steps < 1:
            raise UsageError("steps must be at least 1")

    @cached_property
    def large(self) -> list[int]:
        return list(range(self.steps))

    def trials(self) -> list[Sum]:
        return [Sum(kind=kind, seed=seed) for seed, kind in product(range(self.seeds), self.kinds)]

    def rank(self, trial: Sum) -> tuple[int, int]:
        return ("odd", "even", "none").index(trial.kind), trial.seed

    def measure(self, trial: Sum, sitting: Sitting) -> dict[str, float] | None:
        if trial.kind == self.breaks:
            raise RuntimeError("one line\nand another")
        kept = sitting.folder / f"{trial.name}.steps"
        total = float(kept.read_text()) if kept.is_file() else 0.0
        while total < self.steps:
            total += 1
            kept.write_text(str(total))
            sitting.write(f"step {total:.0f}")
            if total == 2 and self.stops is not None:
                raise self.stops
            if total == 2 and sitting.left is not None:
                return None
            while self.wait is not None and not self.wait.exists():
                time.sleep(0.01)
        return {"total": self.scale * total + 0.5 * trial.seed}

    def said(self, result) -> str:
        return f"total {result['total']}"

    def columns(self, results: Results) -> Columns:
        return {
            "kind": lambda r: r[0]["kind"],
            "seed": lambda r: str(r[0]["seed"]),
            "total": lambda r: str(r[0]["total"]),
        }


ROWS = ["| odd | 0 | 3.0 |", "| odd | 1 | 3.5 |", "| even | 0 | 3.0 |", "| even | 1 | 3.5 |"]
ALL = ["odd-seed-0", "even-seed-0", "odd-seed-1", "even-seed-1"]


def silent(line: str) -> None:
    pass


def rows(text: str) -> list[str]:
    return text.splitlines()[2:-1]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".json"}


def test_every_trial_has_a_file_and_the_table_and_the_page_are_of_all(tmp_path) -> None:
    lines: list[str] = []
    text = Sums().run(tmp_path, write=lines.append)
    folder = tmp_path / "sums"
    assert rows(text) == ROWS
    assert text.splitlines()[-1] == f"page: {folder / 'report.html'}"
    assert (folder / "table.md").read_text() == "\n".join(text.splitlines()[:-1]) + "\n"
    assert [line for line in lines if "total" in line] == [
        "[1/4] odd, seed 0: total 3.0",
        "[2/4] even, seed 0: total 3.0",
        "[3/4] odd, seed 1: total 3.5",
        "[4/4] even, seed 1: total 3.5",
    ]
    assert "[1/4] odd, seed 0: step 2" in lines
    one = json.loads((folder / "even-seed-1.json").read_text())
    assert one == {"kind": "even", "seed": 1, "versions": versions(), "total": 3.5}
    page = (folder / "report.html").read_text()
    assert "steps 3, scale 1.0, shape (2, 3)" in page
    assert f"perron {perron.__version__}" in page
    assert page.count("<tr>") == 5
    # Again, and with one seed more.
    before = contents(folder)
    lines.clear()
    assert Sums().run(tmp_path, write=lines.append) == text
    assert lines == [
        f"[{n}/4] {'odd' if n % 2 else 'even'}, seed {(n - 1) // 2}: kept from {folder / name}.json"
        for n, name in enumerate(ALL, 1)
    ]
    assert contents(folder) == before
    # What another call has measured stays in the table.
    assert rows(Sums(kinds=("odd",), seeds=1).run(tmp_path, write=silent)) == ROWS


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)])
def test_an_interruption_in_the_middle_of_a_trial_loses_nothing(error: BaseException, tmp_path) -> None:
    folder = tmp_path / "sums"
    Sums(seeds=1, kinds=("odd",)).run(tmp_path, write=silent)
    with pytest.raises(type(error)):
        Sums(stops=error).run(tmp_path, write=silent)
    # What is done is there, and nothing says anything of the rest.
    assert ROWS[0] in (folder / "table.md").read_text()
    assert set(contents(folder)) == {"settings.json", "odd-seed-0.json"}
    assert not list(folder.glob("*.error"))
    lines: list[str] = []
    assert rows(Sums().run(tmp_path, write=lines.append)) == ROWS
    assert [line for line in lines if "even, seed 0: step" in line] == ["[2/4] even, seed 0: step 3"]


def test_the_table_is_written_anew_after_every_trial(tmp_path) -> None:
    counts = []

    def look(line: str) -> None:
        if line.endswith("step 1"):
            table = tmp_path / "sums" / "table.md"
            counts.append(len(table.read_text().splitlines()) - 2 if table.is_file() else 0)

    Sums().run(tmp_path, write=look)
    assert counts == [0, 1, 2, 3]


def test_a_damaged_result_is_said_and_done_again(tmp_path) -> None:
    folder = tmp_path / "sums"
    text = Sums().run(tmp_path, write=silent)
    before = contents(folder)
    path = folder / "odd-seed-1.json"
    whole = json.loads(path.read_text())
    for damaged in ("", path.read_text()[:20], "[]", json.dumps({**whole, "seed": 0}), '{"kind": "odd", "seed": 1}'):
        path.write_text(damaged)
        lines: list[str] = []
        assert Sums().run(tmp_path, write=lines.append) == text
        assert f"[3/4] odd, seed 1: {path} is no result of it, and done again" in lines
        assert sum("kept from" in line for line in lines) == 3
        assert contents(folder) == before
    # A result from before it said what it is of, and by which version.
    path.write_text('{"total": 9.0}')
    assert "| odd | 1 | 9.0 |" in Sums().run(tmp_path, write=silent)
    assert "versions that were not recorded" in (folder / "report.html").read_text()


def test_files_of_something_else_are_not_counted(tmp_path) -> None:
    folder = tmp_path / "sums"
    text = Sums().run(tmp_path, write=silent)
    strangers = {
        "half-seed-0": {"kind": "half", "seed": 0, "total": 1.0},
        "none-seed-x": {},
        "none-seed-1": {"kind": "none", "seed": 2, "total": 1.0},
        "none-seed-2": {"kind": "none", "seed": 2},
    }
    for name, value in strangers.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    assert Sums().run(tmp_path, write=silent) == text


def test_settings_are_those_of_earlier_results(tmp_path) -> None:
    Sums(seeds=1).run(tmp_path, write=silent)
    folder = tmp_path / "sums"
    before = contents(folder)
    for study, message in (
        (Sums(steps=4), "steps is 3 there, 4 was given"),
        (Sums(scale=2.0), r"scale is 1\.0 there, 2\.0 was given"),
        (Sums(shape=(2,)), r"shape is \[2, 3\] there, \[2\] was given"),
    ):
        with pytest.raises(UsageError, match=rf"other settings \({message}\); name another --runs folder, or delete"):
            study.run(tmp_path, write=silent)
    assert contents(folder) == before
    with pytest.raises(UsageError, match="at least 1"):
        Sums(steps=0).run(tmp_path / "elsewhere", write=silent)
    assert not (tmp_path / "elsewhere").exists()
    # A setting that came later had its default before.
    path = folder / "settings.json"
    path.write_text('{"steps": 3, "shape": [2, 3]}')
    with pytest.raises(UsageError, match=r"scale is 1\.0 there"):
        Sums(scale=2.0).run(tmp_path, write=silent)
    Sums(seeds=1).run(tmp_path, write=silent)
    assert json.loads(path.read_text()) == {"steps": 3, "scale": 1.0, "shape": [2, 3]}
    path.write_text("{")
    with pytest.raises(UsageError, match=r"settings\.json is damaged"):
        Sums().run(tmp_path, write=silent)
    assert path.read_text() == "{"
    with lock(folder / ".lock"):
        pass


def test_the_budget_ends_it_and_the_same_call_goes_on(tmp_path) -> None:
    lines: list[str] = []
    assert Sums().run(tmp_path, budget=0.0, write=lines.append) == "no trial is finished yet"
    assert lines == ["the budget is spent, 4 of 4 trials are left; the same command goes on here"]
    lines.clear()
    # Enough to begin every trial, and to end none.
    assert Sums().run(tmp_path, budget=3600.0, write=lines.append) == "no trial is finished yet"
    assert sum("interrupted by the budget; the same command goes on here" in line for line in lines) == 4
    assert "4 of 4 trials are left" in lines[-1]
    assert contents(tmp_path / "sums").keys() == {"settings.json"}
    lines.clear()
    assert rows(Sums().run(tmp_path, write=lines.append)) == ROWS
    assert [line for line in lines if "step" in line] == [
        f"[{n}/4] {'odd' if n % 2 else 'even'}, seed {(n - 1) // 2}: step 3" for n in (1, 2, 3, 4)
    ]


def test_a_trial_that_raises_is_named_and_the_others_are_kept(tmp_path) -> None:
    folder, lines = tmp_path / "sums", []
    with pytest.raises(
        UsageError, match=r"2 of 4 trials failed; the first: \[1/4\] odd, seed 0: RuntimeError: one line and"
    ):
        Sums(breaks="odd").run(tmp_path, write=lines.append)
    assert rows(lines[-1]) == ROWS[2:]
    assert f"failed: [1/4] odd, seed 0: RuntimeError: one line and another; see {folder / 'odd-seed-0.error'}" in lines
    assert "Traceback" in (folder / "odd-seed-0.error").read_text()
    assert {p.stem for p in folder.glob("*-seed-*.json")} == {"even-seed-0", "even-seed-1"}
    before = contents(folder)
    assert rows(Sums().run(tmp_path, write=silent)) == ROWS
    assert not list(folder.glob("*.error"))
    assert before.items() <= contents(folder).items()


class Backwards:
    """Everything is done before anything is said, the last first; jobs go through a pickle, as to another process."""

    def run(self, jobs, write) -> Iterator[Job]:
        for job in reversed(jobs):
            pickle.loads(pickle.dumps(job))(write)
        yield from reversed(jobs)


def test_an_executor_in_another_order_finds_the_same(tmp_path) -> None:
    lines: list[str] = []
    text = Sums().run(tmp_path / "backwards", executor=Backwards(), write=lines.append)
    assert next(line for line in lines if "total" in line) == "[4/4] even, seed 1: total 3.5"
    assert rows(text) == rows(Sums().run(tmp_path, executor=Serial(), write=silent)) == ROWS
    assert contents(tmp_path / "backwards" / "sums") == contents(tmp_path / "sums")
    with pytest.raises(UsageError, match=r"2 of 4 trials failed; the first: \[1/4\] odd"):
        Sums(breaks="odd").run(tmp_path / "failing", executor=Backwards(), write=silent)


def test_another_process_computes_again_what_is_cached() -> None:
    study = Sums(steps=4)
    assert len(study.large) == 4
    copy = pickle.loads(pickle.dumps(study))
    assert copy == study
    assert "large" not in vars(copy)
    assert copy.large == study.large


class Lossy:
    """Loses one job with its process."""

    def run(self, jobs, write) -> Iterator[Job]:
        for job in jobs:
            if job.trial.seed == 1:
                job.fail("the worker died\nfor some reason")
            else:
                job(write)
            yield job


def test_a_job_that_is_lost_is_named(tmp_path) -> None:
    with pytest.raises(UsageError, match=r"2 of 4 trials failed; the first: \[3/4\] odd, seed 1: the worker died; see"):
        Sums().run(tmp_path, executor=Lossy(), write=silent)
    assert rows(Sums().run(tmp_path, write=silent)) == ROWS


def start(root: Path, wait: Path):
    process = multiprocessing.get_context("fork").Process(target=lambda: Sums(wait=wait).run(root, write=silent))
    process.daemon = True
    process.start()
    while not list(root.rglob("*.steps")):
        time.sleep(0.01)
    return process


def test_two_processes_at_once_and_a_kill(tmp_path) -> None:
    process = start(tmp_path, tmp_path / "go")
    with pytest.raises(BusyError, match=rf"process {process.pid} "):
        Sums().run(tmp_path, write=silent)
    (tmp_path / "go").touch()
    process.join(60)
    assert process.exitcode == 0
    assert rows(Sums().run(tmp_path, write=silent)) == ROWS
    # One that is killed leaves the folder to the next.
    killed = start(tmp_path / "killed", tmp_path / "never")
    os.kill(killed.pid, signal.SIGKILL)
    killed.join(60)
    assert rows(Sums().run(tmp_path / "killed", write=silent)) == ROWS


def test_only_a_whole_result_of_the_same_thing_counts(tmp_path) -> None:
    path, identity, keys = tmp_path / "deq-seed-0.json", {"core": "deq", "seed": 0}, ("accuracy",)
    whole = {**identity, "accuracy": 0.5}
    assert result_of(path, identity, keys) is None
    for text in ("", '{"core": "deq", "accuracy": 0.', "[]", json.dumps({**whole, "seed": 1}), json.dumps(identity)):
        path.write_text(text)
        assert result_of(path, identity, keys) is None
    for text in ('{"accuracy": 0.5}', json.dumps(whole)):
        path.write_text(text)
        assert result_of(path, identity, keys) == whole


def test_names_and_labels_of_trials() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Network(Trial):
        activation: str
        width: int
        depth: int

    trial = Network(activation="abs, centred", width=32, depth=4)
    assert trial.label == "abs, centred, width 32, depth 4"
    assert trial.name == "abs-centred-width-32-depth-4"
