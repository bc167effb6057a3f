"""Which rank reads what, and reading ahead."""

from __future__ import annotations

import pytest
import torch

from monet_train.data.batches import Batch, MicroBatches, collate, indices
from monet_train.data.packing import TokenSequence
from monet_train.errors import UserError


class Numbered(torch.utils.data.Dataset[TokenSequence]):
    """Sequence i consists of i; ``read`` notes which were."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __getitem__(self, index: int) -> TokenSequence:
        self.read.append(index)
        return TokenSequence(torch.full((9,), index), torch.full((8,), -index), None)


def layout(global_batch: int, micro_batch: int, data_size: int, step: int) -> list[list[int]]:
    """For each micro-step the sequences of all ranks."""
    ranks = []
    for rank in range(data_size):
        shape = {"global_batch_size": global_batch, "micro_batch_size": micro_batch, "data_size": data_size}
        batches = MicroBatches(Numbered(), steps=step + 1, data_rank=rank, **shape)
        ranks.append([batch.tokens[:, 0].tolist() for batch in batches.read(step)])
        batches.close()
    return [[i for rank in ranks for i in rank[j]] for j in range(len(ranks[0]))]


def test_a_micro_step_holds_the_same_sequences_on_every_topology() -> None:
    expected = [list(range(48 + 8 * j, 48 + 8 * j + 8)) for j in range(3)]
    for micro_batch, data_size in ((8, 1), (4, 2), (2, 4), (1, 8)):
        assert layout(24, micro_batch, data_size, step=2) == expected


def test_reading_ahead_changes_nothing() -> None:
    shape = {"global_batch_size": 12, "micro_batch_size": 2, "data_rank": 1, "data_size": 2}
    ahead = MicroBatches(Numbered(), steps=8, **shape)

    def read_now(step: int) -> list[Batch]:
        return [collate([Numbered()[i] for i in indices(step, j, *shape.values())]) for j in range(3)]

    try:
        for step in (0, 1, 2, 7, 3, 4):  # also jumps, as after a resume or a skipped step
            for batch, expected in zip(ahead.read(step), read_now(step), strict=True):
                assert torch.equal(batch.tokens, expected.tokens)
                assert torch.equal(batch.segment_ids, expected.segment_ids)
                assert batch.positions is None and batch.tokens.dtype == torch.int64
    finally:
        ahead.close()
    assert ahead.wait_seconds > 0


def test_nothing_is_read_beyond_the_last_step() -> None:
    dataset = Numbered()
    ahead = MicroBatches(dataset, steps=3, global_batch_size=4, micro_batch_size=2, data_rank=0, data_size=1, ahead=4)
    for step in range(3):
        list(ahead.read(step))
    ahead.close()
    assert dataset.read == list(range(12))


def test_an_error_while_reading_ahead_reaches_the_caller() -> None:
    class Broken(Numbered):
        def __getitem__(self, index: int) -> TokenSequence:
            if index >= 4:
                raise UserError("bad shard")
            return super().__getitem__(index)

    ahead = MicroBatches(Broken(), steps=2, global_batch_size=4, micro_batch_size=4, data_rank=0, data_size=1)
    assert len(list(ahead.read(0))) == 1
    with pytest.raises(UserError, match="bad shard"):
        list(ahead.read(1))
    ahead.close()


@pytest.mark.parametrize(("micro_batch", "data_size"), [(5, 1), (4, 4), (0, 1)])
def test_a_global_batch_that_the_ranks_cannot_make_is_refused(micro_batch: int, data_size: int) -> None:
    with pytest.raises(UserError, match=r"train\.global_batch_size=24 is not a multiple"):
        layout(24, micro_batch, data_size, step=0)


def test_targets_that_do_not_count() -> None:
    mask = torch.tensor([True, False, False])
    masked = TokenSequence(torch.arange(4), None, None, mask)
    whole = TokenSequence(torch.arange(4, 8), None, None)
    batch = collate([whole, masked])  # a mask may be that of some of a batch
    assert batch.inputs.tolist() == [[4, 5, 6], [0, 1, 2]]
    assert batch.targets.tolist() == [[5, 6, 7], [1, -100, -100]]
    assert batch.counted_targets() == 4
    assert batch.to(torch.device("cpu")).targets.tolist() == batch.targets.tolist()
    assert collate([whole]).loss_mask is None
    assert collate([whole]).counted_targets() == 3
