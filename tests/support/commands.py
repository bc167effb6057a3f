"""The commands as a user starts them, in processes of their own or in this one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from unittest import mock

from tests.support import REPOSITORY


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


def train(overrides: Iterable[str], processes: int = 1, check: bool = True) -> subprocess.CompletedProcess[str]:
    """``monet-train`` as a user starts it: alone, or under torchrun."""
    launcher = [sys.executable, "-m", "monet_train.train"] if processes == 1 else torchrun(processes)
    return command([*launcher, *overrides], check)


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


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    return free_ports(1)[0]


def free_ports(number: int) -> list[int]:
    """Different ports of the loopback interface that nobody listens on."""
    probes = [socket.socket() for _ in range(number)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
