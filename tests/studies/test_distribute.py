"""Ray starts its own processes, which takes a while: with `make slow`."""

import json

import pytest
import torch

from perron._errors import UsageError
from perron.studies.distribute import Ray
from perron.studies.images import Images

pytestmark = pytest.mark.slow
CORES = ("pcdeq1-tanh", "no-equilibrium")
QUICK = Images(parameters=2000, epochs=2, limit=200, models=CORES)


def test_runs_are_the_same_with_ray_and_without(tmp_path) -> None:
    pytest.importorskip("ray")
    lines: list[str] = []
    table = QUICK.run(tmp_path / "ray", executor=Ray(), write=lines.append)
    # Ray gives a trial one thread; sums in another order would come out a little different.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    QUICK.run(tmp_path / "plain", write=lambda line: None)
    torch.set_num_threads(threads)
    assert sum(": test " in line for line in lines) == 2
    assert all(core in table for core in CORES)
    for core in CORES:
        one, other = (
            json.loads(next((tmp_path / name).rglob(f"{core}-seed-0.json")).read_text()) for name in ("ray", "plain")
        )
        assert one["accuracy"] == other["accuracy"]
    lines.clear()
    QUICK.run(tmp_path / "ray", executor=Ray(), write=lines.append)
    assert all("kept" in line for line in lines)


def test_a_trial_that_fails_is_named_and_the_others_are_finished(tmp_path) -> None:
    pytest.importorskip("ray")
    damaged = tmp_path / QUICK.folder / "checkpoints" / "pcdeq1-tanh-seed-0" / "last.ckpt"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"half")
    lines: list[str] = []
    with pytest.raises(UsageError, match=r"1 of 2 trials failed; the first: \[1/2\] pcdeq1-tanh, seed 0: .*is damaged"):
        QUICK.run(tmp_path, executor=Ray(), write=lines.append)
    assert "| no-equilibrium |" in lines[-1]


def test_the_budget_holds_in_every_process(tmp_path) -> None:
    pytest.importorskip("ray")
    lines: list[str] = []
    QUICK.run(tmp_path, budget=0.0, executor=Ray(), write=lines.append)
    assert "2 of 2 trials are left; the same command goes on here" in lines[-1]


def test_without_ray_the_error_says_what_to_install(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(UsageError, match=r"perron\[tune\]"):
        QUICK.run(tmp_path, executor=Ray(), write=lambda line: None)
