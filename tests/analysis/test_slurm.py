"""slurm/collect.sh on a real Slurm of two local nodes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from monet_train.analysis.atlas import Atlas
from tests.support import REPOSITORY
from tests.support.files import contents
from tests.support.processes import run_ranks
from tests.support.worker import collect

pytestmark = pytest.mark.slurm

TWO_SMALL_NODES = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]


@pytest.mark.parametrize("model", ["vertical"], indirect=True)
def test_two_nodes_write_the_same_atlas_as_one_process(
    slurm: dict[str, str], model_folder: Path, labelled: Callable[..., Path], tmp_path: Path
) -> None:
    given = [str(model_folder), str(labelled("corpus")), "--window", "32", "--out"]
    log = tmp_path / "job.log"
    done = subprocess.run(
        ["sbatch", "--wait", *TWO_SMALL_NODES, f"--output={log}", REPOSITORY / "slurm" / "collect.sh",
         *given, tmp_path / "cluster"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=240,
        env=slurm | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{slurm['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stderr}\n{log.read_text() if log.exists() else ''}"
    assert Atlas(tmp_path / "cluster").manifest.documents == 60
    (alone,) = run_ranks(collect, [*given, str(tmp_path / "alone")])
    assert alone.returncode == 0, alone.stderr
    assert contents(tmp_path / "cluster") == contents(tmp_path / "alone")
