"""The runs of a comparison spread over processes and machines by Ray Tune: `perron compare mnist --ray`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from perron.studies.compare import Run
from perron.training.records import UsageError

__all__ = ["spread"]


def _trial(config: dict[str, Any]) -> None:
    """One run in a process of its own; its progress goes to the trial's log."""
    config["run"](lambda line: print(line, flush=True))


def spread(runs: Sequence[Run], write: Callable[[str], None]) -> None:
    """Train all runs, one a trial, as many at a time as there are processors (or GPUs, where there are any).

    Uses the cluster at $RAY_ADDRESS, or starts one on this machine. Every machine writes its results into the folder of
    the runs, which all of them must share; what is interrupted goes on at the next call, with Ray or without.

    Raises:
        UsageError: Ray is not installed, or a trial failed; the others are finished first.
    """
    # This process computes nothing itself, and Ray's questions about its environment have an answer.
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
        from ray import tune
    except ImportError as error:
        raise UsageError(f"--ray needs Ray Tune: pip install perron[tune] ({error})") from error
    started = not ray.is_initialized()
    if started:
        ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, logging_level=logging.WARNING)
    gpus = ray.cluster_resources().get("GPU", 0)
    write(f"{len(runs)} runs on {ray.cluster_resources().get('CPU', 0):.0f} processors and {gpus:.0f} GPUs")
    try:
        tuner = tune.Tuner(
            tune.with_resources(_trial, {"cpu": 1, "gpu": 1 if gpus else 0}),
            param_space={"run": tune.grid_search(list(runs))},
            tune_config=tune.TuneConfig(trial_dirname_creator=lambda trial: f"trial-{trial.trial_id}"),
            run_config=tune.RunConfig(
                name="ray", storage_path=str(runs[0].folder), verbose=0, callbacks=[_lines_of(write)]
            ),
        )
        failed = [str(e) for e in tuner.fit().errors]
    finally:
        if started:
            ray.shutdown()
    if failed:
        raise UsageError(f"{len(failed)} of {len(runs)} runs failed; the first: {failed[0].strip().splitlines()[-1]}")


def _lines_of(write: Callable[[str], None]) -> Any:
    """Says which runs have begun and ended."""
    from ray import tune

    class Lines(tune.Callback):
        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            write(f"{trial.config['run'].label}: begun")

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            run = trial.config["run"]
            write(
                f"{run.label}: " + ("done" if run.found is not None else "interrupted; the same command goes on here")
            )

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            write(f"{trial.config['run'].label}: failed, see {trial.error_file}")

    return Lines()
