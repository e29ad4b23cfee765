import csv
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from perron.cli import main, presets

FAST = ["--model.model.init_args.width", "8", "--data.init_args.limit", "200"]


def fit(runs, *more: str) -> int:
    return main(["fit", "digits", "--runs", str(runs), *FAST, *more])


def endless(runs) -> subprocess.Popen[str]:
    """A fit in a process of its own, far from its end."""
    options = ["--runs", str(runs), *FAST, "--trainer.max_epochs", "10000", "--trainer.callbacks", "[]"]
    command = [sys.executable, "-m", "perron", "fit", "digits", *options]

    def listen() -> None:
        # Background jobs of a shell inherit an ignored SIGINT, and Python then leaves it ignored.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen)


def weights(path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=False)["state_dict"]


def test_fit_test_predict_certify_report(tmp_path, capsys) -> None:
    assert fit(tmp_path, "--trainer.max_epochs", "2") == 0
    folder = tmp_path / "digits" / "run-1"
    out = capsys.readouterr().out
    assert "epoch 2/2: loss" in out
    assert "fwd" in out
    assert "bwd" in out
    rows = list(csv.DictReader((folder / "history.csv").open()))
    assert [float(r["epoch"]) for r in rows] == [0, 1]
    assert float(rows[1]["train_backward_steps_epoch"]) > 0
    assert (folder / "checkpoints" / "best.ckpt").is_file()
    page = (folder / "report.html").read_text()
    for word in (
        "Learning curves",
        "Solver steps",
        "Certified error",
        "Effective depth",
        "Confusion matrix",
        "Spectral radius",
    ):
        assert word in page.replace("<!-- ", "")
    assert "<script" not in page
    assert "seed_everything: 0" in page
    assert "perron fit digits" in page
    assert "Figures below are of the validation split" in page
    for command in ("validate", "test", "test", "predict", "certify", "report"):
        assert main([command, "digits", "--runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "enclosures proven 360/360" in out
    assert "evaluation 2 of this run on the test set" in out
    assert "of 360 images" in out
    assert len((folder / "predictions.csv").read_text().splitlines()) == 361
    assert len((folder / "certified-test.csv").read_text().splitlines()) == 361
    assert "test split" in (folder / "report.html").read_text()
    assert main(["certify", str(folder / "checkpoints" / "last.ckpt"), "--data", "validation"]) == 0
    assert main(["test", str(folder)]) == 0


@pytest.mark.parametrize("options", [[], ["--model.penalty", "jacobian"]])
def test_resume_is_bit_for_bit(tmp_path, options) -> None:
    """Also where training draws random numbers."""
    fit(tmp_path / "whole", "--trainer.max_epochs", "4", *options)
    # A run that stops after two of its four epochs, with the learning rate schedule of four.
    fit(
        tmp_path / "parts",
        "--trainer.max_epochs",
        "4",
        "--trainer.callbacks+",
        "perron.training.callbacks.StopAfter",
        "--trainer.callbacks.epochs",
        "2",
        *options,
    )
    half = torch.load(tmp_path / "parts" / "digits" / "run-1" / "checkpoints" / "last.ckpt", weights_only=False)
    assert half["epoch"] == 1
    assert main(["fit", "digits", "--runs", str(tmp_path / "parts"), "--resume", "--trainer.callbacks", "[]"]) == 0
    ends = [tmp_path / part / "digits" / "run-1" / "checkpoints" / "last.ckpt" for part in ("whole", "parts")]
    a, b = (weights(p) for p in ends)
    assert all(torch.equal(a[k], b[k]) for k in a)
    rows = [list(csv.DictReader((p.parent.parent / "history.csv").open())) for p in ends]
    assert [r["val_loss"] for r in rows[0]] == [r["val_loss"] for r in rows[1]]


def test_a_killed_run_loses_at_most_its_epoch(tmp_path) -> None:
    process = endless(tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 3/"):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    state = torch.load(tmp_path / "digits" / "run-1" / "checkpoints" / "last.ckpt", weights_only=False)
    assert state["epoch"] >= 1
    assert main(["report", "digits", "--runs", str(tmp_path)]) == 0


def test_interrupt(tmp_path) -> None:
    process = endless(tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            break
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "--resume" in errors
    assert "Traceback" not in errors
    assert (tmp_path / "digits" / "run-1" / "checkpoints" / "last.ckpt").is_file()


def test_messages_instead_of_tracebacks(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.delenv("PERRON_DATA", raising=False)
    runs = ["--runs", str(tmp_path)]
    assert main(["fit", "nothing", *runs]) == 2
    assert "digits" in capsys.readouterr().err
    assert main(["fit", "mnist-linear", *runs]) == 2
    assert "--data-dir" in capsys.readouterr().err
    assert main(["fit", "digits", "--resume", *runs]) == 2
    assert "nothing to resume" in capsys.readouterr().err
    assert main(["test", "digits", *runs]) == 2
    assert "no checkpoint" in capsys.readouterr().err
    damaged = tmp_path / "x.ckpt"
    damaged.write_bytes(b"PK\x03\x04 half a file")
    assert main(["certify", str(damaged), *runs]) == 2
    assert "damaged" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["fit", "digits", *runs, "--no_such_option", "1"])


def test_a_second_fit_keeps_the_first(tmp_path) -> None:
    for _ in range(2):
        fit(tmp_path, "--trainer.max_epochs", "1")
    assert sorted(p.name for p in (tmp_path / "digits").iterdir()) == ["run-1", "run-2"]


def test_every_preset_parses() -> None:
    from perron.training.run import _instantiate

    for name, path in presets().items():
        cli = _instantiate(["--config", str(path)], {"logger": False, "enable_checkpointing": False})
        assert cli.trainer.max_epochs >= 10, name
