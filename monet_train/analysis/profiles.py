"""How many experts belong to each label: the paper's rule, a false discovery rate, and chance beside both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from monet_train.analysis.rules import Support, label_experts
from monet_train.analysis.statistics import (
    LabelSums,
    information_by_chance,
    mutual_information,
    p_values,
    q_values,
    selectivity,
)


@dataclass(frozen=True)
class ValueProfile:
    """The experts of one value of a label."""

    value: str
    documents: int
    tokens: int
    labelled: int  # by the paper's rule on half 0
    replicated: int  # of these, labelled the same on half 1
    significant: int  # at the false discovery rate, over all documents


@dataclass(frozen=True)
class GroupProfile:
    """The experts of a routing group by one label."""

    group: int
    experts: int
    supported: int
    labelled: int
    labelled_by_chance: float
    replicated: int
    replicated_by_chance: float
    significant: int  # for at least one value
    selectivity: float  # mean over experts with support
    information: float  # of firing and label in bits, mean over experts with support
    information_by_chance: float
    values: list[ValueProfile]


def profile(
    sums: Sequence[LabelSums],
    groups: Sequence[int],
    values: Sequence[str],
    ratio: float,
    support: Support,
    fdr: float,
) -> list[GroupProfile]:
    """The profile of every routing group.

    Args:
        sums: of each group. values: of the label. ratio: of the paper's rule.
        support: what an expert needs for the paper's rule and for the means.
        fdr: false discovery rate, Benjamini-Hochberg over the experts and values of a group.
    """
    return [_of_group(one, group, values, ratio, support, fdr) for one, group in zip(sums, groups, strict=True)]


def _of_group(
    sums: LabelSums, group: int, values: Sequence[str], ratio: float, support: Support, fdr: float
) -> GroupProfile:
    labelling, means = label_experts(sums, ratio, support), sums.joined()
    supported = support.has(means)
    significant = q_values(p_values(means)) <= fdr
    tokens = sums.tokens.sum(0)
    labelled = labelling.per_value(len(values))
    replicated = np.bincount(labelling.label[labelling.replicated], minlength=len(values))
    information = mutual_information(sums.firings, tokens)

    def mean(numbers: np.ndarray) -> float:
        return float(numbers[supported].mean()) if supported.any() else float("nan")

    return GroupProfile(
        group=group,
        experts=means.experts,
        supported=int(supported.sum()),
        labelled=labelling.labelled,
        labelled_by_chance=labelling.labelled_by_chance,
        replicated=int(labelling.replicated.sum()),
        replicated_by_chance=labelling.replicated_by_chance,
        significant=int(significant.any(0).sum()),
        selectivity=mean(selectivity(means)),
        information=mean(information),
        information_by_chance=mean(information_by_chance(sums.firings, means)),
        values=[
            ValueProfile(
                value=value,
                documents=int(sums.documents[:, number].sum()),
                tokens=int(tokens[number]),
                labelled=int(labelled[number]),
                replicated=int(replicated[number]),
                significant=int(significant[number].sum()),
            )
            for number, value in enumerate(values)
        ],
    )
