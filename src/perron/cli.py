"""The command line: `perron fit digits`, then `test`, `certify`, `report`. Parses, calls, prints.

Presets are YAML files; every option of the trainer, the model and the data can be overridden, for instance

    perron fit mnist-linear --data-dir DIR --trainer.max_epochs 3 --model.model.init_args.width 40
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

__all__ = ["main"]

COMMANDS = {
    "fit": "train a preset; writes checkpoints, history.csv and report.html",
    "validate": "evaluate a run on its validation split",
    "test": "evaluate a run on the test set, and put the result into its report",
    "predict": "write the predicted class of every test image to predictions.csv",
    "certify": "print the certificate, and how many test images keep their class over the whole enclosure",
    "report": "write report.html again",
}


def presets() -> dict[str, Path]:
    folder = Path(str(resources.files("perron"))) / "training" / "presets"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="perron", description="Equilibrium networks whose fixed points come with a proof."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help_text in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=help_text,
            description=help_text,
            epilog="Further options go to Lightning: --trainer.X, --model.X, --data.init_args.X; --print_config lists them.",
        )
        what = "preset" if name == "fit" else "preset (its latest run), run folder or checkpoint"
        graphs = (
            "; graphs: cora, citeseer, cora-author-, cora-cocitation-, citeseer-hypergraph" if name == "fit" else ""
        )
        sub.add_argument("target", help=f"{what}; presets: {', '.join(presets())}{graphs}")
        sub.add_argument("--data-dir", help="folder of the data files (default $PERRON_DATA)")
        sub.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (default runs)")
        if name == "fit":
            sub.add_argument(
                "--resume",
                action="store_true",
                help="continue the preset's latest run, exactly where it stopped; more --trainer.max_epochs extend it",
            )
        if name == "certify":
            sub.add_argument(
                "--data", default="test", choices=["test", "validation"], help="which split (default test)"
            )
    _add_compare(commands)
    _add_kernels(commands)
    return parser


def _add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "train implicit models and their baselines at equal numbers of parameters; writes a table and a page"
    sub = commands.add_parser("compare", help=text, description=text)
    sub.add_argument(
        "target", nargs="?", default="digits", help="data: digits (default), mnist, fashion-mnist, cifar10, svhn"
    )
    sub.add_argument("--network", default="linear", help="linear (default) or conv")
    sub.add_argument("--models", help="names, separated by commas (default all): see perron.models.CORES")
    sub.add_argument("--seeds", type=int, default=1, help="how many (default 1)")
    sub.add_argument("--epochs", type=int, default=5, help="of training (default 5)")
    sub.add_argument("--parameters", type=int, default=77_000, help="of every network (default 77000)")
    sub.add_argument("--prove-training", action="store_true", help="prove enclosures in training steps too")
    sub.add_argument("--penalty", help="jacobian, residual_ratio or picard_steps: see perron.nn.penalties")
    sub.add_argument("--penalty-weight", type=float, default=0.1, help="of that penalty (default %(default)s)")
    sub.add_argument("--limit", type=int, help="use only so many training images")
    sub.add_argument("--ray", action="store_true", help="spread the runs over processes or machines by Ray Tune")
    sub.add_argument("--budget", type=float, help="stop after so many seconds; the same command then goes on")
    sub.add_argument("--data-dir", help="folder of the data files (default $PERRON_DATA)")
    sub.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (default runs)")


def _add_kernels(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "infinitely wide networks: an equilibrium beside its explicit equivalent, or what deep networks become"
    topics = commands.add_parser("kernels", help=text, description=text).add_subparsers(dest="topic", required=True)
    text = "compare an equilibrium network with its explicit equivalent: kernels, read-outs, times; writes a page"
    sub = topics.add_parser("compare", help=text, description=text)
    sub.add_argument("--activation", default="tanh", help="of the equilibrium: tanh (default), relu, swish, ...")
    sub.add_argument("--sa", type=float, default=0.3, help="variance of its recurrent weights (default %(default)s)")
    sub.add_argument("--widths", type=_whole, default="32,128,512,2048", help="with commas (default %(default)s)")
    sub.add_argument("--seeds", type=int, default=3, help="how many (default %(default)s)")
    sub.add_argument("--images", type=int, default=8000, help="training images, at most (default %(default)s)")
    sub.add_argument("--kernel-images", type=int, default=1000, help="for the kernels (default %(default)s)")
    text = "explicit networks at several depths, and which classifier each is in the limit; writes a page"
    deep = topics.add_parser("depth", help=text, description=text)
    deep.add_argument("--depths", type=_whole, default="1,4,16,64,256", help="with commas (default %(default)s)")
    deep.add_argument("--images", type=int, default=2000, help="at most (default %(default)s)")
    for topic in (sub, deep):
        topic.add_argument("--data", default="digits", help="digits (default), mnist, fashion-mnist, cifar10, svhn")
        topic.add_argument("--data-dir", help="folder of the data files (default $PERRON_DATA)")
        topic.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (default runs)")


def _whole(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"whole numbers separated by commas are needed, got {text!r}") from error


def _say(line: str) -> None:
    print(line, flush=True)


def _kernels(arguments: argparse.Namespace) -> str:
    given = vars(arguments)
    if arguments.topic == "depth":
        from perron.studies.depth import Depth

        options = {k: given[k] for k in ("data", "images", "data_dir")}
        return Depth(depths=tuple(arguments.depths), **options).run(arguments.runs, write=_say)
    from perron.studies.kernels import Kernels

    options = {k: given[k] for k in ("data", "activation", "sa", "seeds", "images", "kernel_images", "data_dir")}
    return Kernels(widths=tuple(arguments.widths), **options).run(arguments.runs, write=_say)


def _fit_graph(arguments: argparse.Namespace, rest: Sequence[str]) -> str:
    from perron.studies.graphs import PROPAGATIONS, Graphs

    parser = argparse.ArgumentParser(prog=f"perron fit {arguments.target}")
    parser.add_argument("--splits", type=int, default=5, help="random splits (default 5)")
    parser.add_argument("--models", default=",".join(PROPAGATIONS), help="names, separated by commas (default all)")
    parser.add_argument("--epochs", type=int, default=Graphs.epochs, help="at most (default %(default)s)")
    options = parser.parse_args(rest)
    study = Graphs(
        data=arguments.target,
        models=tuple(options.models.split(",")),
        splits=options.splits,
        epochs=options.epochs,
        data_dir=arguments.data_dir,
    )
    return study.run(arguments.runs, write=_say)


def _compare(arguments: argparse.Namespace) -> str:
    from perron.studies.distribute import Ray
    from perron.studies.images import Images

    names = ("network", "seeds", "epochs", "parameters", "prove_training", "penalty", "penalty_weight", "limit")
    study = Images(
        data=arguments.target,
        models=tuple(arguments.models.split(",")) if arguments.models else (),
        data_dir=arguments.data_dir,
        **{name: vars(arguments)[name] for name in names},
    )
    executor = Ray() if arguments.ray else None
    return study.run(arguments.runs, budget=arguments.budget, executor=executor, write=_say)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. Expected errors are printed in one line, without a traceback."""
    arguments, rest = _parser().parse_known_args(argv)
    try:
        from perron._errors import UsageError
        from perron.data.graphs import GRAPHS
        from perron.training import run
    except ImportError as error:
        print(f"perron: the command line needs more packages: pip install perron[train] ({error})", file=sys.stderr)
        return 2
    command = "perron " + shlex.join(sys.argv[1:] if argv is None else argv)
    try:
        if arguments.command in ("compare", "kernels"):
            if rest:
                raise UsageError(f"unknown options: {' '.join(rest)}")
            print((_compare if arguments.command == "compare" else _kernels)(arguments))
        elif arguments.command == "fit" and arguments.target in GRAPHS:
            print(_fit_graph(arguments, rest))
        elif arguments.command == "fit":
            config = presets().get(arguments.target)
            if config is None and Path(arguments.target).suffix in (".yaml", ".yml"):
                config = Path(arguments.target)
            if config is None or not config.is_file():
                raise UsageError(
                    f"no preset {arguments.target!r}; choose one of {', '.join(presets())}, or a .yaml file"
                )
            run.fit(config, arguments.runs, arguments.data_dir, rest, resume=arguments.resume, command=command)
        else:
            loaded = run.load(arguments.target, arguments.runs, arguments.data_dir, rest)
            if arguments.command == "certify":
                print(run.certify_run(loaded, arguments.data))
            else:
                print(getattr(run, arguments.command)(loaded))
    except UsageError as error:
        print(f"perron: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        study = arguments.command in ("compare", "kernels") or arguments.target in GRAPHS
        how = "the same command goes on" if study else "a fit goes on with `perron fit ... --resume`"
        print(f"perron: interrupted; {how}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
