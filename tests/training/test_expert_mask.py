"""Training with masked experts: the same losses on every topology, and no mask in what is saved."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runs import TINY, Training, records, train_in_turn, weights

TOPOLOGIES = {"whole": (1, 1, 0), "tensor": (1, 2, 1), "zero3": (2, 1, 3)}  # (data, tensor, ZeRO stage)


@pytest.mark.distributed
@pytest.mark.parametrize("decomposition", ["vertical", "horizontal"])
def test_losses_agree(decomposition: str, shards: Path, tmp_path: Path) -> None:
    def overrides(name: str) -> list[str]:
        data, tensor, stage = TOPOLOGIES[name.removeprefix("unmasked ")]
        return [
            *TINY, f"data.path={shards}", f"model.moe_decompose={decomposition}", "train.max_steps=4",
            f"train.micro_batch_size={4 // data}", f"parallel.tensor={tensor}", f"zero.stage={stage}",
            f"run.dir={tmp_path}/{name}", f"train.recompute={str(name == 'zero3').lower()}",
        ]  # fmt: skip

    unmasked = Training(overrides("unmasked whole"))
    train_in_turn([Training(overrides("whole"), masked=True), unmasked])
    train_in_turn([Training(overrides(name), masked=True) for name in ("tensor", "zero3")], processes=2)

    losses = {name: [r["loss"] for r in records(tmp_path / name)] for name in [*TOPOLOGIES, "unmasked whole"]}
    assert len(losses["whole"]) == 4
    assert losses["whole"] != pytest.approx(losses["unmasked whole"], rel=1e-5)
    for name in ("tensor", "zero3"):
        assert losses[name] == pytest.approx(losses["whole"], rel=1e-5), name
        norm, expected = (records(tmp_path / run)[0]["grad_norm"] for run in (name, "whole"))
        assert norm == pytest.approx(expected, rel=1e-5), name
    assert weights(tmp_path / "zero3").keys() == weights(tmp_path / "unmasked whole").keys()
