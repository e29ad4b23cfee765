"""The trials of a study spread over processes and machines by Ray."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence

from perron._errors import UsageError
from perron.studies.study import Job

__all__ = ["Ray"]


class Ray:
    """As many jobs at a time as there are processors, or GPUs where there are any.

    Uses the cluster at $RAY_ADDRESS, or starts one on this machine. Every machine writes its results into the folder of
    the study, which all of them must share; what is interrupted goes on at the next call, with Ray or without. The
    progress of a job goes to its worker's log.
    """

    def run(self, jobs: Sequence[Job], write: Callable[[str], None]) -> Iterator[Job]:
        """Call every job, and yield it when it is over.

        Raises:
            UsageError: Ray is not installed.
        """
        if not jobs:
            return
        # This process computes nothing itself, and Ray's question about its environment has an answer.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            import ray
        except ImportError as error:
            raise UsageError(f"--ray needs Ray: pip install perron[tune] ({error})") from error
        started = not ray.is_initialized()
        if started:
            address = os.environ.get("RAY_ADDRESS")
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        tasks: dict[ray.ObjectRef, Job] = {}
        try:
            gpus = ray.cluster_resources().get("GPU", 0)
            processors = ray.cluster_resources().get("CPU", 0)
            write(f"{len(jobs)} trials on {processors:.0f} processors and {gpus:.0f} GPUs")
            remote = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0, max_retries=0)(_call)
            tasks = {remote.remote(job): job for job in jobs}
            while tasks:
                (over,), _ = ray.wait(list(tasks), num_returns=1)
                job = tasks.pop(over)
                try:
                    ray.get(over)
                except ray.exceptions.RayError as error:
                    job.fail(f"{' '.join(str(error).split())}\n")
                yield job
        finally:
            for task in tasks:
                ray.cancel(task, force=True)
            if started:
                ray.shutdown()


def _call(job: Job) -> None:
    """In a process of its own."""
    job(lambda line: print(line, flush=True))
