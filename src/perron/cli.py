"""The command line. Parses, calls, prints.

Every command is a typed function: its parameters are the options, its docstring is the help. What is heavy is imported
where it is used, so that help comes at once.
"""

from __future__ import annotations

import shlex
import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import perron
from perron._arguments import call, first_line
from perron._errors import UsageError
from perron.studies import STUDIES

if TYPE_CHECKING:
    from perron.studies.study import Study
    from perron.training.run import Loaded

__all__ = ["COMMANDS", "main"]

RUNS = Path("runs")
# Options that several commands have.
_COMMON = {
    "run": "preset (its latest run), run folder or checkpoint",
    "data_dir": "folder of the data files (default $PERRON_DATA)",
    "runs": "folder of all runs",
}
_FURTHER = "Further options go to Lightning: --trainer.X, --model.X, --data.init_args.X; --print_config lists them."


def fit(
    preset: str,
    *further: str,
    data_dir: str | None = None,
    runs: Path = RUNS,
    resume: bool = False,
    command: str = "perron fit",
) -> str:
    """Train a preset; writes checkpoints, history.csv and report.html.

    Args:
        preset: name of a preset, or a .yaml file.
        resume: continue the preset's latest run, exactly where it stopped; more --trainer.max_epochs extend it.
    """
    from perron.training import run

    return run.fit(run.preset(preset), runs, data_dir, list(further), resume=resume, command=command)


def validate(run: str, *further: str, data_dir: str | None = None, runs: Path = RUNS) -> str:
    """Evaluate a run on its validation split."""
    from perron.training.run import validate

    return validate(_load(run, further, data_dir, runs))


def test(run: str, *further: str, data_dir: str | None = None, runs: Path = RUNS) -> str:  # noqa: PT028
    """Evaluate a run on the test set, and put the result into its report."""
    from perron.training.run import test

    return test(_load(run, further, data_dir, runs))


def predict(run: str, *further: str, data_dir: str | None = None, runs: Path = RUNS) -> str:
    """Write the predicted class of every test image to predictions.csv."""
    from perron.training.run import predict

    return predict(_load(run, further, data_dir, runs))


def certify(
    run: str,
    *further: str,
    data_dir: str | None = None,
    runs: Path = RUNS,
    data: Literal["test", "validation"] = "test",
) -> str:
    """Print the certificate, and how many images keep their class over the whole enclosure.

    Args:
        data: which split.
    """
    from perron.training.run import certify_run

    return certify_run(_load(run, further, data_dir, runs), data)


def report(run: str, *further: str, data_dir: str | None = None, runs: Path = RUNS) -> str:
    """Write report.html again."""
    from perron.training.run import report

    return report(_load(run, further, data_dir, runs))


def study(what: Study[Any], *, runs: Path = RUNS, budget: float | None = None, ray: bool = False) -> str:
    """Measure several models beside each other; the same command goes on where it was stopped.

    Args:
        budget: stop after so many seconds.
        ray: spread the trials over processes or machines by Ray.
    """
    from perron.studies.distribute import Ray
    from perron.studies.study import Serial

    return what.run(runs, budget=budget, executor=Ray() if ray else Serial(), write=_say)


COMMANDS: dict[str, Callable[..., str]] = {
    "fit": fit,
    "validate": validate,
    "test": test,
    "predict": predict,
    "certify": certify,
    "report": report,
    "study": study,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. What the user can mend is said in one line, without a traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        _say(_answer(words))
    except (UsageError, ArgumentError, OSError) as error:
        return _fail(" ".join(str(error).split()))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "perron":
            raise
        return _fail(f"`perron {words[0]}` needs more packages: pip install perron[train] ({error})")
    except KeyboardInterrupt:
        goes_on = {"fit": "; a fit goes on with `perron fit ... --resume`", "study": "; the same command goes on here"}
        _fail(f"interrupted{goes_on.get(next(iter(words), ''), '')}")
        return 130
    return 0


def _answer(words: list[str]) -> str:
    name, *rest = words or ["--help"]
    if name in ("-h", "--help"):
        return _overview("perron COMMAND", (perron.__doc__ or "").strip(), COMMANDS)
    if name == "--version":
        return f"perron {perron.__version__}"
    if name == "study":
        return _study(rest)
    if name not in COMMANDS:
        raise UsageError(f"unknown command {name!r}; choose one of {', '.join(COMMANDS)}")
    prog, epilog, fixed = f"perron {name}", _FURTHER, {}
    if name == "fit":
        epilog, fixed = f"{_presets(rest)}{_FURTHER}", {"command": shlex.join(["perron", *words])}
    return call(COMMANDS[name], rest, prog=prog, help=_COMMON, epilog=epilog, fixed=fixed)


def _presets(words: Sequence[str]) -> str:
    """For those who ask for help; to list them takes as long as to train one begins."""
    if not {"-h", "--help"} & set(words):
        return ""
    from perron.training.run import presets

    return f"Presets: {', '.join(presets())}. "


def _study(words: list[str]) -> str:
    name, *rest = words or ["--help"]
    if name in ("-h", "--help"):
        return _overview("perron study NAME", first_line(study), {name: _class(name) for name in STUDIES})
    if name not in STUDIES:
        raise UsageError(f"unknown study {name!r}; choose one of {', '.join(STUDIES)}")
    return call(study, rest, prog=f"perron study {name}", help=_COMMON, record=_class(name))


def _class(name: str) -> type[Any]:
    module, _, inner = STUDIES[name].partition(":")
    found: type[Any] = getattr(import_module(module), inner)
    return found


def _overview(usage: str, about: str, documented: dict[str, Any]) -> str:
    lines = [f"  {name:<10}{first_line(what)}" for name, what in documented.items()]
    return "\n".join([f"usage: {usage} ...", "", about, "", *lines, "", f"`{usage} --help` says more."])


def _load(run: str, further: Sequence[str], data_dir: str | None, runs: Path) -> Loaded:
    from perron.training.run import load

    return load(run, runs, data_dir, list(further))


def _say(text: str) -> None:
    print(text, flush=True)


def _fail(text: str) -> int:
    print(f"perron: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
