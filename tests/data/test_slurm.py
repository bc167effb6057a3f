"""slurm/prepare_data.sh on a real Slurm of two local nodes."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.tokenizers import Tokenizer
from data_prep.verify import verify
from tests.data.conftest import REPOSITORY, text_of
from tests.data.test_prepare import documents_of

LOCAL = REPOSITORY.parent / "shared" / "slurm_local"
CONTROLLER_PORT = 16817  # of the local Slurm's configuration
DEADLINE_SECONDS = 240


@pytest.fixture
def slurm() -> Iterator[dict[str, str]]:
    """The environment of a running two-node Slurm."""
    if not LOCAL.is_dir() or any(shutil.which(tool) is None for tool in ("sbatch", "slurmctld", "slurmd", "munged")):
        pytest.skip("needs Slurm's packages, munge and ../shared/slurm_local")
    if os.geteuid() != 0:
        pytest.skip("the local Slurm needs root")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", CONTROLLER_PORT)) == 0:
            pytest.skip("another local Slurm is up")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)  # munge refuses a socket in a folder that not everybody may enter
    try:
        subprocess.run(["bash", LOCAL / "up.sh", folder, "2"], check=True)
        yield {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    finally:
        subprocess.run(["bash", LOCAL / "down.sh", folder], check=False)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.distributed
def test_an_array_prepares_and_merges(slurm: dict[str, str], jsonl: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    command = tmp_path / "bin" / "monet-data"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nPYTHONPATH="{REPOSITORY}" exec "{sys.executable}" -m data_prep "$@"\n')
    command.chmod(0o755)
    out = tmp_path / "out"
    subprocess.run(
        ["sbatch", "--array=0-1", "--cpus-per-task=1", REPOSITORY / "slurm/prepare_data.sh", jsonl / "*.jsonl",
         "--tokenizer", tokenizer.path, "--out", out],
        check=True, cwd=tmp_path, env={**slurm, "PATH": f"{command.parent}:{slurm['PATH']}"},
    )  # fmt: skip
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (out / "manifest.json").exists() and time.monotonic() < deadline:
        time.sleep(1)
    logs = "\n".join(path.read_text() for path in sorted(tmp_path.glob("slurm-*.log")))
    assert (out / "manifest.json").exists(), logs
    assert verify(out)[1] == []
    assert documents_of(out, tokenizer) == [text_of(i) for i in range(300)]
    assert {path.name for path in out.glob("*.bin")} == {"shard-0000-00000.bin", "shard-0001-00000.bin"}
