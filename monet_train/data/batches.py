"""Which sequences a rank reads in which step, and reading them ahead of time.

Step ``s`` (from 0) takes sequences ``[s*G, (s+1)*G)``. They are cut into micro-steps first and into ranks
second: micro-step ``j`` of data rank ``r`` of ``D`` holds ``s*G + j*D*b + r*b + [0..b)``. So a micro-step
holds the same sequences on every topology with the same ``D*b``.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch

from monet_train.data.packing import TokenSequence
from monet_train.errors import UserError
from monet_train.model.transformer import IGNORED


class Batch(NamedTuple):
    """``b`` sequences: the fields of :class:`TokenSequence`, stacked."""

    tokens: torch.Tensor  # int64 [b, S+1]
    segment_ids: torch.Tensor | None  # int64 [b, S]
    positions: torch.Tensor | None  # int64 [b, S]
    loss_mask: torch.Tensor | None = None  # bool [b, S]

    @property
    def inputs(self) -> torch.Tensor:
        """int64 [b, S]."""
        return self.tokens[:, :-1]

    @property
    def targets(self) -> torch.Tensor:
        """The token that follows each input, or -100 where it does not count; int64 [b, S]."""
        following = self.tokens[:, 1:]
        return following if self.loss_mask is None else following.masked_fill(~self.loss_mask, IGNORED)

    def counted_targets(self) -> int:
        """How many targets the loss counts."""
        return self.tokens[:, 1:].numel() if self.loss_mask is None else int(self.loss_mask.sum())

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        tokens, *others = (tensor if tensor is None else tensor.to(device, non_blocking=True) for tensor in self)
        assert tokens is not None
        return Batch(tokens, *others)


def micro_steps(global_batch_size: int, micro_batch_size: int, data_size: int) -> int:
    """How many micro-steps make a step.

    Raises:
        UserError: the ranks cannot make the global batch.
    """
    together = micro_batch_size * data_size
    if min(global_batch_size, together) < 1 or global_batch_size % together:
        raise UserError(
            f"train.global_batch_size={global_batch_size} is not a multiple of train.micro_batch_size="
            f"{micro_batch_size} x {data_size} data ranks: nearest valid values "
            f"{max(1, global_batch_size // max(1, together)) * together} and "
            f"{(global_batch_size // max(1, together) + 1) * together}"
        )
    return global_batch_size // together


def indices(
    step: int, micro_step: int, global_batch_size: int, micro_batch_size: int, data_rank: int, data_size: int
) -> range:
    """The sequences of one micro-step on one data rank."""
    first = step * global_batch_size + (micro_step * data_size + data_rank) * micro_batch_size
    return range(first, first + micro_batch_size)


def collate(sequences: list[TokenSequence]) -> Batch:
    """Stack sequences along a new first axis. All have segments (positions) or none has; only some may have a mask."""
    return Batch(
        torch.stack([sequence.tokens for sequence in sequences]),
        _stack([sequence.segment_ids for sequence in sequences]),
        _stack([sequence.positions for sequence in sequences]),
        _stack_masks(sequences),
    )


def _stack(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present) if present else None


def _stack_masks(sequences: list[TokenSequence]) -> torch.Tensor | None:
    if all(sequence.loss_mask is None for sequence in sequences):
        return None
    return torch.stack(
        [
            torch.ones(len(sequence.tokens) - 1, dtype=torch.bool) if sequence.loss_mask is None else sequence.loss_mask
            for sequence in sequences
        ]
    )


class MicroBatches:
    """The micro-batches of a data rank, read ahead by a thread. Steps may be read in any order; the next one is fast.

    ``wait_seconds`` adds up the time that the caller waited for data.
    """

    def __init__(
        self,
        dataset: torch.utils.data.Dataset[TokenSequence],
        *,
        steps: int,
        global_batch_size: int,
        micro_batch_size: int,
        data_rank: int,
        data_size: int,
        ahead: int = 4,
    ) -> None:
        """``steps``: how many there are; ``ahead``: micro-batches read in advance, at most.

        Raises:
            UserError: the ranks cannot make the global batch.
        """
        self.micro_steps = micro_steps(global_batch_size, micro_batch_size, data_size)
        self.wait_seconds = 0.0
        self._dataset = dataset
        self._layout = (global_batch_size, micro_batch_size, data_rank, data_size)
        self._ahead = ahead
        self._end = steps * self.micro_steps
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._queue: deque[tuple[int, Future[Batch]]] = deque()  # (micro-step of the run, its batch)

    def read(self, step: int) -> Iterator[Batch]:
        """The micro-batches of ``step``, in order."""
        for number in range(step * self.micro_steps, (step + 1) * self.micro_steps):
            yield self._take(number)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._queue.clear()

    def _take(self, number: int) -> Batch:
        started = time.perf_counter()
        if self._queue and self._queue[0][0] != number:
            for _, future in self._queue:
                future.cancel()
            self._queue.clear()
        following = self._queue[-1][0] + 1 if self._queue else number
        for later in range(following, min(number + self._ahead + 1, self._end)):
            self._queue.append((later, self._thread.submit(self._read, later)))
        batch = self._queue.popleft()[1].result()
        self.wait_seconds += time.perf_counter() - started
        return batch

    def _read(self, number: int) -> Batch:
        step, micro_step = divmod(number, self.micro_steps)
        return collate([self._dataset[i] for i in indices(step, micro_step, *self._layout)])
