"""slurm/train_850m.sh on a real Slurm of two local nodes."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import REPOSITORY
from tests.support.runs import TINY, records, train_in_turn

pytestmark = pytest.mark.slurm

DEADLINE_SECONDS = 240
STEPS = 60  # long enough that a signal sent after the first steps arrives before the last
TWO_SMALL_NODES = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]


@dataclass
class Job:
    """A training that was submitted."""

    slurm: dict[str, str]
    overrides: list[str]
    folder: Path
    number: str = ""

    def __post_init__(self) -> None:
        self.log, self.run = self.folder / "job.log", self.folder / "run"
        script = REPOSITORY / "slurm" / "train_850m.sh"
        command = ["sbatch", "--parsable", *TWO_SMALL_NODES, f"--output={self.log}", script, *self.overrides]
        self.number = self.ask(*command, f"run.dir={self.run}").strip()

    def ask(self, *command: str | Path) -> str:
        environment = self.slurm | {
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{self.slurm['PATH']}",
        }
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def state(self) -> str:
        return self.ask("scontrol", "show", "job", self.number)

    def wait_for(self, what: Callable[[], object]) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not what():
            assert time.monotonic() < deadline, self.log.read_text() if self.log.exists() else self.state()
            time.sleep(0.2)

    def wait_for_steps(self, least: int) -> None:
        self.wait_for(lambda: (self.run / "metrics.jsonl").exists() and len(records(self.run)) >= least)


def test_a_job_that_is_signalled_saves_requeues_itself_and_goes_on(
    slurm: dict[str, str], shards: Path, tmp_path: Path
) -> None:
    overrides = ["model=nano", *TINY, f"data.path={shards}", f"train.max_steps={STEPS}"]
    job = Job(slurm, overrides, tmp_path)
    job.wait_for_steps(2)
    job.ask("scancel", "--signal=USR1", "--batch", job.number)
    job.wait_for(lambda: "JobState=COMPLETED" in (state := job.state()) or "FAILED" in state)

    state, text = job.state(), job.log.read_text()
    assert "JobState=COMPLETED" in state, text
    assert "Restarts=1" in state, text
    assert "start 1: 2 tasks" in text
    assert "start 2: 2 tasks" in text
    (resumed_after,) = re.findall(r"resumes after step (\d+)", text)
    assert 2 <= int(resumed_after) < STEPS

    train_in_turn([[*overrides, f"run.dir={tmp_path / 'plain'}"]], processes=2)
    assert [record["step"] for record in records(job.run)] == list(range(1, STEPS + 1))
    assert records(job.run) == records(tmp_path / "plain")


def test_a_job_that_is_cancelled_saves_and_stays_cancelled(slurm: dict[str, str], shards: Path, tmp_path: Path) -> None:
    job = Job(slurm, ["model=nano", *TINY, f"data.path={shards}", "train.max_steps=100000"], tmp_path)
    job.wait_for_steps(2)
    job.ask("scancel", job.number)
    job.wait_for(lambda: "EndTime" in (state := job.state()) and "COMPLETING" not in state and "RUNNING" not in state)

    state, text = job.state(), job.log.read_text()
    assert "JobState=CANCELLED" in state, text
    assert "Restarts=0" in state, text
    assert "back into the queue" not in text
    assert (job.run / "checkpoints" / "latest").exists(), text
