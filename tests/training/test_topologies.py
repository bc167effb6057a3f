"""The same run gives the same losses on every (data, tensor, ZeRO) topology."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runs import TINY, records, train_in_turn

SEQUENCES = 4  # of a micro-step, over all data ranks
Topologies = dict[int, list[tuple[int, int, int]]]  # by number of processes: (data, tensor, ZeRO stage)
GRID: Topologies = {
    1: [(1, 1, 0), (1, 1, 2)],
    2: [(2, 1, 0), (2, 1, 1), (2, 1, 2), (2, 1, 3), (1, 2, 0), (1, 2, 1), (1, 2, 3)],
    4: [(2, 2, 0), (2, 2, 1), (2, 2, 2), (2, 2, 3), (4, 1, 1)],
}


@pytest.mark.distributed
@pytest.mark.parametrize("decomposition", ["vertical", "horizontal"])
def test_losses_agree(decomposition: str, shards: Path, tmp_path: Path) -> None:
    def overrides(data: int, tensor: int, stage: int) -> list[str]:
        return [
            *TINY, f"data.path={shards}", f"model.moe_decompose={decomposition}", "eval.every=10", "eval.sequences=8",
            f"train.micro_batch_size={SEQUENCES // data}", f"parallel.tensor={tensor}", f"zero.stage={stage}",
            f"run.dir={tmp_path}/{data}_{tensor}_{stage}", f"train.recompute={str(stage == 3).lower()}",
        ]  # fmt: skip

    for processes, topologies in GRID.items():
        train_in_turn([overrides(*topology) for topology in topologies], processes)

    reference = records(tmp_path / "1_1_0")
    held_out = records(tmp_path / "1_1_0", "eval_loss")
    assert len(reference) == 20
    assert len(held_out) == 2
    for topology in [t for group in GRID.values() for t in group]:
        run = tmp_path / "_".join(map(str, topology))
        losses, expected = [r["loss"] for r in records(run)], [r["loss"] for r in reference]
        deviation = max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))
        print(f"{decomposition} data x tensor x ZeRO {topology}: largest deviation {deviation:.1e}")
        assert losses == pytest.approx(expected, rel=1e-5), topology
        # the gradient norm counts replicated parameters once
        first = records(run)[0]["grad_norm"]
        assert first == pytest.approx(reference[0]["grad_norm"], rel=1e-5), topology
        evaluated = [r["eval_loss"] for r in records(run, "eval_loss")]
        assert evaluated == pytest.approx([r["eval_loss"] for r in held_out], rel=1e-5), topology


@pytest.mark.distributed
def test_bf16_agrees_in_every_zero_stage(shards: Path, tmp_path: Path) -> None:
    """DeepSpeed has a wrapper of its own for each stage; with two micro-steps, stages 0 and 1 sum in bf16."""
    runs = [
        [
            *TINY, f"data.path={shards}", f"run.dir={tmp_path}/{stage}", f"zero.stage={stage}", "train.precision=bf16",
            "train.max_steps=6", "optimizer.lr=1e-2",
        ]
        for stage in (0, 1, 2, 3)
    ]  # fmt: skip
    train_in_turn(runs)
    expected = [r["loss"] for r in records(tmp_path / "1")]
    for stage in (0, 2, 3):
        losses = [r["loss"] for r in records(tmp_path / str(stage))]
        assert losses == pytest.approx(expected, rel=1e-4), stage


@pytest.mark.distributed
@pytest.mark.parametrize("decomposition", ["vertical", "horizontal"])
def test_the_plain_definition_agrees_on_tensor_ranks(decomposition: str, shards: Path, tmp_path: Path) -> None:
    """Its gradients have other layouts in memory than those of the native kernels."""
    for tensor in (1, 2):
        overrides = [
            *TINY, f"data.path={shards}", f"model.moe_decompose={decomposition}", "train.max_steps=3", "kernels=plain",
            f"parallel.tensor={tensor}", f"run.dir={tmp_path}/{tensor}",
        ]  # fmt: skip
        train_in_turn([overrides], processes=tensor)
    for one, two in zip(records(tmp_path / "1"), records(tmp_path / "2"), strict=True):
        for name in ("loss", "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-5), name
