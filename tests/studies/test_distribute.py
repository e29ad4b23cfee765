"""Ray starts its own processes, which takes a while: with `make slow`."""

import json

import pytest
import torch

from perron.studies.compare import Settings, compare
from perron.training.run import UsageError

pytestmark = pytest.mark.slow
QUICK = Settings(parameters=2000, epochs=2, limit=200)
CORES = ["pcdeq1-tanh", "no-equilibrium"]


def test_runs_are_the_same_with_ray_and_without(tmp_path) -> None:
    pytest.importorskip("ray")
    lines: list[str] = []
    table = compare(CORES, 1, QUICK, tmp_path / "ray", ray=True, write=lines.append)
    # Ray gives a trial one thread; sums in another order would come out a little different.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    compare(CORES, 1, QUICK, tmp_path / "plain", write=lambda line: None)
    torch.set_num_threads(threads)
    assert sum("done" in line for line in lines) == 2
    assert all(core in table for core in CORES)
    for core in CORES:
        one, other = (
            json.loads(next((tmp_path / name).rglob(f"{core}-seed-0.json")).read_text()) for name in ("ray", "plain")
        )
        assert one["accuracy"] == other["accuracy"]
    lines.clear()
    compare(CORES, 1, QUICK, tmp_path / "ray", ray=True, write=lines.append)
    assert all("kept" in line for line in lines)


def test_a_run_that_fails_is_named_and_the_others_are_finished(tmp_path, monkeypatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.delenv("PERRON_DATA", raising=False)
    missing = Settings(data="mnist", parameters=2000, epochs=1)
    with pytest.raises(UsageError, match=r"1 of 1 runs failed.*mnist is not embedded"):
        compare(CORES[:1], 1, missing, tmp_path, ray=True, write=lambda line: None)


def test_without_ray_the_error_says_what_to_install(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(UsageError, match=r"perron\[tune\]"):
        compare(CORES[:1], 1, QUICK, tmp_path, ray=True, write=lambda line: None)
