"""What the command line answers by itself; what commands do stands beside their tests."""

import subprocess
import sys

import pytest
import yaml

import perron
from perron import cli
from perron._arguments import call
from perron._errors import UsageError
from perron.cli import COMMANDS, main
from perron.studies import STUDIES
from perron.training.run import presets

HEAVY = ("torch", "numpy", "lightning", "jsonargparse", "docstring_parser", "matplotlib", "yaml")
EXTRA = [name for name in HEAVY if name not in ("torch", "numpy")]


def without(modules, *words: str) -> subprocess.CompletedProcess[str]:
    """The command line where these packages are not installed."""
    code = f"import sys; sys.modules.update(dict.fromkeys({list(modules)!r})); from perron.cli import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)


def test_help_and_version_need_the_standard_library_only() -> None:
    texts = []
    for words in ([], ["--help"], ["-h"]):
        done = without(HEAVY, *words)
        assert (done.returncode, done.stderr) == (0, "")
        texts.append(done.stdout)
    assert len(set(texts)) == 1
    assert all(f"\n  {name} " in texts[0] for name in COMMANDS)
    done = without(HEAVY, "--version")
    assert (done.returncode, done.stdout) == (0, f"perron {perron.__version__}\n")


@pytest.mark.parametrize("words", [["fit", "digits"], ["certify", "--help"], ["study", "--help"], ["study", "depth"]])
def test_without_the_extra_a_command_says_what_to_install(words: list[str]) -> None:
    done = without(EXTRA, *words)
    assert done.returncode == 2
    assert "pip install perron[train]" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_package_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "perron", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"perron {perron.__version__}\n")


def helped(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    assert not stop.value.code
    return " ".join(capsys.readouterr().out.split())


def test_every_command_has_help(capsys) -> None:
    for name in COMMANDS:
        if name != "study":
            text = helped(capsys, name)
            assert "--data-dir DATA_DIR folder of the data files" in text
            assert "Further options go to Lightning" in text
    # The hyphens of words that are cut at the end of a line.
    listed = helped(capsys, "fit").replace("- ", "-")
    assert all(name in listed for name in presets())
    for words in (["study"], ["study", "-h"], ["study", "--help"]):
        assert main(words) == 0
        text = capsys.readouterr().out
        assert all(f"\n  {name} " in text for name in STUDIES)


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_has_help_for_every_setting(name: str, capsys) -> None:
    text = helped(capsys, "study", name)
    for option in (
        "--data DATA",
        "--data-dir",
        "--runs RUNS folder of all runs",
        "--budget BUDGET stop after",
        "--ray",
    ):
        assert option in text
    study = cli._class(name)
    assert study().check() is None
    assert all(f"--{field.replace('_', '-')}" in text for field in study.__dataclass_fields__)


def test_what_does_not_exist_is_said_in_a_line(tmp_path, capsys) -> None:
    for words, message in (
        (["compare"], "unknown command 'compare'; choose one of fit, validate"),
        (["study", "rivals"], "unknown study 'rivals'; choose one of images, graphs, kernels, depth"),
        (["fit"], "arguments are required: preset"),
        (["fit", "cora"], "`perron study graphs --data cora`"),
        (["fit", "nothing"], "no preset 'nothing'; choose one of cifar10"),
        (["fit", str(tmp_path)], "or a .yaml file"),
        (["certify", "digits", "--data", "train"], "Expected a typing.Literal['test', 'validation']. Got value: train"),
        (["study", "images", "--seeds", "many"], "seeds"),
        (["study", "images", "--penalty", "weight"], "'jacobian'"),
        (["study", "images", "--model", "deq"], "unrecognized arguments: --model"),
        (["study", "depth", "--depths", "1,a"], "whole numbers separated by commas are needed, got '1,a'"),
    ):
        assert main(words) == 2, words
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1
        assert captured.err.startswith("perron: ")
        assert captured.out == ""


def test_a_folder_that_cannot_be_made_is_named(tmp_path, capsys) -> None:
    (tmp_path / "runs").touch()
    assert main(["study", "depth", "--runs", str(tmp_path / "runs")]) == 2
    assert str(tmp_path / "runs") in (error := capsys.readouterr().err)
    assert error.count("\n") == 1


def test_the_configuration_is_printed_with_what_was_overridden(tmp_path, capsys) -> None:
    words = ["--runs", str(tmp_path), "--trainer.max_epochs", "3", "--model.model.init_args.width", "40"]
    with pytest.raises(SystemExit) as stop:
        main(["fit", "mnist-linear", *words, "--print_config"])
    assert not stop.value.code
    found = yaml.safe_load(capsys.readouterr().out)
    assert found["trainer"]["max_epochs"] == 3
    assert found["model"]["model"]["init_args"]["width"] == 40


def test_options_of_a_command_stand_among_those_of_lightning(capsys) -> None:
    def fit(
        preset: str, *further: str, data_dir: str | None = None, resume: bool = False, widths: tuple[int, ...] = ()
    ) -> str:
        """Train.

        Args:
            preset: which.
            data_dir: where.
            resume: go on.
            widths: of networks.
        """
        return repr((preset, further, data_dir, resume, widths))

    words = [
        "p",
        "--trainer.a",
        "3",
        "-1",
        "--data-dir=d",
        "--model.b+",
        "x",
        "--resume",
        "--print_config",
        "--widths",
        "3,4",
    ]
    further = ("--trainer.a", "3", "-1", "--model.b+", "x", "--print_config")
    assert call(fit, words, prog="x", help={}) == repr(("p", further, "d", True, (3, 4)))
    assert call(fit, ["p"], prog="x", help={}) == repr(("p", (), None, False, ()))
    with pytest.raises(SystemExit):
        call(fit, ["p", "--trainer.a", "3", "-h"], prog="x", help={})
    assert "of networks" in capsys.readouterr().out


def test_an_interruption_says_how_it_goes_on(monkeypatch, capsys) -> None:
    def stop(*_, **__) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "call", stop)
    for words, message in (
        (["fit", "digits"], "--resume"),
        (["study", "depth"], "the same command"),
        (["test", "x"], "ted\n"),
    ):
        assert main(words) == 130
        assert message in capsys.readouterr().err


def test_an_error_of_our_own_is_no_message(monkeypatch) -> None:
    def fail(error: Exception):
        def call(*_, **__) -> str:
            raise error

        return call

    for error in (
        ValueError("x"),
        ModuleNotFoundError("no perron.x", name="perron.x"),
        ModuleNotFoundError("no name"),
        ImportError("cannot import name"),
    ):
        monkeypatch.setattr(cli, "call", fail(error))
        with pytest.raises(type(error)):
            main(["test", "digits"])
    monkeypatch.setattr(cli, "call", fail(UsageError("two\nlines")))
    assert main(["test", "digits"]) == 2
