"""Which rank reads what, and reading ahead."""

from __future__ import annotations

import pytest
import torch

from monet_train.data.batches import MicroBatches, micro_batches
from monet_train.data.packing import Sequence
from monet_train.errors import UserError


class Numbered(torch.utils.data.Dataset[Sequence]):
    """Sequence i consists of i."""

    def __getitem__(self, index: int) -> Sequence:
        return Sequence(torch.full((9,), index), torch.full((8,), -index), None)


def layout(global_batch: int, micro_batch: int, data_size: int, step: int) -> list[list[int]]:
    """For each micro-step the sequences of all ranks."""
    ranks = [
        [
            batch.tokens[:, 0].tolist()
            for batch in micro_batches(
                Numbered(),
                step=step,
                global_batch_size=global_batch,
                micro_batch_size=micro_batch,
                data_rank=rank,
                data_size=data_size,
            )
        ]
        for rank in range(data_size)
    ]
    return [[i for rank in ranks for i in rank[j]] for j in range(len(ranks[0]))]


def test_a_micro_step_holds_the_same_sequences_on_every_topology() -> None:
    expected = [list(range(48 + 8 * j, 48 + 8 * j + 8)) for j in range(3)]
    for micro_batch, data_size in ((8, 1), (4, 2), (2, 4), (1, 8)):
        assert layout(24, micro_batch, data_size, step=2) == expected


def test_reading_ahead_changes_nothing() -> None:
    shape = {"global_batch_size": 12, "micro_batch_size": 2, "data_rank": 1, "data_size": 2}
    ahead = MicroBatches(Numbered(), **shape)
    try:
        for step in (0, 1, 2, 7, 3, 4):  # also jumps, as after a resume or a skipped step
            for batch, expected in zip(ahead.of(step), micro_batches(Numbered(), step=step, **shape), strict=True):
                assert torch.equal(batch.tokens, expected.tokens)
                assert torch.equal(batch.segment_ids, expected.segment_ids)
                assert batch.positions is None and batch.tokens.dtype == torch.int64
    finally:
        ahead.close()
    assert ahead.wait_seconds > 0


def test_an_error_while_reading_ahead_reaches_the_caller() -> None:
    class Broken(Numbered):
        def __getitem__(self, index: int) -> Sequence:
            if index >= 4:
                raise UserError("bad shard")
            return super().__getitem__(index)

    ahead = MicroBatches(Broken(), global_batch_size=4, micro_batch_size=4, data_rank=0, data_size=1)
    assert len(list(ahead.of(0))) == 1
    with pytest.raises(UserError, match="bad shard"):
        list(ahead.of(1))
    ahead.close()


@pytest.mark.parametrize(("micro_batch", "data_size"), [(5, 1), (4, 4), (0, 1)])
def test_a_global_batch_that_the_ranks_cannot_make_is_refused(micro_batch: int, data_size: int) -> None:
    with pytest.raises(UserError, match=r"train\.global_batch_size=24 is no multiple"):
        layout(24, micro_batch, data_size, step=0)
