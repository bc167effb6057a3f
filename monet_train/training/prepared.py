"""A run that has been checked and whose choices are made: what the parts of a training are built from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from monet_train.config.schema import TrainConfig
from monet_train.data.batches import MicroBatches
from monet_train.data.corpus import Corpus
from monet_train.data.packing import TokenSequence
from monet_train.kernels import Kernels
from monet_train.parallel.groups import Topology
from monet_train.parallel.launch import Launch


@dataclass(frozen=True)
class Prepared:
    """What :func:`monet_train.training.preflight.preflight` found and chose, the same on every rank."""

    config: TrainConfig
    launch: Launch
    device: torch.device
    topology: Topology
    kernels: Kernels
    folder: Path  # of the run, which this process group has locked
    steps: int  # optimizer steps of the whole run
    corpus: Corpus
    resume: Path | None  # the checkpoint to continue from
    identity: dict[str, dict[str, Any]]  # what a run that resumes must share, by section and key
    changed: dict[str, list[Any]]  # values that differ from those of the checkpoint's run, by key: [before, now]

    @property
    def micro_step_sequences(self) -> int:
        """Sequences of a micro-step, over all data-parallel ranks."""
        return self.topology.data_size * self.config.train.micro_batch_size

    def training_batches(self) -> MicroBatches:
        """The micro-batches of this rank, read one step ahead."""
        sequences = self.config.train.global_batch_size
        ahead = sequences // self.micro_step_sequences
        return self._batches(self.corpus.train, sequences, steps=self.steps, ahead=ahead)

    def held_out_batches(self) -> MicroBatches | None:
        """Up to ``eval.sequences`` held-out sequences as one step, in whole micro-steps; None where there are none."""
        if self.corpus.valid is None:
            return None
        wanted = min(self.config.eval.sequences, len(self.corpus.valid))
        sequences = max(1, wanted // self.micro_step_sequences) * self.micro_step_sequences
        return self._batches(self.corpus.valid, sequences, steps=1, ahead=4)

    def _batches(
        self, dataset: torch.utils.data.Dataset[TokenSequence], sequences: int, *, steps: int, ahead: int
    ) -> MicroBatches:
        return MicroBatches(
            dataset,
            steps=steps,
            global_batch_size=sequences,
            micro_batch_size=self.config.train.micro_batch_size,
            data_rank=self.topology.data_rank,
            data_size=self.topology.data_size,
            ahead=ahead,
        )
