"""Sweeps train every run; a start that would train nothing under other values is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.support.runs import TINY, records, train

pytestmark = pytest.mark.slow


def overrides(run: Path, shards: Path, *more: str) -> list[str]:
    return [*TINY, f"data.path={shards}", f"run.dir={run}", "train.max_steps=2", *more]


def test_every_value_is_trained_in_a_folder_of_its_own(shards: Path, tmp_path: Path) -> None:
    (done,) = train(["-m", *overrides(tmp_path / "run", shards, "optimizer.lr=1e-3,2e-3,-1")])
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    folders = [tmp_path / f"run-optimizer.lr={rate}" for rate in ("0.001", "0.002")]
    for folder, rate in zip(folders, (1e-3, 2e-3), strict=True):
        config = OmegaConf.load(folder / "config.yaml")
        assert config.optimizer.lr == rate
        assert config.run.name.endswith(folder.name.removeprefix("run"))
        assert len(records(folder)) == 2
    assert records(folders[0]) != records(folders[1])
    assert "run 3 of 3 (optimizer.lr=-1): error: optimizer.lr=-1" in done.stderr
    assert "1 of 3 runs were refused" in done.stderr


def test_a_finished_run_says_so_or_refuses_other_values(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(overrides(run, shards))
    config, events = (run / "config.yaml").read_bytes(), (run / "events.jsonl").read_bytes()

    (again,) = train(overrides(run, shards))
    assert again.returncode == 0, again.stderr
    assert "is finished: all 2 steps are trained" in again.stdout

    (other,) = train(overrides(run, shards, "optimizer.lr=0.125"))
    assert other.returncode == 2
    assert "nothing would be trained with optimizer.lr=0.125 (it was trained with" in other.stderr
    (shorter,) = train(overrides(run, shards, "train.max_steps=1"))
    assert shorter.returncode == 2
    assert "is at step 2 already, this start asks for 1: raise train.max_steps" in shorter.stderr
    assert (run / "config.yaml").read_bytes() == config
    assert (run / "events.jsonl").read_bytes() == events

    (longer,) = train(overrides(run, shards, "optimizer.lr=0.125", "train.max_steps=3"))
    assert longer.returncode == 0, longer.stderr
    assert OmegaConf.load(run / "config.yaml").optimizer.lr == 0.125
    changed = [line for line in (run / "events.jsonl").read_text().splitlines() if '"changed"' in line]
    assert len(changed) == 1
    assert '"optimizer.lr": [' in changed[0]
    assert '"train.max_steps": [2, 3]' in changed[0]


def test_a_sweep_under_a_launcher_is_refused(shards: Path, tmp_path: Path) -> None:
    for done in train(["-m", *overrides(tmp_path / "run", shards, "optimizer.lr=1e-3,2e-3")], processes=2):
        assert done.returncode == 2
    assert not (tmp_path / "run").exists()
