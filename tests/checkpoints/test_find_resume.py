"""Which checkpoint ``checkpoint.resume`` means."""

from __future__ import annotations

from pathlib import Path

import pytest

from monet_train.checkpoints.resume import find_resume
from monet_train.errors import UserError


def step(folder: Path, number: int) -> Path:
    checkpoint = folder / f"step_{number:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer.json").write_text("{}")
    return checkpoint.resolve()


def test_the_newest_complete_one_or_none(tmp_path: Path) -> None:
    assert find_resume("auto", tmp_path) is None
    newest = [step(tmp_path, number) for number in (5, 100)][-1]
    (tmp_path / "step_00000200").mkdir()  # no trainer.json: not complete
    assert find_resume("auto", tmp_path) == newest
    assert find_resume("never", tmp_path) is None


def test_a_path_starts_the_run_and_a_requeued_job_goes_on(tmp_path: Path) -> None:
    other = step(tmp_path / "other", 7)
    own = tmp_path / "own"
    assert find_resume(str(other), own) == other
    first = step(own, 9)
    assert find_resume(str(other), own) == first
    assert find_resume(str(first), own) == first


def test_an_older_step_of_the_same_run_is_refused(tmp_path: Path) -> None:
    older, newer = step(tmp_path, 1), step(tmp_path, 2)
    with pytest.raises(UserError, match=f"older than {newer}; move the newer ones away"):
        find_resume(str(older), tmp_path)
