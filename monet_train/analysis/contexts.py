"""Contexts that were kept for experts: joining those of several workers, and putting them in order.

What is kept for an expert is a set: its strongest tokens, and a random sample of the tokens that it fired at. Both are
told by the scores and hashes of tokens, never by who saw them first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from monet_train.kernels.visits import SLOTS, SLOTS_SAMPLE, SLOTS_STRONG

QUANTILES = 5
STRONGEST = -1  # in the place of a quantile
EMPTY = -1  # place of a slot that holds nothing
FIELDS = ("score", "hash", "place", "contribution", "scores")


@dataclass(frozen=True)
class Contexts:
    """Contexts of N experts, K slots each; what holds nothing has place EMPTY."""

    score: np.ndarray  # fp32 [N, K]
    hash: np.ndarray  # int64 [N, K], the bits of a uint64
    place: np.ndarray  # int64 [N, K], unit * 65536 + position
    contribution: np.ndarray  # fp32 [N, K]
    scores: np.ndarray  # fp16 [N, K, 32], of the tokens around

    def take(self, order: np.ndarray) -> Contexts:
        """The slots of each expert in another order, [N, k]."""
        score, hash_, place, contribution = (np.take_along_axis(getattr(self, name), order, 1) for name in FIELDS[:-1])
        return Contexts(score, hash_, place, contribution, np.take_along_axis(self.scores, order[..., None], 1))

    def slots(self, which: slice) -> Contexts:
        """Some of the slots."""
        return Contexts(*(getattr(self, name)[:, which] for name in FIELDS))

    @classmethod
    def join(cls, parts: Sequence[Contexts]) -> Contexts:
        """The slots of several side by side."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts], 1) for name in FIELDS))


def merge(parts: Sequence[Contexts]) -> tuple[Contexts, Contexts]:
    """The strongest contexts, strongest first, and the sample, by its scores in ascending order.

    Args:
        parts: of each worker, SLOTS slots: the strongest first, then the sample.
    """
    assert all(part.score.shape[1] == SLOTS for part in parts)
    strong = Contexts.join([part.slots(slice(SLOTS_STRONG)) for part in parts])
    sample = Contexts.join([part.slots(slice(SLOTS_STRONG, SLOTS)) for part in parts])
    strong = strong.take(_strongest_first(strong)[:, :SLOTS_STRONG])
    sample = sample.take(_sampled_first(sample)[:, :SLOTS_SAMPLE])
    ascending = np.lexsort((sample.place, _unsigned(sample.hash), sample.score, sample.place == EMPTY))
    return strong, sample.take(ascending)


def quantiles(sample: Contexts) -> np.ndarray:
    """The quantile of each slot of a sample in ascending order, int8 [N, K]: 0 the weakest fifth to 4 the strongest."""
    filled = (sample.place != EMPTY).sum(1, keepdims=True)
    rank = np.arange(sample.place.shape[1])[None]
    return np.minimum(rank * QUANTILES // np.maximum(filled, 1), QUANTILES - 1).astype(np.int8)


def _strongest_first(c: Contexts) -> np.ndarray:
    return np.lexsort((c.place, _unsigned(c.hash), -c.score, c.place == EMPTY))


def _sampled_first(c: Contexts) -> np.ndarray:
    return np.lexsort((c.place, _unsigned(c.hash), c.place == EMPTY))


def _unsigned(hashes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(hashes).view(np.uint64)
