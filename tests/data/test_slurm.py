"""slurm/prepare_data.sh on a real Slurm of two local nodes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.tokenizers import Tokenizer
from data_prep.verify import verify
from tests.data.conftest import REPOSITORY, documents_of, text_of

DEADLINE_SECONDS = 240


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
