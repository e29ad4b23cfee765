import json
from dataclasses import replace

import pytest

from perron._errors import UsageError
from perron._files import BusyError, lock
from perron.cli import main
from perron.studies.kernels import Kernels, KernelTrial
from perron.studies.study import Sitting

QUICK = Kernels(images=100, kernel_images=60, widths=(8, 16), seeds=2)


def test_table_page_and_resumption(tmp_path, monkeypatch) -> None:
    lines: list[str] = []
    table = QUICK.run(tmp_path, write=lines.append)
    assert table.count("| matched |") == 2
    assert sum("microseconds" in line for line in lines) == 12
    folder = tmp_path / "kernels" / "digits-tanh-sa-0.3-100-images-60-in-kernels"
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 6
    assert "to the power: implicit -0." in table
    assert "hard_tanh" in page
    kept = json.loads((folder / "summary.json").read_text())
    assert len(kept["eigenvalues"]["matched"]) == 60
    assert f"matched {kept['distance']['matched']:.5f}" in table
    path = folder / "implicit-width-16-seed-1.json"
    before = path.stat().st_mtime_ns
    assert QUICK.run(tmp_path, write=lines.append) == table
    assert path.stat().st_mtime_ns == before
    monkeypatch.setattr("perron.studies.kernels.write_kernels", lambda path, *_: path)
    # Half a result is none, and a folder that is named alike is of other settings.
    whole = json.loads(path.read_text())
    path.write_text(path.read_text()[:60])
    replace(QUICK, widths=(16,)).run(tmp_path, write=lines.append)
    again = json.loads(path.read_text())
    assert again["test"] == whole["test"]
    assert again["versions"]["perron"]
    close = replace(QUICK, sa=0.30000001)
    assert close.folder == QUICK.folder
    with pytest.raises(UsageError, match=r"sa is 0\.3 there, 0\.30000001 was given"):
        close.run(tmp_path, write=lines.append)
    with lock(folder / ".lock"), pytest.raises(BusyError):
        replace(QUICK, widths=(16,)).run(tmp_path, write=lines.append)


def test_a_page_of_some_of_the_trials(tmp_path) -> None:
    """As an interruption leaves it: a width without all models, a model without times to compare with."""
    QUICK.run(tmp_path, budget=0.0, write=lambda line: None)
    measured = QUICK.measure(
        KernelTrial(model="matched", width=8, seed=0), Sitting(folder=tmp_path, left=None, write=print)
    )
    results = [{"model": "matched", "width": 8, "seed": 0, **measured}]
    assert QUICK.text(results).splitlines()[-1].endswith("| - |")
    QUICK.page(tmp_path / "report.html", results)
    assert (tmp_path / "report.html").read_text().count("<svg") == 6


def test_command_and_misuse(tmp_path, capsys) -> None:
    options = ["--runs", str(tmp_path), "--widths", "8", "--seeds", "1", "--images", "60", "--kernel-images", "30"]
    command = ["study", "kernels", *options]
    assert main([*command, "--activation", "relu"]) == 0
    assert "relative operator-norm distance" in capsys.readouterr().out
    assert main([*command, "--activation", "relu", "--sa", "3"]) == 2
    assert "[0, 1)" in capsys.readouterr().err
    assert main([*command, "--activation", "linear", "--sa", "0.9999999999999999"]) == 2
    assert "lower sa" in capsys.readouterr().err
    assert main([*command, "--data", "letters"]) == 2
    assert main([*command, "--activation", "cube"]) == 2
    capsys.readouterr()
    assert main([*command, "--widths", "a"]) == 2
    assert "whole numbers" in capsys.readouterr().err
    with pytest.raises(UsageError, match="at least"):
        replace(QUICK, widths=()).run(tmp_path)
