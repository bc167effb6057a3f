"""Which experts belong to a label: the paper's rule with what chance would give, and rules that choose experts to edit.

A rule says which experts may be chosen. The order among them is the same for all rules: most of the label's own routing
mass for least of the others', so that a budget takes first what removes most knowledge and does least damage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from monet_train.analysis.statistics import (
    Booleans,
    Floats,
    Integers,
    LabelMeans,
    LabelSums,
    blocks,
    others,
    p_values,
    q_values,
)

NONE = -1  # an expert that belongs to no label
PAPER_RATIO = 2.0

CHANCE_EXPERTS = 20_000  # imaginary ones
MOST_SIGHTINGS = 4096
UNEVENNESS = 1.0  # of their sightings; agrees with shuffled labels within a third, tests/analysis/test_rules.py


@dataclass(frozen=True)
class Support:
    """What an expert needs before a rule looks at it, over all values, so that no label is favoured."""

    firings: int = 1
    documents: float = 1.0  # effective documents, see LabelMeans.spread

    def has(self, means: LabelMeans) -> Booleans:
        """Which experts have it: [N]."""
        return (means.firings.sum(0) >= self.firings) & (means.spread >= self.documents)


ANY = Support()


@dataclass(frozen=True, eq=False)
class Labelling:
    """The paper's rule on one half of the documents, with what the other half and chance say."""

    label: Integers  # [N] the value's number, by the half to choose by; NONE: no label, or no support
    replicated: Booleans  # [N] has a label, and the other half gives the same
    firings: Integers  # [N] over all values and both halves
    spread: Floats  # [N] effective documents in the half to choose by
    labelled_by_chance: float  # experts that would have a label if documents had theirs by accident
    replicated_by_chance: float  # and the same one in the other half

    @property
    def labelled(self) -> int:
        return int((self.label != NONE).sum())

    def per_value(self, values: int) -> Integers:
        """Experts of each value: [V]."""
        return np.bincount(self.label[self.label != NONE], minlength=values)


def paper_rule(mean: Floats, ratio: float = PAPER_RATIO) -> Integers:
    """The label of each expert by the rule of the Monet paper (section 5.1), [N]; NONE if there is none.

    An expert belongs to a label if its mean score there is at least twice the second-highest. The paper states neither
    a support nor a control: an expert that was seen once always has a label. See :func:`label_experts`.

    Args:
        mean: [V, N] scores per token.
        ratio: to the second-highest.
    """
    label = np.full(mean.shape[1], NONE)
    for block in blocks(*mean.shape):
        second, first = np.partition(mean[:, block], -2, axis=0)[-2:]
        label[block] = np.where((first > 0) & (first >= ratio * second), mean[:, block].argmax(0), NONE)
    return label


def label_experts(sums: LabelSums, ratio: float = PAPER_RATIO, support: Support = ANY, seed: int = 0) -> Labelling:
    """The paper's rule on half 0, whether half 1 agrees, and how much of that chance would give.

    Args:
        support: asked for in half 0; experts without it have no label.
        seed: of the simulation of chance, see :func:`chance_table`.
    """
    chosen, other = sums.half(0), sums.half(1)
    supported = support.has(chosen)
    label = np.where(supported, paper_rule(chosen.mean, ratio), NONE)
    replicated = (label != NONE) & (label == paper_rule(other.mean, ratio))
    chance, again = (_chance_of(half, supported, ratio, seed + number) for number, half in enumerate((chosen, other)))
    return Labelling(
        label=label,
        replicated=replicated,
        firings=sums.firings.sum(0),
        spread=chosen.spread,
        labelled_by_chance=float(chance.sum()),
        replicated_by_chance=float((chance * again).sum()),
    )


def label_by_chance(
    tokens: Floats, sightings: Integers, unevenness: float, ratio: float = PAPER_RATIO, seed: int = 0
) -> tuple[Floats, Integers]:
    """The paper's rule on imaginary experts whose sightings fall on values by accident.

    Each sighting is in a value with the probability of its share of tokens. If all weigh the same, and with 14 values
    of equal size, the rule labels every expert seen once, 49% of those seen 5 times, 8% of those seen 20 times.

    Args:
        tokens: [V].
        sightings: [X] of each imaginary expert.
        unevenness: standard deviation of the logarithm of a sighting's weight; 0: all weigh the same.

    Returns:
        [X] effective sightings, (sum of weights)^2 / sum of weights^2, and [X] the label, or NONE.
    """
    random = np.random.default_rng(seed)
    present = np.flatnonzero(tokens > 0)
    ends = (tokens[present] / tokens[present].sum()).cumsum()
    expert = np.repeat(np.arange(len(sightings)), sightings)
    weight = np.exp(unevenness * random.standard_normal(len(expert), dtype=np.float32))
    value = np.minimum(np.searchsorted(ends, random.random(len(expert))), len(present) - 1)
    cell = expert * len(present) + value
    scores = np.bincount(cell, weight, len(sightings) * len(present)).reshape(len(sightings), -1).T
    effective = scores.sum(0) ** 2 / np.bincount(expert, weight.astype(np.float64) ** 2, len(sightings))
    label = paper_rule(scores / tokens[present, None], ratio)
    return effective, np.where(label == NONE, NONE, present[label])


def chance_table(tokens: Floats, ratio: float = PAPER_RATIO, seed: int = 0) -> tuple[Floats, Floats]:
    """How often the paper's rule gives each value by accident, by effective sightings.

    Returns:
        centres [K] of ranges of effective sightings, and shares [K, V] of the imaginary experts in each.
    """
    sightings = np.geomspace(1, MOST_SIGHTINGS, CHANCE_EXPERTS).astype(np.int64)
    effective, label = label_by_chance(tokens, sightings, UNEVENNESS, ratio, seed)
    place = np.round(2 * np.log2(effective)).astype(np.int64)
    table = np.zeros((place.max() + 1, len(tokens) + 1))
    np.add.at(table, (place, label), 1)  # NONE, -1, is the last column
    seen = np.flatnonzero(table.sum(1))
    return 2 ** (seen / 2), table[seen, :-1] / table[seen].sum(1, keepdims=True)


def removal_order(means: LabelMeans, value: int) -> tuple[Floats, Floats, Floats]:
    """How good an expert is for removing a value's knowledge, and the routing masses that say so.

    Returns:
        score [N]: own / (rest + 1 / (100 N)). The addend, a hundredth of an average expert's mass, keeps experts that
            hardly ever fire from going first with 0 / 0: they lose little, and nothing is gained by them.
        own [N]: share of the value's scores that are the expert's, summing to 1 over experts.
        rest [N]: the mean of that share over the other values that have scores.
    """
    masses = means.mean.sum(1)
    weights = np.divide(1, masses, out=np.zeros(means.values), where=masses > 0)
    own = weights[value] * means.mean[value]
    weights[value] = 0
    rest = weights @ means.mean / max(1, np.count_nonzero(weights))
    return own / (rest + 0.01 / means.experts), own, rest


@dataclass(frozen=True, eq=False)
class Selection:
    """Chosen experts, best first. Equal ones are ordered by their numbers.

    ``own.cumsum()`` and ``others.cumsum()`` are the routing mass of the label, and of the other labels on average, that
    the first so many experts carry: what a search for the largest set within a budget goes along.
    """

    experts: Integers  # [n] flat numbers
    scores: Floats  # [n] of removal_order
    own: Floats  # [n] share of the label's routing mass
    others: Floats  # [n] share of the other labels' routing mass, on average


Rule = Callable[[LabelMeans, int, float], Booleans]


def by_paper(means: LabelMeans, value: int, threshold: float) -> Booleans:
    """The paper's rule: mean score at least ``threshold`` times the second-highest."""
    return paper_rule(means.mean, threshold) == value


def by_fdr(means: LabelMeans, value: int, threshold: float) -> Booleans:
    """A false discovery rate of at most ``threshold``, Benjamini-Hochberg over all experts and values."""
    return q_values(p_values(means))[value] <= threshold


def by_ratio(means: LabelMeans, value: int, threshold: float) -> Booleans:
    """Mean score at least ``threshold`` times the mean of the others."""
    own = means.mean[value]
    return (own > 0) & (own >= threshold * others(means, value))


def by_top(means: LabelMeans, value: int, threshold: float) -> Booleans:
    """Every expert whose score of :func:`removal_order` is at least ``threshold``; the budget decides."""
    return (means.mean[value] > 0) & (removal_order(means, value)[0] >= threshold)


RULES: dict[str, Rule] = {"paper": by_paper, "fdr": by_fdr, "ratio": by_ratio, "top": by_top}
THRESHOLDS = {"paper": PAPER_RATIO, "fdr": 0.05, "ratio": 4.0, "top": 1.0}  # used where none is given


def select(
    means: LabelMeans,
    value: int,
    rule: str,
    threshold: float | None = None,
    budget: float | None = None,
    support: Support = ANY,
) -> Selection:
    """Experts of a label, best first.

    Args:
        means: of the documents to choose by: ``LabelSums.half(0)``, or ``joined()`` if nothing is to be replicated.
        value: number of the label's value.
        rule: of RULES.
        threshold: what it means is the rule's; None: that of THRESHOLDS.
        budget: at most this share of all experts; None: all that pass.
        support: what an expert needs besides.
    """
    threshold = THRESHOLDS[rule] if threshold is None else threshold
    passing = np.flatnonzero(RULES[rule](means, value, threshold) & support.has(means))
    scores, own, rest = removal_order(means, value)
    best = passing[np.argsort(-scores[passing], kind="stable")]
    if budget is not None:
        best = best[: int(budget * means.experts + 1e-9)]
    return Selection(best, scores[best], own[best], rest[best])


def _chance_of(means: LabelMeans, supported: Booleans, ratio: float, seed: int) -> Floats:
    """The probability that chance gives each value to each expert: [V, N]; 0 without support."""
    if np.count_nonzero(means.tokens) < 2:
        return np.zeros(means.mean.shape)
    centres, table = chance_table(means.tokens, ratio, seed)
    seen = means.sightings()
    at = partial(np.interp, np.log(np.maximum(seen, 1)), np.log(centres))
    return np.where(supported & (seen > 0), np.stack([at(column) for column in table.T]), 0.0)
