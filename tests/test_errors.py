"""What a command does if its output is closed or full."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import pytest

from tests.support import REPOSITORY

COMMANDS = [
    pytest.param("monet_train.train --help", "", marks=pytest.mark.slow),
    pytest.param("monet_train.train --cfg job", "1", marks=pytest.mark.slow),  # Python writes at once
    pytest.param("monet_train.train --info", "", marks=pytest.mark.slow),
    ("data_prep --help", ""),
    ("data_prep --help", "1"),
    pytest.param("monet_train.interop.export --help", "", marks=pytest.mark.slow),
    pytest.param("monet_train.interop.generate --help", "1", marks=pytest.mark.slow),
    pytest.param("monet_train.analysis --help", "", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("command", "unbuffered"), COMMANDS)
def test_a_closed_output_ends_a_command_quietly(command: str, unbuffered: str) -> None:
    """As in ``monet-train --help | head -1``, where head has gone before the last line is written."""
    run = run_module(command, stdout=closed_pipe(), PYTHONUNBUFFERED=unbuffered)
    assert run.stderr == ""
    assert run.returncode in (128 + signal.SIGPIPE, -signal.SIGPIPE)  # a shell reports both as 141


def test_a_full_output_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        run = run_module("data_prep --help", stdout=full, PYTHONUNBUFFERED="")
    assert run.returncode == 2
    assert run.stderr == "error: standard output cannot be written (No space left on device): redirect it elsewhere\n"


def test_bad_input_keeps_its_status_where_standard_error_is_closed() -> None:
    assert run_module("data_prep info nowhere", stderr=closed_pipe()).returncode == 2


def run_module(
    command: str, stdout: int | IO[str] = subprocess.DEVNULL, stderr: int = subprocess.PIPE, **environment: str
) -> subprocess.CompletedProcess[Any]:
    return subprocess.run(
        [sys.executable, "-m", *command.split()], cwd=REPOSITORY, stdout=stdout, stderr=stderr, text=True,
        env=os.environ | environment, timeout=200,
    )  # fmt: skip


def closed_pipe() -> int:
    """The writing end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer
