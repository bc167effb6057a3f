"""The commands as a user starts them: in processes of their own, or their entry points in this one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from unittest import mock

from tests.support import REPOSITORY
from tests.support.ports import free_port


def command(arguments: list[str], check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository, one thread per process, and show what it printed if it fails."""
    done = subprocess.run(
        arguments,
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)} | environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert not check or done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done


def launch(overrides: Iterable[str], processes: int = 1) -> subprocess.CompletedProcess[str]:
    """``monet-train`` as a user's shell starts it: alone, or under torchrun. It must succeed."""
    launcher = [sys.executable, "-m", "monet_train.train"] if processes == 1 else torchrun(processes)
    return command([*launcher, *overrides])


def torchrun(processes: int, module: str = "monet_train.train") -> list[str]:
    """The torchrun command for that many processes on a free port."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes),
        "--master_addr", "127.0.0.1", "--master_port", str(free_port()), "-m", module,
    ]  # fmt: skip


def exit_status(main: Callable[[], None], name: str, *arguments: object) -> int:
    """Run the entry point ``main`` of the command ``name`` in this process; its exit status."""
    with mock.patch.object(sys, "argv", [name, *map(str, arguments)]):
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0
