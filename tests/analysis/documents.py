"""Simulated documents: uneven lengths, experts that fire in bursts, labels that some experts care for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from monet_train.analysis.statistics import LabelSums


@dataclass(frozen=True)
class Documents:
    """A sample of documents, as the collection of an atlas sees it."""

    lengths: np.ndarray  # [D] tokens
    labels: np.ndarray  # [D] number of the value
    halves: np.ndarray  # [D]
    scores: np.ndarray  # [D, N] sum of the expert's scores over the document's tokens
    firings: np.ndarray  # [D, N]
    planted: np.ndarray  # [N] the value that the expert cares for, -1: none

    @property
    def values(self) -> int:
        return int(self.labels.max()) + 1

    def sums(self, labels: np.ndarray | None = None) -> LabelSums:
        """The sums by label, or by other labels of the documents."""
        labels = self.labels if labels is None else labels
        cell = self.halves * self.values + labels
        member = np.zeros((2 * self.values, len(cell)))
        member[cell, np.arange(len(cell))] = 1

        def by_cell(numbers: np.ndarray) -> np.ndarray:
            return (member @ numbers).reshape(2, self.values, *numbers.shape[1:])

        n = self.lengths.astype(np.float64)
        return LabelSums(
            total=by_cell(self.scores),
            square=by_cell(self.scores**2),
            cross=by_cell(self.scores * n[:, None]),
            firings=by_cell(self.firings).sum(0).astype(np.int64),
            documents=by_cell(np.ones(len(n))).astype(np.int64),
            tokens=by_cell(n),
            token_square=by_cell(n**2),
        )

    def shufflings(self, number: int, seed: int = 0) -> list[LabelSums]:
        """The sums with the labels shuffled over documents."""
        random = np.random.default_rng(seed)
        return [self.sums(random.permutation(self.labels)) for _ in range(number)]


def simulate(
    seed: int,
    values: int = 8,
    per_value: int = 25,
    experts: int = 2000,
    planted: int = 0,
    length_spread: float = 1.2,
    bursts: bool = True,
) -> Documents:
    """Draw documents.

    An expert fires at a token with a rate of its own (log-normal over experts). With ``bursts`` it does so in a share
    of the documents only, from 0.3% to all of them, where its rate is a heavy-tailed draw per document. Scores are
    exponential per firing, so that a sum over k firings is a gamma variable of shape k. Planted experts fire 30 times
    as often in their value; they occur in at least three tenths of its documents.

    Args:
        length_spread: standard deviation of the logarithm of the documents' lengths (median 400 tokens). At 2 the
            longest of 25 documents has about half of their tokens.
    """
    random = np.random.default_rng(seed)
    number = values * per_value
    lengths = np.exp(random.normal(np.log(400), length_spread, number)).clip(20, 200_000).astype(np.int64)
    labels = random.permutation(np.repeat(np.arange(values), per_value))
    care = np.where(np.arange(experts) < planted, random.integers(0, values, experts), -1)
    rates = np.exp(random.normal(np.log(2e-3), 1.2, experts))
    if bursts:
        share = np.exp(random.uniform(np.log(0.003), 0, experts))
        share[care >= 0] = random.uniform(0.3, 1, planted)
        active = random.random((number, experts)) < share
        heavy = random.gamma(0.7, 1 / 0.7, (number, experts)) * np.exp(random.normal(0, 1, (number, experts)))
        rates = rates / share * active * heavy
    rates = rates * np.where(labels[:, None] == care, 30, 1)
    firings = random.binomial(lengths[:, None], np.minimum(rates, 0.9))
    return Documents(
        lengths=lengths,
        labels=labels,
        halves=random.integers(0, 2, number),
        scores=np.where(firings > 0, random.gamma(np.maximum(firings, 1)), 0.0),
        firings=firings,
        planted=care,
    )
