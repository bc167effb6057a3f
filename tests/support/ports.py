"""Free ports, below those that the kernel gives to outgoing connections, so that none of these takes them first."""

from __future__ import annotations

import random
import socket

RANGE = range(10_000, 32_768)


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    return free_ports(1)[0]


def free_ports(number: int) -> list[int]:
    """Different ports of the loopback interface that nobody listens on."""
    return [port for port in random.Random().sample(RANGE, 100 + number) if _is_free(port)][:number]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True
