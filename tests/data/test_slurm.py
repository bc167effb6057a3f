"""slurm/prepare_data.sh on a real Slurm of two local nodes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.verify import verify
from monet_train.tokenizers import Tokenizer
from tests.support import REPOSITORY
from tests.support.corpora import documents_of, text_of

pytestmark = pytest.mark.slurm

DEADLINE_SECONDS = 240

Submit = Callable[..., str]


@pytest.fixture
def submit(slurm: dict[str, str], tmp_path: Path) -> Submit:
    """Submits an array of two, waits until it and its merge have left the queue, and returns what they wrote."""
    command = tmp_path / "bin" / "monet-data"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nPYTHONPATH="{REPOSITORY}" exec "{sys.executable}" -m data_prep "$@"\n')
    command.chmod(0o755)
    environment = {**slurm, "PATH": f"{command.parent}:{slurm['PATH']}"}

    def run(*arguments: object) -> str:
        sbatch = ["sbatch", "--array=0-1", "--cpus-per-task=1", REPOSITORY / "slurm/prepare_data.sh"]
        subprocess.run(list(map(str, [*sbatch, *arguments])), check=True, cwd=tmp_path, env=environment)
        names = ["squeue", "--noheader", "--format=%j", "--name=monet-data,monet-merge"]
        deadline = time.monotonic() + DEADLINE_SECONDS
        while queue := subprocess.run(names, check=True, env=environment, capture_output=True, text=True).stdout:
            assert time.monotonic() < deadline, queue
            time.sleep(1)
        return "\n".join(path.read_text() for path in sorted(tmp_path.glob("slurm-*.log")))

    return run


def test_an_array_prepares_and_merges(submit: Submit, jsonl: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    logs = submit(jsonl / "*.jsonl", "--tokenizer", tokenizer.path, "--out", out)
    assert (out / "manifest.json").exists(), logs
    assert verify(out)[1] == []
    assert documents_of(out, tokenizer) == [text_of(i) for i in range(300)]
    assert {path.name for path in out.glob("*.bin")} == {"shard-0000-00000.bin", "shard-0001-00000.bin"}


def test_a_task_that_fails_is_not_merged(submit: Submit, jsonl: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The merge leaves the queue; once the cause is repaired the same command resumes."""
    sources = shutil.copytree(jsonl, tmp_path / "sources")
    with sorted(sources.glob("*.jsonl"))[-1].open("a") as stream:
        stream.write("no JSON\n")
    out = tmp_path / "out"
    command = (sources / "*.jsonl", "--tokenizer", tokenizer.path, "--out", out)
    logs = submit(*command, "--max-bad-share", "0")
    assert logs.count("raise --max-bad-share") == 1
    assert not (out / "manifest.json").exists() and (out / "shard-0000-00000.bin").exists()
    logs = submit(*command, "--max-bad-share", "0.5")
    assert (out / "manifest.json").exists(), logs
    assert verify(out)[1] == []
    assert documents_of(out, tokenizer) == [text_of(i) for i in range(300)]
