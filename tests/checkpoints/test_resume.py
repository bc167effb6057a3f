"""A run that was killed or stopped resumes bit for bit, as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.support import REPOSITORY
from tests.support.commands import launch
from tests.support.runs import TINY, Training, records, train_in_turn, weights

STEPS = 20
KILLED_AT = 8
DEADLINE_SECONDS = 120
RESUMABLE = [*TINY, f"train.max_steps={STEPS}", "eval.every=5", "eval.sequences=8", "checkpoint.every=4"]


@pytest.mark.slow
def test_killed_while_saving_then_stopped_by_sigterm(shards: Path, tmp_path: Path) -> None:
    base = [*RESUMABLE, f"data.path={shards}", "zero.stage=1", "train.micro_batch_size=2", "checkpoint.keep=2"]
    run = tmp_path / "run"
    interrupted = [*base, f"run.dir={run}", "logging.wandb.mode=offline"]
    whole = Training([*base, f"run.dir={tmp_path}/whole"])
    train_in_turn([whole, Training(interrupted, killed_at=KILLED_AT)])

    checkpoints = run / "checkpoints"
    assert folders(checkpoints) == ["partial_step_00000008", "step_00000004"]
    assert (checkpoints / "latest").read_text() == "step_00000004\n"
    assert records(run)[-1]["step"] == KILLED_AT  # these are dropped again and redone
    wandb_id = (run / "wandb_id").read_text()

    assert stop_after(10, run, interrupted) == 75
    stopped_after = records(run)[-1]["step"]
    assert 10 <= stopped_after < STEPS
    assert folders(checkpoints)[-1] == f"step_{stopped_after:08d}"
    assert not list(checkpoints.glob("partial_*"))

    done = launch(interrupted)
    assert f"resumes after step {stopped_after}" in done.stdout
    same_as_never_stopped(run, tmp_path / "whole")
    assert folders(checkpoints) == ["step_00000016", "step_00000020"]
    assert (checkpoints / "latest").read_text() == "step_00000020\n"
    assert (run / "wandb_id").read_text() == wandb_id
    assert len(list((run / "wandb").glob(f"offline-run-*-{wandb_id}"))) == 3


@pytest.mark.distributed
def test_killed_with_zero_3_on_two_ranks(shards: Path, tmp_path: Path) -> None:
    base = [*RESUMABLE, f"data.path={shards}", "zero.stage=3", "train.micro_batch_size=2", "train.recompute=true"]
    killed = [*base, f"run.dir={tmp_path}/run"]
    whole = Training([*base, f"run.dir={tmp_path}/whole"])
    train_in_turn([whole, Training(killed, killed_at=KILLED_AT)], processes=2)
    assert folders(tmp_path / "run" / "checkpoints") == ["partial_step_00000008", "step_00000004"]

    done = launch(killed, processes=2)
    assert "resumes after step 4" in done.stdout
    same_as_never_stopped(tmp_path / "run", tmp_path / "whole")


def same_as_never_stopped(run: Path, whole: Path) -> None:
    """All records but their timings, and the final weights and statistics, are equal to the last bit."""
    assert [record["step"] for record in records(run)] == list(range(1, STEPS + 1))
    assert records(run) == records(whole)
    assert [record["step"] for record in records(run, "eval_loss")] == list(range(5, STEPS + 1, 5))
    assert records(run, "eval_loss") == records(whole, "eval_loss")
    ours, theirs = weights(run), weights(whole)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def stop_after(step: int, run: Path, overrides: list[str]) -> int:
    """Start ``monet-train``, send SIGTERM once ``step`` is done, and return the exit status."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    metrics = run / "metrics.jsonl"
    before = metrics.stat().st_ino  # the file is replaced when the lines to be redone are dropped
    process = subprocess.Popen(
        [sys.executable, "-m", "monet_train.train", *overrides], cwd=REPOSITORY, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while metrics.stat().st_ino == before or len(records(run)) < step:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        return process.wait(DEADLINE_SECONDS)
    finally:
        process.kill()


def folders(checkpoints: Path) -> list[str]:
    """Names of the folders in ``checkpoints``, sorted."""
    return sorted(path.name for path in checkpoints.iterdir() if path.is_dir())
