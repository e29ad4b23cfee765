import csv
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import yaml

import perron
from perron._files import lock
from perron.cells import Refusal
from perron.cli import main
from perron.training import run
from perron.training.run import presets

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
    for wrong, message in (
        ("--no_such_option=1", "unrecognized arguments: --no_such_option=1"),
        ("--trainer.max_epochs=many", "Given value: many"),
        ("--model.model.init_args.widht=8", "Option 'widht' is not accepted"),
        ("--data.init_args.limit=3", "limit must be at least 20, got 3"),
    ):
        assert main(["fit", "digits", *runs, wrong]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_a_second_fit_keeps_the_first(tmp_path) -> None:
    for _ in range(2):
        fit(tmp_path, "--trainer.max_epochs", "1")
    assert sorted(p.name for p in (tmp_path / "digits").iterdir()) == ["run-1", "run-2"]


def test_every_preset_parses() -> None:
    from perron.training.run import _instantiate

    for name, path in presets().items():
        cli = _instantiate(["--config", str(path)], {"logger": False, "enable_checkpointing": False})
        assert cli.trainer.max_epochs >= 10, name


def write_no_pictures(path, **_):
    """They take longer than all else."""
    path.write_text("a page")
    return path


@pytest.fixture
def no_pictures(monkeypatch) -> None:
    monkeypatch.setattr(run, "write_report", write_no_pictures)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs with one of a single epoch, tested; copy it to change it."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "write_report", write_no_pictures)
        assert fit(root, "--trainer.max_epochs", "1") == 0
        assert main(["test", "digits", "--runs", str(root)]) == 0
    return root


@pytest.fixture
def runs(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "runs")


def resume(runs, *more: str) -> int:
    return main(["fit", "digits", "--runs", str(runs), "--resume", *more])


def contents(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_a_run_cannot_change_is_refused_when_resuming(runs, capsys) -> None:
    before = contents(runs)
    changes = {
        "model.weight_decay": (0.05, 0.9),
        "model.model.init_args.width": (8, 9),
        "model.schedule": ("one_cycle", "cosine"),
        "data.init_args.seed": (0, 5),
        "data.init_args.batch_size": (32, 16),
        "seed_everything": (0, 3),
        "trainer.accumulate_grad_batches": (1, 2),
    }
    options = [f"--{option}={given}" for option, (_, given) in changes.items()]
    assert resume(runs, "--trainer.max_epochs", "2", *options) == 2
    message = capsys.readouterr().err
    for option, (stored, given) in changes.items():
        assert f"{option} is {stored!r} there, {given!r} was given" in message
    assert message.count("was given") == len(changes)
    assert resume(runs, "--trainer.max_epochs", "2", options[0]) == 2
    assert contents(runs) == before


def test_the_arguments_of_a_callback_that_keeps_a_state_stay(runs, capsys) -> None:
    before = contents(runs)
    stopping = '[{"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val_loss", "patience": 2}}]'
    assert resume(runs, "--trainer.max_epochs", "2", "--trainer.callbacks", stopping) == 2
    assert "'patience': 15" in capsys.readouterr().err
    assert contents(runs) == before


def test_more_epochs_go_on_and_what_was_known_before_is_not_taken_for_new(runs, capsys, monkeypatch) -> None:
    folder = runs / "digits" / "run-1"
    assert resume(runs, "--trainer.max_epochs", "3") == 0
    out = capsys.readouterr().out
    assert "epoch 2/3" in out
    assert "epoch 1/3" not in out
    rows = list(csv.DictReader((folder / "history.csv").open()))
    assert [float(r["epoch"]) for r in rows] == [0, 1, 2]
    assert all(float(r["train_loss_epoch"]) > 0 for r in rows)
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["max_epochs"] == 3
    page = (folder / "report.html").read_text()
    # Both sittings, and the seconds of both.
    assert "from epoch 1, " in page
    assert "from epoch 2, " in page
    assert "training and validation, 3 epochs" in page
    # The test result was of the weights after the first epoch.
    assert "left out: the test evaluation of best.ckpt, epoch 1" in out
    assert "of the validation split, with the weights of epoch 3" in page
    monkeypatch.setattr(run, "write_report", write_no_pictures)
    assert main(["test", "digits", "--runs", str(runs)]) == 0
    tested = json.loads((folder / "evaluation-test.json").read_text())
    assert (tested["times_evaluated"], tested["epochs"], tested["checkpoint"]) == (2, 3, "best.ckpt")
    # Finished.
    capsys.readouterr()
    config = (folder / "config.yaml").read_bytes()
    for options in ([], ["--trainer.max_epochs", "2"]):
        assert resume(runs, *options) == 0
        assert "is finished already: 3 epochs of" in capsys.readouterr().out
    assert (folder / "config.yaml").read_bytes() == config


def test_a_run_that_stopped_early_is_finished(tmp_path, capsys, no_pictures) -> None:
    stopping = (
        '[{"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": '
        '{"monitor": "val_loss", "patience": 1, "min_delta": 100.0}}]'
    )
    fit(tmp_path, "--trainer.max_epochs", "9", "--trainer.callbacks", stopping)
    capsys.readouterr()
    assert resume(tmp_path, "--trainer.max_epochs", "20") == 0
    out = capsys.readouterr().out
    assert "finished already: stopped early after 2 epochs" in out
    assert "epoch 3" not in out


def test_resuming_what_is_damaged_or_missing_says_so(runs, capsys, no_pictures) -> None:
    folder = runs / "digits" / "run-1"
    more = ["--trainer.max_epochs", "2"]
    for text in ("", "model: {", "trainer: {max_epochs: 3}"):
        (folder / "config.yaml").write_text(text)
        assert resume(runs, *more) == 2
        assert "config.yaml is damaged; delete it" in capsys.readouterr().err
    (folder / "config.yaml").unlink()
    assert resume(runs, *more) == 0
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"]["weight_decay"] == 0.05
    last = folder / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:2000])
    assert resume(runs, "--trainer.max_epochs", "3") == 2
    assert "last.ckpt is damaged" in (message := capsys.readouterr().err)
    assert "copy best.ckpt over it" in message
    shutil.copy(folder / "checkpoints" / "best.ckpt", last)
    assert resume(runs, "--trainer.max_epochs", "3") == 0
    last.unlink()
    assert resume(runs) == 2
    assert "run-1 has no checkpoint" in capsys.readouterr().err


def test_a_moved_run_remembers_its_best(runs, no_pictures) -> None:
    best = runs / "digits" / "run-1" / "checkpoints" / "best.ckpt"
    last = best.with_name("last.ckpt")
    state = torch.load(last, weights_only=False)
    (key,) = (k for k in state["callbacks"] if "val_loss" in k and k.startswith("BestCheckpoint"))
    (path,) = state["callbacks"][key]["best_k_models"]
    state["callbacks"][key]["best_k_models"][path] = state["callbacks"][key]["kth_value"] = torch.tensor(0.0)
    torch.save(state, last)
    before = best.read_bytes()
    assert resume(runs, "--trainer.max_epochs", "2") == 0
    assert best.read_bytes() == before


def test_another_file_than_the_run_was_started_from_is_refused(tmp_path, capsys, no_pictures) -> None:
    config = tmp_path / "small.yaml"
    text = presets()["digits"].read_text().replace("width: 80", "width: 8").replace("max_epochs: 40", "max_epochs: 1")
    config.write_text(text)
    command = ["fit", str(config), "--runs", str(tmp_path), "--data.init_args.limit", "100"]
    assert main(command) == 0
    config.write_text("# The same.\n" + text)
    assert main([*command, "--resume", "--trainer.max_epochs", "2"]) == 0
    config.write_text(text.replace("weight_decay: 0.05", "weight_decay: 0.9"))
    assert main([*command, "--resume", "--trainer.max_epochs", "3"]) == 2
    assert "is not what" in capsys.readouterr().err


def train_one(root: str, decay: str, start) -> None:
    torch.set_num_threads(1)
    start.wait()
    sys.exit(fit(root, "--trainer.max_epochs", "1", "--model.weight_decay", decay))


def test_two_runs_started_together_have_their_own_folders(tmp_path, no_pictures) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Barrier(2)
    pair = [context.Process(target=train_one, args=(str(tmp_path), decay, start)) for decay in ("0.1", "0.2")]
    for process in pair:
        process.start()
    for process in pair:
        process.join(120)
    assert [process.exitcode for process in pair] == [0, 0]
    decays = set()
    for folder in (tmp_path / "digits" / f"run-{n}" for n in (1, 2)):
        kept = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=False)["callbacks"]["Provenance"]["config"]
        assert kept == (folder / "config.yaml").read_text()
        decays.add(yaml.safe_load(kept)["model"]["weight_decay"])
        assert (folder / "report.html").is_file()
    assert decays == {0.1, 0.2}


def test_a_run_is_resumed_by_one_process_at_a_time(runs, capsys) -> None:
    before = contents(runs)
    with lock(runs / "digits" / "run-1" / ".lock"):
        assert resume(runs, "--trainer.max_epochs", "2") == 2
    assert f"process {os.getpid()} " in capsys.readouterr().err
    assert contents(runs) == before


def test_a_start_that_fails_leaves_no_run(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("PERRON_DATA", raising=False)
    assert main(["fit", "mnist-linear", "--runs", str(tmp_path)]) == 2
    assert fit(tmp_path, "--no_such_option", "1") == 2
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_run_is_evaluated_as_it_was_trained(runs, capsys) -> None:
    before = contents(runs)
    # Another seed is another split: images that were trained on.
    for option, given in (("data.init_args.seed", "5"), ("data.init_args.limit", "null"), ("model.weight_decay", "1")):
        assert main(["validate", "digits", "--runs", str(runs), f"--{option}", given]) == 2
        assert f"{option} is" in capsys.readouterr().err
    assert contents(runs) == before
    assert main(["validate", "digits", "--runs", str(runs), "--data.init_args.batch_size", "50"]) == 0


def test_an_evaluation_keeps_nothing_of_an_earlier_one_but_their_number(runs, capsys, no_pictures) -> None:
    """Nothing of an earlier evaluation is left in a later one but the number of them."""
    path = runs / "digits" / "run-1" / "evaluation-test.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "stale": 1, "seconds": 3.0}))
    assert main(["test", "digits", "--runs", str(runs)]) == 0
    best = json.loads(path.read_text())
    assert not {"stale", "seconds"} & best.keys()
    assert best["times_evaluated"] == 2
    for text in ("", '{"accuracy": 0.9'):
        path.write_text(text)
        assert main(["test", "digits", "--runs", str(runs)]) == 2
        assert "evaluation-test.json is damaged" in capsys.readouterr().err
        assert path.read_text() == text


def test_predictions_and_certificates_are_written_whole_or_not_at_all(runs, monkeypatch, capsys) -> None:
    folder = runs / "digits" / "run-1"
    assert main(["predict", "digits", "--runs", str(runs)]) == 0
    assert main(["certify", "digits", "--runs", str(runs)]) == 0
    before = contents(folder)
    calls = []

    def second_fails(found):
        def call(*arguments):
            calls.append(arguments)
            if len(calls) > 1:
                raise Refusal("no proof of the second batch")
            return found(*arguments)

        return call

    monkeypatch.setattr(run, "certify_classes", second_fails(run.certify_classes))
    capsys.readouterr()
    assert main(["certify", "digits", "--runs", str(runs)]) == 0
    assert "no proof of the second batch" in capsys.readouterr().out
    calls.clear()
    monkeypatch.setattr(run.Classifier, "forward", second_fails(run.Classifier.forward))
    with pytest.raises(Refusal):
        main(["predict", "digits", "--runs", str(runs)])
    assert contents(folder) == before


def test_a_copied_checkpoint_is_evaluated_where_it_lies(runs, tmp_path) -> None:
    (tmp_path / "elsewhere").mkdir()
    copy = shutil.copy(runs / "digits" / "run-1" / "checkpoints" / "best.ckpt", tmp_path / "elsewhere" / "mine.ckpt")
    assert main(["validate", str(copy)]) == 0
    assert (tmp_path / "elsewhere" / "evaluation-validation.json").is_file()
    assert not (tmp_path / "evaluation-validation.json").exists()


def of_version(runs, version: str, change) -> None:
    """Make a run one that this version of perron wrote, and change its checkpoints."""
    for path in (runs / "digits" / "run-1" / "checkpoints").iterdir():
        state = torch.load(path, weights_only=False)
        state["callbacks"]["Provenance"]["sittings"][-1]["versions"]["perron"] = version
        change(state)
        torch.save(state, path)


def renamed_class(state) -> None:
    record = state["callbacks"]["Provenance"]
    for text in ("config", "source"):
        record[text] = record[text].replace("PositiveConcaveLinearNet", "RivalNet")


def renamed_weight(state) -> None:
    state["state_dict"]["model.3.core.weight"] = state["state_dict"].pop(
        "model.3.cell.0.parametrizations.weight.original"
    )


class Moved:
    """A class whose file was moved."""


def moved_class(state) -> None:
    state["callbacks"]["Other"] = Moved()


@pytest.mark.parametrize(
    ("change", "reason"), [(renamed_class, "RivalNet"), (renamed_weight, r"model\.3\.core"), (moved_class, "kernels")]
)
def test_what_another_version_wrote_and_this_one_cannot_read_says_so_in_one_line(
    runs, capsys, monkeypatch, change, reason
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Moved, "__module__", "perron.kernels")
        patch.setitem(sys.modules, "perron.kernels", SimpleNamespace(Moved=Moved))
        of_version(runs, "0.1.0", change)
    before = contents(runs)
    writer = "another version of perron" if change is moved_class else r"perron 0\.1\.0"
    remedy = "install the version that wrote it" if change is moved_class else r"install perron 0\.1\.0"
    for command in ("validate", "test", "predict", "certify", "report"):
        assert main([command, "digits", "--runs", str(runs)]) == 2
        message = capsys.readouterr().err
        expected = rf"perron: .*best\.ckpt was written by {writer}, and perron {perron.__version__} cannot read it \(.*{reason}"
        assert re.match(expected, message)
        assert re.search(remedy, message)
        assert message.count("\n") == 1
    assert resume(runs, "--trainer.max_epochs", "2") == 2
    message = capsys.readouterr().err
    assert re.match(
        rf"perron: .*last\.ckpt was written by {writer}.*{remedy} to go on with it, or train again\n$", message
    )
    assert contents(runs) == before


def test_what_another_version_wrote_and_this_one_reads_is_read(runs, capsys, no_pictures) -> None:
    of_version(runs, "0.1.0", lambda state: None)
    assert main(["certify", "digits", "--runs", str(runs)]) == 0
    assert "constant over the whole enclosure" in capsys.readouterr().out
    assert resume(runs, "--trainer.max_epochs", "2") == 0
    assert main(["certify", "digits", "--runs", str(runs), "--data.init_args.foo", "3"]) == 2
    message = capsys.readouterr().err
    assert "foo" in message
    assert "written by" not in message


def test_what_this_version_wrote_and_does_not_fit_is_not_blamed_on_another(runs, capsys) -> None:
    of_version(runs, perron.__version__, renamed_weight)
    assert main(["certify", "digits", "--runs", str(runs)]) == 2
    message = capsys.readouterr().err
    assert "does not fit this version" in message
    assert "written by" not in message
