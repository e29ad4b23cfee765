import json
import math
from dataclasses import replace

import lightning as L
import pytest

from perron._errors import UsageError
from perron._files import lock
from perron.cli import main
from perron.report.comparison import COLUMNS, by_core
from perron.report.tables import text_table
from perron.studies.images import Images, _Budget

QUICK = Images(parameters=2000, epochs=2, limit=200)
CORES = ("pcdeq1-tanh", "mondeq", "subdeq-signed", "no-equilibrium")


def test_table_page_and_resumption(tmp_path) -> None:
    lines: list[str] = []
    table = replace(QUICK, models=CORES).run(tmp_path, write=lines.append)
    assert all(core in table for core in CORES)
    assert "positive concave" in table
    assert "monotone" in table
    assert "refused" in table or "bounded gain" in table
    assert sum("epoch 2/2" in line for line in lines) == len(CORES)
    folder = next((tmp_path / "images").iterdir())
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")
    result = json.loads((folder / "pcdeq1-tanh-seed-0.json").read_text())
    assert result["proven"] == 1
    assert result["certificate"]["kind"] == "positive concave"
    assert result["effective depth"] is None or result["effective depth"] >= 1
    assert abs(result["parameters"] - 2000) < 100
    # Again: nothing is trained twice, a further seed is.
    lines.clear()
    again = replace(QUICK, models=CORES[:1], seeds=2).run(tmp_path, write=lines.append)
    assert sum("kept" in line for line in lines) == 1
    assert sum("epoch 2/2" in line for line in lines) == 1
    assert "±" in again


def run_for_an_epoch(study: Images, root, **options) -> str:
    """With a budget that the first epoch uses up, however fast or slow the machine is."""

    def stop(budget: L.Callback, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        budget.end = -math.inf
        ordinary(budget, trainer, pl_module)

    with pytest.MonkeyPatch.context() as patch:
        ordinary = _Budget.on_train_epoch_end
        patch.setattr(_Budget, "on_train_epoch_end", stop)
        return study.run(root, budget=3600, **options)


def test_the_budget_stops_and_the_same_command_goes_on(tmp_path) -> None:
    lines: list[str] = []
    assert "no trial is finished" in run_for_an_epoch(replace(QUICK, models=CORES[:1]), tmp_path, write=lines.append)
    assert "interrupted by the budget" in lines[-2]
    table = replace(QUICK, models=CORES[:1]).run(tmp_path, write=lines.append)
    assert "pcdeq1-tanh" in table
    # The first epoch was not done again.
    assert sum("epoch 1/2" in line for line in lines) == 1
    lines.clear()
    replace(QUICK, models=CORES[:2]).run(tmp_path, budget=0.0, write=lines.append)
    assert "budget is spent" in lines[-1]


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    silent = lambda line: None
    replace(QUICK, models=CORES[:1]).run(whole, write=silent)
    run_for_an_epoch(replace(QUICK, models=CORES[:1]), parts, write=silent)
    replace(QUICK, models=CORES[:1]).run(parts, write=silent)
    results = [json.loads(next(p.rglob("pcdeq1-tanh-seed-0.json")).read_text()) for p in (whole, parts)]
    assert results[0]["accuracy"] == results[1]["accuracy"]
    assert results[0]["depth"] == results[1]["depth"]


def test_misuse(tmp_path, capsys) -> None:
    with pytest.raises(UsageError, match="unknown model"):
        replace(QUICK, models=("lstm",)).run(tmp_path)
    with pytest.raises(UsageError, match="unknown data"):
        Images(data="imagenet", models=CORES).run(tmp_path)
    with pytest.raises(UsageError, match="at least 1"):
        replace(QUICK, models=CORES, seeds=0).run(tmp_path)
    replace(QUICK, models=CORES[3:]).run(tmp_path, write=lambda line: None)
    with pytest.raises(UsageError, match="other settings"):
        Images(parameters=2000, epochs=2, limit=100, models=CORES[3:]).run(tmp_path)
    with pytest.raises(UsageError, match="limit must be at least 20"):
        replace(QUICK, limit=3).run(tmp_path / "few", write=lambda line: None)
    assert main(["study", "images", "--models", "lstm", "--runs", str(tmp_path)]) == 2
    assert main(["study", "images", "--modles", "mondeq", "--runs", str(tmp_path)]) == 2
    assert (
        main(["study", "images", "--data", "mnist", "--data-dir", str(tmp_path / "none"), "--runs", str(tmp_path)]) == 2
    )
    assert "does not exist" in capsys.readouterr().err


def test_missing_values_are_dashes() -> None:
    row = {
        "core": "x",
        "seed": 0,
        "width": 3,
        "accuracy": 0.5,
        "parameters": 10,
        "forward steps": None,
        "backward steps": None,
        "seconds per epoch": 1.0,
        "peak MiB": None,
        "certificate": {"kind": "not needed", "rate": None, "refusal": None},
        "proven": None,
        "largest certified error": None,
        "effective depth": None,
    }
    line = text_table(COLUMNS, by_core([row])).splitlines()[-1]
    assert line == "| x | 50.00 % | 1 | 10 | 3 | - | - | 1.0 | - | not needed | - | - | - |"


@pytest.mark.parametrize("core", ["subdeq-nonnegative", "mondeq"])
def test_presets_of_baselines_go_through_every_command(core: str, tmp_path, capsys) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(
        f"""
model:
  model:
    class_path: perron.models.BaselineNet
    init_args: {{core: {core}, in_features: 64, width: 8}}
data:
  class_path: perron.data.Digits
  init_args: {{limit: 100}}
trainer: {{max_epochs: 1}}
"""
    )
    runs = ["--runs", str(tmp_path / "runs")]
    assert main(["fit", str(config), *runs]) == 0
    assert main(["test", "small", *runs]) == 0
    assert "enclosures proven 360/360" in capsys.readouterr().out
    assert main(["certify", "small", *runs]) == 0
    out = capsys.readouterr().out
    assert "certified (network)" in out
    assert "proven constant over the whole enclosure" in out
    assert int(out.split("equilibrium layer for ")[1].split(" of 360")[0]) > 340


def test_convolutional_networks_and_penalties_have_their_own_folders(tmp_path) -> None:
    conv = Images(parameters=2000, epochs=1, limit=100, network="conv")
    table = replace(conv, models=("mondeq", "no-equilibrium")).run(tmp_path, write=lambda line: None)
    assert "monotone" in table
    penalised = Images(parameters=2000, epochs=1, limit=100, penalty="residual_ratio", penalty_weight=0.5)
    lines: list[str] = []
    replace(penalised, models=("deq",)).run(tmp_path, write=lines.append)
    assert {p.name for p in (tmp_path / "images").iterdir()} == {
        "digits-conv-1-epochs-2000-parameters",
        "digits-1-epochs-2000-parameters-residual_ratio-0.5",
    }
    for wrong in (
        {"network": "graph"},
        {"penalty": "weight"},
        {"penalty": "jacobian", "penalty_weight": -1.0},
    ):
        with pytest.raises(UsageError):
            Images(parameters=2000, epochs=1, **wrong, models=("deq",)).run(tmp_path, write=lambda line: None)
    with pytest.raises(UsageError, match="unknown model node"):
        replace(conv, models=("node",)).run(tmp_path, write=lambda line: None)


def test_results_from_before_a_setting_existed_are_kept(tmp_path) -> None:
    replace(QUICK, models=CORES[3:]).run(tmp_path, write=lambda line: None)
    path = next((tmp_path / "images").iterdir()) / "settings.json"
    old = json.loads(path.read_text())
    del old["penalty"], old["network"]
    path.write_text(json.dumps(old))
    lines: list[str] = []
    replace(QUICK, models=CORES[3:]).run(tmp_path, write=lines.append)
    assert "kept" in lines[0]


def test_what_a_kill_left_is_done_again_and_loses_nothing(tmp_path, monkeypatch) -> None:
    # Pictures take longer than all else.
    monkeypatch.setattr("perron.studies.images.write_comparison", lambda path, *_: path)
    silent = lambda line: None
    short = Images(parameters=2000, epochs=1, limit=100)
    table = replace(short, models=("mondeq",)).run(tmp_path, write=silent)
    folder = next((tmp_path / "images").iterdir())
    path = folder / "mondeq-seed-0.json"
    before = json.loads(path.read_text())
    assert before["forward steps"] > 0
    assert before["validation accuracy"] is not None
    # Half a result, a result of another seed under this name, and none: training is over, its checkpoint has it all.
    for text in (path.read_text()[:200], json.dumps({**before, "seed": 7}), ""):
        path.write_text(text)
        lines: list[str] = []
        replace(short, models=("mondeq",)).run(tmp_path, write=lines.append)
        assert "is no result of it, and done again" in lines[0]
        assert not any("epoch 1/1" in line for line in lines)
        after = json.loads(path.read_text())
        assert {k: after[k] for k in before if k != "peak MiB"} == {k: before[k] for k in before if k != "peak MiB"}
    # Files of something else are not counted.
    (folder / "lstm-seed-0.json").write_text(json.dumps({**before, "core": "lstm"}))
    (folder / "mondeq-seed-1.json").write_text("{")
    (folder / "mondeq-seed-x.json").write_text("{}")
    assert replace(short, models=("mondeq",)).run(tmp_path, write=silent).splitlines()[:-1] == table.splitlines()[:-1]
    path.unlink()
    last = folder / "checkpoints" / "mondeq-seed-0" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:500])
    with pytest.raises(UsageError, match=r"last\.ckpt is damaged.*delete it to train mondeq-seed-0"):
        replace(short, models=("mondeq",)).run(tmp_path, write=silent)


def test_versions_of_every_sitting_and_result_are_said(tmp_path, monkeypatch) -> None:
    short = Images(parameters=2000, epochs=2, limit=100)
    monkeypatch.setattr("perron.__version__", "0.0.1")
    run_for_an_epoch(replace(short, models=("no-equilibrium",)), tmp_path, write=lambda line: None)
    monkeypatch.setattr("perron.__version__", "0.0.2")
    replace(short, models=("no-equilibrium",), seeds=2).run(tmp_path, write=lambda line: None)
    folder = next((tmp_path / "images").iterdir())
    found = [json.loads((folder / f"no-equilibrium-seed-{seed}.json").read_text()) for seed in (0, 1)]
    assert [r["versions"]["perron"] for r in found] == ["0.0.1, 0.0.2", "0.0.2"]
    page = (folder / "report.html").read_text()
    assert "perron 0.0.1, 0.0.2, " in page
    assert "; perron 0.0.2, " in page


def test_one_process_at_a_time(tmp_path, capsys) -> None:
    folder = tmp_path / QUICK.folder
    folder.mkdir(parents=True)
    with lock(folder / ".lock"):
        command = [
            "study",
            "images",
            "--parameters",
            "2000",
            "--epochs",
            "2",
            "--limit",
            "200",
            "--runs",
            str(tmp_path),
        ]
        assert main(command) == 2
    assert "is writing into" in capsys.readouterr().err
    assert [p.name for p in folder.iterdir()] == [".lock"]
