"""What all tests share."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
GOLDEN = REPOSITORY / "tests" / "golden"
LOCAL_SLURM = REPOSITORY.parent / "shared" / "slurm_local"
CONTROLLER_PORT = 16817  # of the local Slurm's configuration


@pytest.fixture
def slurm() -> Iterator[dict[str, str]]:
    """The environment of a running two-node Slurm."""
    tools = ("sbatch", "slurmctld", "slurmd", "munged")
    if not LOCAL_SLURM.is_dir() or any(shutil.which(tool) is None for tool in tools):
        pytest.skip("needs Slurm's packages, munge and ../shared/slurm_local")
    if os.geteuid() != 0:
        pytest.skip("the local Slurm needs root")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", CONTROLLER_PORT)) == 0:
            pytest.skip("another local Slurm is up")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)  # munge refuses a socket in a folder that not everybody may enter
    try:
        subprocess.run(["bash", LOCAL_SLURM / "up.sh", folder, "2"], check=True)
        yield {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    finally:
        subprocess.run(["bash", LOCAL_SLURM / "down.sh", folder], check=False)
        shutil.rmtree(folder, ignore_errors=True)
