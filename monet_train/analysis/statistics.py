"""What the sums of an atlas say about experts and labels: means, p-values that respect documents, selectivity.

Everything here is a function of arrays. V is the number of values of a label column (``de``, ``fr``, ...), N the number
of experts of a routing group: all E * E pairs, or its 2E half-experts. Work goes block by block over experts, so that
beside its result a function needs a few megabytes, whatever N is.

Tokens of one document resemble each other, so that documents are the independent draws, not tokens. A mean score is a
ratio of two sums over documents, of scores and of tokens, and its standard error is that of the ratio estimator
(Cochran, Sampling Techniques, 1977, section 6.4).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import xlogy
from scipy.stats import false_discovery_control

Floats = NDArray[np.floating]
Integers = NDArray[np.integer]
Booleans = NDArray[np.bool_]

BLOCK = 1 << 18  # numbers per temporary array


def blocks(values: int, experts: int) -> Iterator[slice]:
    """Ranges of experts, so that an array of values x experts of a range has about BLOCK numbers."""
    step = max(1, BLOCK // max(1, values))
    for start in range(0, experts, step):
        yield slice(start, min(start + step, experts))


@dataclass(frozen=True, eq=False)
class LabelSums:
    """The sums of a label column, for two halves of the documents: 0 to choose by, 1 to see whether it holds there.

    For a document d with n_d tokens, S_d is the sum of an expert's scores over them.
    """

    total: Floats  # [2, V, N] sum of S_d
    square: Floats  # [2, V, N] sum of S_d^2
    cross: Floats  # [2, V, N] sum of S_d n_d
    firings: Integers  # [V, N] tokens with a score above 0, of both halves
    documents: Integers  # [2, V]
    tokens: Floats | Integers  # [2, V] sum of n_d
    token_square: Floats | Integers  # [2, V] sum of n_d^2

    def __post_init__(self) -> None:
        values, experts = self.firings.shape
        if values < 2:
            raise ValueError(f"a label column with {values} value says nothing about experts: at least 2 are needed")
        for name in ("total", "square", "cross"):
            _check_shape(name, getattr(self, name), (2, values, experts))
        for name in ("documents", "tokens", "token_square"):
            _check_shape(name, getattr(self, name), (2, values))

    def half(self, number: int) -> LabelMeans:
        """Mean scores by the documents of one half: 0 to choose by, 1 to replicate."""
        return self._means(slice(number, number + 1))

    def joined(self) -> LabelMeans:
        """Mean scores by all documents."""
        return self._means(slice(0, 2))

    def _means(self, halves: slice) -> LabelMeans:
        documents, tokens, token_square = (
            each[halves].sum(0, dtype=np.float64) for each in (self.documents, self.tokens, self.token_square)
        )
        values, experts = self.firings.shape
        mean, error = np.empty((values, experts)), np.empty((values, experts), np.float32)
        scatter, spread = np.empty(experts), np.empty(experts)
        for block in blocks(values, experts):
            total, square, cross = (
                each[halves, :, block].sum(0, dtype=np.float64) for each in (self.total, self.square, self.cross)
            )
            mean[:, block] = _ratio(total, tokens[:, None])
            residual = _residual(mean[:, block], square, cross, token_square[:, None])
            error[:, block] = _standard_error(residual, documents[:, None], tokens[:, None])
            overall = total.sum(0) / max(tokens.sum(), 1)
            scatter[block] = _residual(overall, square.sum(0), cross.sum(0), token_square.sum())
            spread[block] = _ratio(total.sum(0) ** 2, square.sum(0))
        return LabelMeans(mean, error, scatter, spread, self.firings, documents, tokens)


@dataclass(frozen=True, eq=False)
class LabelMeans:
    """Mean scores by label, over one sample of documents."""

    mean: Floats  # [V, N] per token; 0 where the value has no tokens
    standard_error: Floats  # [V, N] of the mean, over documents; infinite with fewer than 2 of them
    scatter: Floats  # [N] sum over all documents of (S_d - M n_d)^2, M being the mean over all values
    # (sum of S_d)^2 / sum of S_d^2 over all documents, [N]: the effective documents of an expert. One that fires evenly
    # in k documents has k, one that fires almost only in one document has 1, one that never fires has 0.
    spread: Floats
    firings: Integers  # [V, N] of both halves
    documents: Floats  # [V]
    tokens: Floats  # [V]

    @property
    def values(self) -> int:
        return self.mean.shape[0]

    @property
    def experts(self) -> int:
        return self.mean.shape[1]

    def sightings(self) -> Floats:
        """How many independent sightings of equal weight would scatter over documents as much as the scores do: [N].

        (sum of S_d)^2 / scatter: about ``spread`` for an expert that fires in few documents, and more than there are
        documents for one that fires at every other token. At least 1; 0 for an expert that never fires.
        """
        total = self.tokens @ self.mean
        seen = np.divide(total**2, self.scatter, out=np.full(self.experts, np.inf), where=self.scatter > 0)
        return np.where(total > 0, np.maximum(seen, 1.0), 0.0)


def others(means: LabelMeans, value: int) -> Floats:
    """The mean score in the other values that have tokens, each of which counts the same: [N]."""
    weights = (means.tokens > 0).astype(np.float64)
    weights[value] = 0
    return weights @ means.mean / max(weights.sum(), 1)


def p_values(means: LabelMeans) -> Floats:
    """Whether an expert gives a value more than its share of the tokens: one-sided p, [V, N].

    The null hypothesis is that documents have their labels by accident: that a shuffled column would do as well. The
    excess over the mean score M of all documents is a sum of c_d = S_d - M n_d over those documents d that have the
    value. If a share pi of the documents has it, then whatever the scores and lengths are

        P(excess >= x) <= exp(-x^2 / (2 s sum of c_d^2)),    s = (1 - 2 pi) / (2 log((1 - pi) / pi))

    where the sum is over all documents: each label is a Bernoulli variable, and s is the least variance of a normal one
    whose tail holds for it (Kearns and Saul, Large deviation methods for approximate probabilistic inference, 1998).
    The right side is the p-value given here.

    So a long document or a burst cannot feign significance, and an expert that fires in one document cannot have any;
    one that fires in k documents, all of the same of 8 values, has about exp(-2 k). What a t-test over documents lacks
    (few or uneven documents, scores that are mostly 0) needs no correction. The price is power against weak effects: at
    8 values of equal size it takes 1.33 times the deviation that a normal distribution asks for.

    Two things it does not know: documents that resemble each other (of one author, say) count as independent, and an
    expert whose scores scatter in one value far more than elsewhere may pass there without a higher mean.
    """
    documents, tokens = means.documents, means.tokens[:, None]
    proxy = _bernoulli_proxy(_ratio(documents, documents.sum()))[:, None]
    result = np.empty((means.values, means.experts))
    for block in blocks(means.values, means.experts):
        total = means.mean[:, block] * tokens
        excess = total - tokens * (total.sum(0) / tokens.sum())
        exponent = _ratio(np.maximum(excess, 0) ** 2, 2 * proxy * means.scatter[block])
        result[:, block] = np.exp(-exponent)
    return result


def q_values(p: Floats) -> Floats:
    """Benjamini-Hochberg over all experts and values of a column: the false discovery rate at which each passes.

    Args:
        p: [V, N], of :func:`p_values`.
    """
    return false_discovery_control(p, axis=None, method="bh").reshape(p.shape)


def selectivity(means: LabelMeans) -> Floats:
    """1 - H(q) / log C, q being the mean scores over the C values that have tokens, normalised: [N].

    0 for a generalist, 1 for an expert of one value alone, NaN for one without any score. Descriptive: an expert that
    was seen once has 1 by chance.
    """
    result = np.empty(means.experts)
    largest = np.log(np.count_nonzero(means.tokens)) or np.nan
    for block in blocks(means.values, means.experts):
        mean = means.mean[:, block]
        total = mean.sum(0)
        q = mean / np.where(total > 0, total, np.nan)
        result[block] = 1 + xlogy(q, q).sum(0) / largest
    return result


def mutual_information(firings: Integers, tokens: Floats | Integers) -> Floats:
    """What it tells about the label of a token that an expert fires there, in bits: [N].

    Descriptive: tokens of one document are not independent, so that it has no p-value here. Compare it with
    :func:`information_by_chance`.

    Args:
        firings: [V, N] tokens at which the expert fires.
        tokens: [V] all tokens, of the same documents.
    """
    label = np.asarray(tokens, np.float64)[:, None]
    everything = label.sum()
    result = np.empty(firings.shape[1])
    for block in blocks(*firings.shape):
        fires = firings[:, block].astype(np.float64)
        result[block] = _information(fires, label, everything) + _information(label - fires, label, everything)
    return np.maximum(result, 0.0)  # rounding


def information_by_chance(firings: Integers, means: LabelMeans) -> Floats:
    """The mutual information to expect if documents had their labels by accident, in bits: [N].

    With independent tokens it is (V - 1) / (2 n ln 2) for n tokens (Miller, Note on the bias of information estimates,
    1955). Firings come in bursts, which takes it times the firings per independent sighting: right to a factor of 3.

    Args:
        firings: as of :func:`mutual_information`.
        means: by the same documents: ``LabelSums.joined()``.
    """
    burst = np.maximum(_ratio(firings.sum(0, dtype=np.float64), means.sightings()), 1.0)
    return burst * (np.count_nonzero(means.tokens) - 1) / (2 * np.log(2) * means.tokens.sum())


def jaccard(members: Booleans) -> Floats:
    """How far sets of experts overlap: shared / all of each two sets, [sets, sets]; 0 for two empty ones.

    Args:
        members: [sets, N].
    """
    shared, sizes = np.zeros((len(members),) * 2), members.sum(1, dtype=np.float64)
    for block in blocks(*members.shape):
        part = members[:, block].astype(np.float64)
        shared += part @ part.T
    return _ratio(shared, sizes[:, None] + sizes - shared)


def _bernoulli_proxy(share: Floats) -> Floats:
    """The variance of a normal variable whose tail bounds that of Bernoulli(share): at most 1/4; 0 at 0 and 1."""
    proxy = np.zeros(share.shape)
    even = np.abs(share - 0.5) < 1e-6
    uneven = (share > 0) & (share < 1) & ~even
    pi = share[uneven]
    proxy[uneven] = (1 - 2 * pi) / (2 * np.log((1 - pi) / pi))
    proxy[even] = 0.25
    return proxy


def _residual(mean: Floats, square: Floats, cross: Floats, token_square: Floats) -> Floats:
    """Sum over documents of (S_d - mean n_d)^2."""
    return np.maximum(square - 2 * mean * cross + mean**2 * token_square, 0)


def _standard_error(residual: Floats, documents: Floats, tokens: Floats) -> Floats:
    """Of a ratio estimator: the root of the residuals / tokens^2, times D / (D - 1)."""
    correction = np.divide(documents, documents - 1, out=np.full(documents.shape, np.inf), where=documents > 1)
    variance = np.multiply(
        _ratio(residual, tokens**2), correction, out=np.full(residual.shape, np.inf), where=documents > 1
    )
    return np.sqrt(variance)


def _information(part: Floats, label: Floats, everything: float) -> Floats:
    """The share of one outcome (fires, or does not) in the mutual information with the label, in bits: [N]."""
    margin = part.sum(0)
    return xlogy(part / everything, _ratio(part * everything, margin * label)).sum(0) / np.log(2)


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Numerator / denominator, and 0 where the denominator is."""
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    return np.divide(numerator, denominator, out=np.zeros(numerator.shape), where=denominator != 0)


def _check_shape(name: str, array: NDArray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} has the shape {array.shape} and not {shape}")
