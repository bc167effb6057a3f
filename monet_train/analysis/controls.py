"""What a result is held against: random sets of experts, and bootstrap intervals over documents."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from monet_train.analysis.statistics import Floats, Integers

RESAMPLES = 1000
BLOCK = 1 << 22  # resampled documents at a time


@dataclass(frozen=True, eq=False)
class RandomSet:
    """Experts drawn uniformly from all of a routing group, as a control for a set that was chosen."""

    experts: Integers  # [n] ascending
    mass: float  # share of the target's routing mass that they carry
    overlap: float  # share of the chosen set that is among them


def matched_in_count(chosen: Integers, mass: Floats, sets: int = 20, seed: int = 0) -> list[RandomSet]:
    """Random sets of as many experts as were chosen.

    Args:
        chosen: [n] flat numbers.
        mass: [N] each expert's share of the routing mass on the target label (``own`` of ``removal_order``).
        sets: how many. A set depends on its number and the seed alone, not on how many there are.
    """
    return [_random_set(order[: len(chosen)], chosen, mass) for order in _orders(len(mass), sets, seed)]


def matched_in_mass(chosen: Integers, mass: Floats, sets: int = 20, seed: int = 0) -> list[RandomSet]:
    """Random sets that carry as much of the target's routing mass as the chosen ones.

    Experts are drawn one by one until the mass is reached, so that a set carries the mass of its last expert more, at
    most. It is much larger than the chosen set, and may contain some of it: see ``overlap``.

    Args: as of :func:`matched_in_count`.
    """
    target = mass[chosen].sum() * (1 - 1e-9)  # the same numbers, added in another order
    found = []
    for order in _orders(len(mass), sets, seed):
        needed = np.searchsorted(mass[order].cumsum(), target) + 1 if target > 0 else 0
        found.append(_random_set(order[:needed], chosen, mass))
    return found


@dataclass(frozen=True, eq=False)
class Interval:
    """Means and their percentile intervals, an entry per series."""

    mean: Floats
    low: Floats
    high: Floats


def bootstrap_mean(
    sums: Floats,
    counts: Floats | Integers,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """The mean over tokens, sum of sums / sum of counts, with a percentile interval over documents.

    Documents are drawn with replacement, and all series share the draws, so that the interval of a difference is had by
    giving the difference as the series. (``scipy.stats.bootstrap`` takes no ratio of two sums without a copy of the
    documents per series and resample.)

    Args:
        sums: [..., D] of each document, for any number of series: losses in nats, say, or their change.
        counts: [D] tokens of each document.
        confidence: of the interval.
        resamples: how often documents are drawn.
    """
    documents = len(counts)
    if documents == 0 or sums.shape[-1] != documents:
        raise ValueError(f"{sums.shape[-1]} sums for {documents} documents")
    series = np.concatenate([sums.reshape(-1, documents), np.asarray(counts, np.float64)[None]])
    random = np.random.default_rng(seed)
    drawn = np.empty((len(series), resamples))
    step = max(1, BLOCK // documents)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        drawn[:, start : start + size] = series @ _multiplicities(random, documents, size).T
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn[:-1] / drawn[-1], [tail, 1 - tail], axis=1)
    mean = series[:-1].sum(1) / series[-1].sum()
    return Interval(*(each.reshape(sums.shape[:-1]) for each in (mean, low, high)))


def _multiplicities(random: np.random.Generator, documents: int, resamples: int) -> Floats:
    """How often each document is in each resample: [resamples, D]."""
    drawn = random.integers(documents, size=(resamples, documents)) + documents * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * documents).reshape(resamples, documents).astype(np.float64)


def _orders(experts: int, sets: int, seed: int) -> list[Integers]:
    """An order of all experts for each set."""
    return [np.random.default_rng([seed, number]).permutation(experts) for number in range(sets)]


def _random_set(drawn: Integers, chosen: Integers, mass: Floats) -> RandomSet:
    overlap = np.isin(chosen, drawn).mean() if len(chosen) else 0.0
    return RandomSet(np.sort(drawn), float(mass[drawn].sum()), float(overlap))
