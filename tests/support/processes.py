"""Processes that start immediately: forked from one that has done the imports, most of the time of a small run.

Each has an environment, an output and an exit status of its own, as one that torchrun or a user's shell starts. The
tests of the launchers themselves start real ones: see :mod:`tests.support.commands`.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any
from unittest import mock

from tests.support import REPOSITORY
from tests.support.ports import free_port

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "SLURM_")
GRACE_SECONDS = 60  # for the other ranks, once one has failed
LIMIT_SECONDS = 500

_forking = multiprocessing.get_context("forkserver")
_forking.set_forkserver_preload(["tests.support.worker"])


def run_ranks(
    function: Callable[..., None], *arguments: object, ranks: int = 1, **environment: str
) -> list[subprocess.CompletedProcess[str]]:
    """Call ``function(*arguments)`` in that many processes side by side, one thread each; return how every rank ended.

    If there are several, each is told its place by the environment variables that torchrun sets.
    """
    clean = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHERS)}
    clean |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    clean |= {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}  # the process that forks must not initialise CUDA
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        outputs = [Path(name) / str(rank) for rank in range(ranks)]
        processes: list[Any] = []
        try:
            for rank, output in enumerate(outputs):
                variables = clean | (_place(rank, ranks, port) if ranks > 1 else {}) | environment
                with mock.patch.dict(os.environ, clean, clear=True):  # for the process that forks, if it is not there
                    process = _forking.Process(target=_run, args=(variables, output, function, arguments))
                    process.start()
                processes.append(process)
            _wait(processes)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [
            subprocess.CompletedProcess(
                [function.__name__, *map(str, arguments)], process.exitcode,
                output.with_suffix(".out").read_text(), output.with_suffix(".err").read_text(),
            )
            for process, output in zip(processes, outputs, strict=True)
        ]  # fmt: skip


def _place(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The place of a process among all, in torchrun's variables."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{key: str(number) for key, number in numbers.items()}}


def _run(environment: dict[str, str], output: Path, function: Callable[..., None], arguments: tuple) -> None:
    """What a process does; standard output and standard error go to files."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(REPOSITORY)
    for descriptor, suffix in ((1, ".out"), (2, ".err")):
        with output.with_suffix(suffix).open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    function(*arguments)


def _wait(processes: list[Any]) -> None:
    """Wait until all have ended: not forever, and not for long once one has failed."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while running := [process for process in processes if process.exitcode is None]:
        if any(process.exitcode for process in processes):
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() >= deadline:
            return
        wait([process.sentinel for process in running], timeout=max(0.0, deadline - time.monotonic()))
