"""``train.compile``: the same losses as without it on any topology it allows, resumed bit for bit, one graph."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch._dynamo.utils import counters

from monet_train.config.compose import compose
from monet_train.errors import UserError
from monet_train.kernels import extension
from monet_train.parallel.launch import Launch
from monet_train.training.checks import check_compiler, check_config
from monet_train.training.setup import build_trainer
from tests.support.runs import TINY, Training, records, train_in_turn, weights

STEPS, KILLED_AT = 8, 4
SMALL = [*TINY, "model.num_hidden_layers=2", "zero.stage=1", "train.micro_batch_size=2", "eval.sequences=8"]


@pytest.mark.slow
def test_compiled_steps_are_those_without(shards: Path, tmp_path: Path) -> None:
    if reason := extension.missing():
        pytest.skip(f"native kernels: {reason}")
    base = [
        *SMALL, f"data.path={shards}", f"train.max_steps={STEPS}", "eval.every=4", "checkpoint.every=2",
    ]  # fmt: skip
    compiled = [*base, "train.compile=true"]
    resumed = [*compiled, f"run.dir={tmp_path}/resumed"]
    trainings = [Training([*base, f"run.dir={tmp_path}/eager"]), Training([*compiled, f"run.dir={tmp_path}/whole"])]
    train_in_turn([*trainings, Training(resumed, killed_at=KILLED_AT)], processes=2)
    train_in_turn([resumed], processes=2)

    eager, whole = records(tmp_path / "eager"), records(tmp_path / "whole")
    assert [record["loss"] for record in whole] == pytest.approx([record["loss"] for record in eager], rel=1e-5)
    assert records(tmp_path / "whole", "eval_loss") == [
        pytest.approx(record, rel=1e-5) for record in records(tmp_path / "eager", "eval_loss")
    ]
    assert records(tmp_path / "resumed") == whole
    ours, theirs = weights(tmp_path / "resumed"), weights(tmp_path / "whole")
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert weights(tmp_path / "eager").keys() == theirs.keys()


@pytest.mark.slow
def test_one_graph_is_compiled_for_a_whole_training(shards: Path, tmp_path: Path) -> None:
    """Whatever number of pairs is active, with evaluations between."""
    if reason := extension.missing():
        pytest.skip(f"native kernels: {reason}")
    overrides = [
        *SMALL, f"data.path={shards}", f"run.dir={tmp_path}/run", "train.max_steps=4", "eval.every=2",
        "train.compile=true",
    ]  # fmt: skip
    torch._dynamo.reset()
    counters.clear()
    with mock.patch.dict(os.environ), build_trainer(compose(overrides), Launch(0, 1, 0)) as trainer:
        trainer.fit()
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("key", ["parallel.tensor=2", "zero.stage=3"])
def test_what_would_fall_into_many_graphs_is_refused(key: str) -> None:
    config = compose([*TINY, "data.path=unused", "train.compile=true", key])
    with pytest.raises(UserError, match=f"train.compile=true cannot be combined with {key}"):
        check_config(config, Launch(rank=0, world_size=2, local_rank=0))


def test_a_machine_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="no-such-compiler is not found; install g"):
        check_compiler(torch.device("cpu"))
