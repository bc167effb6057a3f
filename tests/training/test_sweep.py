"""A sweep trains every run; a start with other values that would train nothing is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.support.files import contents
from tests.support.runs import TINY, records, train

pytestmark = pytest.mark.slow


def overrides(run: Path, shards: Path, *more: str) -> list[str]:
    return [*TINY, f"data.path={shards}", f"run.dir={run}", "train.max_steps=2", *more]


def test_every_value_is_trained_in_a_folder_of_its_own(shards: Path, tmp_path: Path) -> None:
    """A run that fails costs one line and the status; the others are trained."""
    sweep = ["-m", *overrides(tmp_path / "run", shards, "optimizer.lr=1e-3,1e30,2e-3")]
    (done,) = train(sweep)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    folders = [tmp_path / f"run-optimizer.lr_{rate}" for rate in ("0.001", "0.002")]
    for folder, rate in zip(folders, (1e-3, 2e-3), strict=True):
        config = OmegaConf.load(folder / "config.yaml")
        assert config.optimizer.lr == rate
        assert config.run.name == f"nano{folder.name.removeprefix('run')}"
        assert len(records(folder)) == 2
    assert records(folders[0]) != records(folders[1])
    failed, summary = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert failed.startswith("error: run 2 of 3 (optimizer.lr=1e+30): step 2 is not finite")
    assert summary == "error: 1 of 3 runs failed, see above: optimizer.lr=1e+30"

    before = [contents(folder) for folder in folders]
    (again,) = train([argument.replace(",1e30", "") for argument in sweep])
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("is finished: all 2 steps are trained") == 2
    assert [contents(folder) for folder in folders] == before


def test_a_run_of_a_sweep_is_the_run_alone(shards: Path, tmp_path: Path) -> None:
    """What an earlier run in the same process leaves behind does not reach the next one."""
    (swept,) = train(["-m", *overrides(tmp_path / "run", shards, "train.seed=1,2")])
    (alone,) = train(overrides(tmp_path / "alone", shards, "train.seed=2"))
    assert (swept.returncode, alone.returncode) == (0, 0), swept.stderr + alone.stderr
    assert records(tmp_path / "run-train.seed_2") == records(tmp_path / "alone")


def test_a_sweep_on_two_ranks(shards: Path, tmp_path: Path) -> None:
    """All processes train one run after another, with a new rendezvous for each."""
    more = ("train.micro_batch_size=2", "optimizer.lr=1e-3,1e30,2e-3")
    ranks = train(["-m", *overrides(tmp_path / "run", shards, *more)], processes=2)
    assert [rank.returncode for rank in ranks] == [2, 2]
    errors = [line for rank in ranks for line in rank.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2, errors
    for rate in ("0.001", "0.002"):
        assert len(records(tmp_path / f"run-optimizer.lr_{rate}")) == 2


def test_no_run_starts_if_a_value_of_a_later_one_cannot_be(shards: Path, tmp_path: Path) -> None:
    (done,) = train(["-m", *overrides(tmp_path / "run", shards, "optimizer.lr=1e-3,2e-3,-1")])
    assert done.returncode == 2
    assert "error: -m: optimizer.lr=-1: optimizer.lr=-1.0 must be a number of at least 0" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, trained to its end. Not to be changed."""
    run = tmp_path_factory.mktemp("finished") / "run"
    (done,) = train(overrides(run, shards))
    assert done.returncode == 0, done.stderr
    return run


# what is changed in the command of a finished run, and what the line says: what would do nothing, and the remedy
CHANGES = {
    "another rate": (["optimizer.lr=0.125"], "nothing would be trained with optimizer.lr=0.125 (it was trained with"),
    "an evaluation": (["eval.every=0"], "nothing would be trained with eval.every=0 (it was trained with null)"),
    "many values": (["schedule.final=0.2", "optimizer.clip=2", "optimizer.eps=1e-6", "eval.every=1"], "and 1 more"),
    "fewer steps": (["train.max_steps=1"], "is at step 2 already, this start asks for 1: raise train.max_steps"),
    "fewer tokens": (["train.max_steps=null", "train.max_tokens=512"], "asks for 1: raise train.max_tokens"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_finished_run_refuses_other_values(case: str, finished: Path, shards: Path) -> None:
    changed, line = CHANGES[case]
    before = contents(finished)
    (done,) = train(overrides(finished, shards, *changed))
    assert done.returncode == 2
    (error,) = (text for text in done.stderr.splitlines() if text.startswith("error: "))
    assert line in error
    assert "or choose another run.dir" in error
    assert contents(finished) == before


def test_a_finished_run_says_so(finished: Path, shards: Path) -> None:
    """With the values it was trained with, and with others that train nothing else."""
    before = contents(finished)
    for more in ([], ["logging.every=2", "checkpoint.keep=1"], ["train.max_steps=null", "train.max_tokens=1024"]):
        (done,) = train(overrides(finished, shards, *more))
        assert done.returncode == 0, done.stderr
        assert "nano is finished: all 2 steps are trained" in done.stdout
        assert "on cpu" not in done.stdout  # nothing was built
        assert contents(finished) == before


def test_a_start_from_anothers_last_checkpoint_refuses_to_train_nothing(
    finished: Path, shards: Path, tmp_path: Path
) -> None:
    checkpoint = f"checkpoint.resume={finished}/checkpoints/step_00000002"
    (done,) = train(overrides(tmp_path / "run", shards, checkpoint))
    assert done.returncode == 2
    assert f"{checkpoint} is at step 2 already, this start asks for 2: raise train.max_steps" in done.stderr
    assert not (tmp_path / "run").exists()

    (done,) = train(overrides(tmp_path / "run", shards, checkpoint, "train.max_steps=3", "optimizer.lr=0.125"))
    assert done.returncode == 0, done.stderr
    assert [(line["step"], line["changed"]["optimizer.lr"]) for line in changed(tmp_path / "run")] == [
        (2, [2e-3, 0.125])
    ]


def test_changed_values_are_recorded(finished: Path, shards: Path, tmp_path: Path) -> None:
    """config.yaml has what is trained with from now on, events.jsonl what it was before."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for rate, steps in ((0.125, 3), (0.125, 4), (0.25, 5)):
        (done,) = train(overrides(run, shards, f"optimizer.lr={rate}", f"train.max_steps={steps}"))
        assert done.returncode == 0, done.stderr
    config = OmegaConf.load(run / "config.yaml")
    assert (config.optimizer.lr, config.train.max_steps) == (0.25, 5)
    assert [(line["step"], line["changed"]) for line in changed(run)] == [
        (2, {"optimizer.lr": [2e-3, 0.125], "train.max_steps": [2, 3]}),
        (3, {"train.max_steps": [3, 4]}),
        (4, {"optimizer.lr": [0.125, 0.25], "train.max_steps": [4, 5]}),
    ]


def test_a_crash_before_the_first_step_keeps_the_history(finished: Path, shards: Path, tmp_path: Path) -> None:
    """Nothing was trained with the values in between, and the lines say so: both are of the same step."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (crashed,) = train(overrides(run, shards, "optimizer.lr=1e30", "schedule.warmup_steps=0", "train.max_steps=4"))
    assert crashed.returncode == 2
    (done,) = train(overrides(run, shards, "train.max_steps=4"))
    assert done.returncode == 0, done.stderr
    assert OmegaConf.load(run / "config.yaml").optimizer.lr == 2e-3
    assert [(line["step"], line["changed"]["optimizer.lr"]) for line in changed(run)] == [
        (2, [2e-3, 1e30]), (2, [1e30, 2e-3]),
    ]  # fmt: skip
    assert [record["lr"] for record in records(run)][2:] == [6e-5, 8e-5]  # the warm-up to the rate that is in force


def test_a_damaged_configuration_is_one_line(finished: Path, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for text in ("run: [", "- 5"):
        (run / "config.yaml").write_text(text)
        (done,) = train(overrides(run, shards))
        assert done.returncode == 2
        (error,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
        assert str(run / "config.yaml") in error
        assert "restore it, or choose another run.dir" in error


def test_a_configuration_of_an_earlier_version(finished: Path, shards: Path, tmp_path: Path) -> None:
    """Keys that are missing from it had their defaults."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    config = OmegaConf.load(run / "config.yaml")
    del config.optimizer.clip, config.callbacks
    OmegaConf.save(config, run / "config.yaml")
    (same,) = train(overrides(run, shards))
    assert same.returncode == 0, same.stderr
    (other,) = train(overrides(run, shards, "optimizer.clip=2"))
    assert "optimizer.clip=2.0 (it was trained with 1.0)" in other.stderr


def changed(run: Path) -> list[dict[str, Any]]:
    """The lines of events.jsonl about changed values."""
    lines = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == "changed"]
