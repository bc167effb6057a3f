"""The runs of a sweep, one after another in the processes that were started."""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Callable, Sequence

import torch

from monet_train.config.schema import TrainConfig
from monet_train.config.sweep import Job
from monet_train.errors import UserError, one_line
from monet_train.parallel.launch import Launch
from monet_train.training.checks import check_config

EXIT_CRASHED = 1  # Python's status after a traceback


def run_jobs(jobs: Sequence[Job], launch: Launch, run: Callable[[TrainConfig], None]) -> None:
    """Run every job, even after one that failed. A stop signal ends the sweep; the same command continues it.

    Raises:
        UserError: before the first job, if one has an invalid value; after the last, if one failed. The line of a
            failed job is printed when it ends.
        SystemExit: after the last, if a job crashed.
    """
    for job in jobs:
        try:
            check_config(job.config, launch)
        except UserError as error:
            raise UserError(f"-m: {job.values}: {error}") from None
    failed, crashed = [], False
    for number, job in enumerate(jobs, start=1):
        if launch.is_main:
            print(f"run {number} of {len(jobs)}: {job.values or 'as given'}, in {job.config.run.dir}", flush=True)
        try:
            run(job.config)
        except UserError as error:
            if error.alone and launch.world_size > 1:  # the other ranks know nothing of it
                raise
            failed.append(job)
            if launch.is_main:
                line = one_line(f"run {number} of {len(jobs)} ({job.values}): {error}")
                print(line, file=sys.stderr, flush=True)
        except OSError:  # a full disk or a closed output would fail the other jobs too
            raise
        except Exception:
            if launch.world_size > 1:
                raise
            failed.append(job)
            crashed = True
            traceback.print_exc()
        _free_memory()
    if failed:
        line = f"{len(failed)} of {len(jobs)} runs failed, see above: {'; '.join(job.values for job in failed)}"
        if crashed:
            print(one_line(line), file=sys.stderr, flush=True)
            raise SystemExit(EXIT_CRASHED)
        raise UserError(line)


def _free_memory() -> None:
    """Release what the last job held: an engine is part of cycles, which are collected late."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
