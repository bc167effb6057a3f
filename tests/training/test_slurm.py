"""slurm/train_850m.sh on a real Slurm of two local nodes."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.training.conftest import TINY, records, train

DEADLINE_SECONDS = 240
STEPS = 60  # long enough that a signal sent after the first steps arrives before the last
TWO_SMALL_NODES = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]


@pytest.mark.distributed
def test_a_job_that_is_signalled_saves_requeues_itself_and_goes_on(
    slurm: dict[str, str], shards: Path, tmp_path: Path
) -> None:
    overrides = ["model=nano", *TINY, f"data.path={shards}", f"train.max_steps={STEPS}"]
    environment = slurm | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{slurm['PATH']}"}

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def wait_for(what: Callable[[], object]) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not what():
            assert time.monotonic() < deadline, log.read_text() if log.exists() else run("squeue", "--long")
            time.sleep(0.2)

    log, job_run = tmp_path / "job.log", tmp_path / "job"
    script = REPOSITORY / "slurm" / "train_850m.sh"
    submitted = run(
        "sbatch", "--parsable", *TWO_SMALL_NODES, f"--output={log}", script, *overrides, f"run.dir={job_run}"
    )
    job = submitted.strip()
    wait_for(lambda: (job_run / "metrics.jsonl").exists() and len(records(job_run)) >= 2)
    run("scancel", "--signal=USR1", "--batch", job)
    wait_for(lambda: "JobState=COMPLETED" in (shown := run("scontrol", "show", "job", job)) or "FAILED" in shown)

    state, text = run("scontrol", "show", "job", job), log.read_text()
    assert "JobState=COMPLETED" in state, text
    assert "Restarts=1" in state, text
    assert "start 1: 2 tasks" in text
    assert "start 2: 2 tasks" in text
    (resumed_after,) = re.findall(r"goes on after step (\d+)", text)
    assert 2 <= int(resumed_after) < STEPS

    train([*overrides, f"run.dir={tmp_path / 'plain'}"], processes=2)
    assert [record["step"] for record in records(job_run)] == list(range(1, STEPS + 1))
    assert records(job_run) == records(tmp_path / "plain")
