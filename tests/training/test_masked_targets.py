"""Targets that do not count: the loss is that of all counted targets of the global batch, wherever they are."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from monet_train.config.compose import compose
from monet_train.data.packing import PackedSequences
from monet_train.parallel.launch import Launch
from monet_train.training.setup import build_trainer
from tests.support.runs import TINY, Training, records, train_in_turn
from tests.support.worker import counted_targets, masked_sequence

GRID = {1: [(1, 1, 0)], 2: [(2, 1, 1), (1, 2, 3)], 4: [(2, 2, 2), (4, 1, 1)]}  # (data, tensor, ZeRO stage)
EMPTY = 7  # the step in which no target counts
STEPS = 20


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """Starting a process group sets RANK and the like, which later tests must not see."""
    with mock.patch.dict(os.environ):
        yield


@pytest.mark.distributed
def test_losses_agree(shards: Path, tmp_path: Path) -> None:
    def training(data: int, tensor: int, stage: int) -> Training:
        overrides = [
            *TINY, f"data.path={shards}", f"train.max_steps={STEPS}", "eval.every=10", "eval.sequences=8",
            f"train.micro_batch_size={4 // data}", f"parallel.tensor={tensor}", f"zero.stage={stage}",
            f"run.dir={tmp_path}/{data}_{tensor}_{stage}", f"train.recompute={str(stage == 3).lower()}",
        ]  # fmt: skip
        return Training(overrides, masked_targets=True)

    counts = [sum(int(counted_targets(8 * step + i, 64).sum()) for i in range(8)) for step in range(STEPS)]
    assert counts[EMPTY] == 0 and len(set(counts)) > STEPS / 2
    for processes, topologies in GRID.items():
        train_in_turn([training(*topology) for topology in topologies], processes)

    reference, held_out = records(tmp_path / "1_1_0"), records(tmp_path / "1_1_0", "eval_loss")
    assert len(reference) == STEPS and len(held_out) == 2
    assert [record["step"] - 1 for record in reference if record["loss"] == 0] == [EMPTY]
    assert all(math.isfinite(record["grad_norm"]) for record in reference)
    for topology in [t for group in GRID.values() for t in group]:
        run = tmp_path / "_".join(map(str, topology))
        losses, expected = [record["loss"] for record in records(run)], [record["loss"] for record in reference]
        assert losses == pytest.approx(expected, rel=1e-5), topology
        for step in (0, 1, 2):  # all counted differently: see counted_targets
            for name in ("grad_norm", "uniformity", "ambiguity"):
                value = reference[step][name]
                assert records(run)[step][name] == pytest.approx(value, rel=1e-5), (topology, step, name)
        evaluated = [record["eval_loss"] for record in records(run, "eval_loss")]
        assert evaluated == pytest.approx([record["eval_loss"] for record in held_out], rel=1e-5), topology


@pytest.mark.parametrize("step", [0, 1, EMPTY])
def test_the_loss_is_the_sum_over_the_global_batch_by_its_counted_targets(
    step: int, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two micro-steps with unequal counts, against one sum of both that torch differentiates."""
    monkeypatch.setattr(PackedSequences, "__getitem__", masked_sequence)
    overrides = [*TINY, f"data.path={shards}", f"run.dir={tmp_path}/run", "zero.stage=0", "eval.every=null"]
    with build_trainer(compose([*overrides, f"train.max_steps={step + 1}"]), Launch(0, 1, 0)) as trainer:
        model = trainer.engine.module.train()
        batches = list(trainer.batches.read(step))
        outputs = [model(batch.inputs, targets=batch.targets, keep_logits=False) for batch in batches]
        counted = sum(int((batch.targets != -100).sum()) for batch in batches)
        assert [batch.counted_targets() for batch in batches] == [int(output.targets) for output in outputs]
        loss = sum(output.loss_sum for output in outputs) / max(1, counted)
        auxiliary = sum(output.uniformity + output.ambiguity for output in outputs) / len(outputs)
        gradients = torch.autograd.grad(loss + 1e-3 * auxiliary, list(model.parameters()), allow_unused=True)
        norm = torch.stack([g.double().square().sum() for g in gradients if g is not None]).sum().sqrt()
        trainer.step = step  # with the initial weights
        trainer.fit()
    (record,) = records(tmp_path / "run")
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert (record["loss"] == 0) == (step == EMPTY)
