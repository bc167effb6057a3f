"""The quickstart as a newcomer runs it: real text to a generated sentence, and a second time on what the first made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import REPOSITORY


def quickstart(folder: Path) -> str:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_MODULES_CACHE": str(folder.parent / "modules"),
    }
    done = subprocess.run(
        ["bash", "examples/quickstart.sh", str(folder)],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=580,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_quickstart_twice(tmp_path: Path) -> None:
    folder = tmp_path / "quickstart"
    printed = quickstart(folder)
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[-1] < losses[0] - 2
    assert f"{losses[0]:.3f} at step 1, {losses[-1]:.3f} at step {len(losses)}" in printed
    assert (folder / "hf" / "model.safetensors").exists()
    assert str(folder / "run") in printed

    weights = (folder / "hf" / "model.safetensors").read_bytes()
    again = quickstart(folder)
    assert f"at step {len(losses)}" in again
    assert (folder / "hf" / "model.safetensors").read_bytes() == weights
