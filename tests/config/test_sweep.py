"""The runs of a sweep: their values, their names and their folders, before any of them is trained."""

from __future__ import annotations

import pytest

from monet_train.config.compose import compose
from monet_train.config.sweep import Job, sweep_jobs
from monet_train.errors import UserError


def jobs(*overrides: str) -> list[Job]:
    return sweep_jobs(["data.path=shards", *overrides])


def folders(*overrides: str) -> list[str]:
    found = [job.config.run.dir for job in jobs(*overrides)]
    assert len(set(found)) == len(found)
    return found


def test_one_run_per_combination_the_last_key_fastest() -> None:
    made = jobs("optimizer.lr=1e-3,2e-3", "train.seed=range(1,3)")
    assert [(job.config.optimizer.lr, job.config.train.seed) for job in made] == [
        (1e-3, 1), (1e-3, 2), (2e-3, 1), (2e-3, 2),
    ]  # fmt: skip
    assert made[1].values == "optimizer.lr=0.001 train.seed=2"


def test_runs_that_would_share_a_folder_get_their_values_appended() -> None:
    names = ["nano-optimizer.lr_0.001", "nano-optimizer.lr_0.002"]
    assert folders("optimizer.lr=1e-3,2e-3") == [f"runs/{name}" for name in names]
    assert [job.config.run.name for job in jobs("optimizer.lr=1e-3,2e-3")] == names
    assert folders("train.seed=1,2", "run.dir=/data/here") == ["/data/here-train.seed_1", "/data/here-train.seed_2"]
    assert folders("run.name=a,b", "train.seed=1,2")[:2] == ["runs/a-train.seed_1", "runs/a-train.seed_2"]
    assert folders("run.name=a,b", "run.dir=here") == ["here-run.name_a", "here-run.name_b"]


def test_a_run_of_a_sweep_can_be_started_alone() -> None:
    """The command line takes its name and its folder as they are."""
    (job, _) = jobs("optimizer.lr=1e-3,2e-3", "schedule.final=0.5")
    name, folder = job.config.run.name, job.config.run.dir
    assert compose(["data.path=shards", "optimizer.lr=1e-3", "schedule.final=0.5", f"run.name={name}"]) == job.config
    assert compose(["data.path=shards", f"run.dir={folder}"]).run.dir == folder


def test_folders_that_differ_by_themselves_stay() -> None:
    assert folders("model=nano,850m") == ["runs/nano", "runs/monet-850m"]
    assert folders("run.name=a,b", "train.seed=3") == ["runs/a", "runs/b"]
    assert folders("train.seed=1,2", "run.dir=runs/seed${train.seed}") == ["runs/seed1", "runs/seed2"]
    assert folders("train.seed=1") == ["runs/nano"]


def test_values_that_file_names_cannot_have() -> None:
    made = folders("data.path=/a/b,/a_b", "run.name=x")
    assert all(folder.startswith("runs/x-data.path__a_b_") and folder.count("/") == 1 for folder in made)
    (long, _) = folders(f"data.path={'a' * 400},b", "run.name=x")
    assert len(long) < 200


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("train.seed=1,1", ["train.seed=1 occurs twice", "each value once"]),
        ("optimizer.lr=1e-3,0.001", ["optimizer.lr=0.001 occurs twice"]),
        ("optimizer.lr=1e-3,high", ["optimizer.lr=high", "not a number"]),
        ("optimizer.lrr=1,2", ["unknown key optimizer.lrr", "optimizer.lr"]),
        ("model=nano,2b", ["model/2b does not exist", "850m"]),
        ("train.seed=interval(0,1)", ["no list of values", "train.seed=A,B"]),
        ("~train.seed", ["a key cannot be deleted"]),
        ("hydra/sweeper=basic", ["no settings of Hydra"]),
    ],
)
def test_a_sweep_that_cannot_be_is_one_line(override: str, fragments: list[str]) -> None:
    with pytest.raises(UserError) as refusal:
        jobs(override)
    for fragment in fragments:
        assert fragment in str(refusal.value)
    assert "\n" not in str(refusal.value)
