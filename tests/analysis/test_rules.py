"""Rules: which experts belong to a label, what chance gives, and which are chosen first."""

from __future__ import annotations

import numpy as np
import pytest

from monet_train.analysis.rules import (
    NONE,
    RULES,
    Support,
    label_by_chance,
    label_experts,
    paper_rule,
    removal_order,
    select,
)
from monet_train.analysis.statistics import LabelMeans
from tests.analysis.documents import simulate


def means_of(mean: list[list[float]]) -> LabelMeans:
    """Means alone, of as many tokens each."""
    array = np.array(mean)
    values, experts = array.shape
    return LabelMeans(
        mean=array,
        standard_error=np.ones(array.shape),
        scatter=np.ones(experts),
        spread=np.full(experts, 10.0),
        firings=np.full(array.shape, 10),
        documents=np.full(values, 10.0),
        tokens=np.full(values, 100.0),
    )


def test_the_papers_rule() -> None:
    mean = np.array([[2, 1.9, 0, 0, 3], [1, 1, 0, 5, 3], [0.5, 0, 0, 0, 1]])
    assert paper_rule(mean).tolist() == [0, NONE, NONE, 1, NONE]
    assert paper_rule(mean, 1.9).tolist() == [0, 0, NONE, 1, NONE]


@pytest.mark.parametrize(("seen", "share"), [(1, 1.0), (5, 0.49), (20, 0.08)])
def test_what_chance_gives_with_fourteen_values(seen: int, share: float) -> None:
    effective, label = label_by_chance(np.full(14, 1000.0), np.full(20_000, seen), unevenness=0)
    np.testing.assert_allclose(effective, seen)
    assert (label != NONE).mean() == pytest.approx(share, abs=0.015)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("per_value", "length_spread", "bursts"), [(25, 1.2, True), (200, 0.5, True), (25, 0.5, False)]
)
def test_chance_is_what_shuffled_labels_give(per_value: int, length_spread: float, bursts: bool) -> None:
    documents = simulate(3, per_value=per_value, length_spread=length_spread, bursts=bursts)
    found = [label_experts(each) for each in documents.shufflings(3)]
    actual = np.mean([each.labelled for each in found])
    assert np.mean([each.labelled_by_chance for each in found]) == pytest.approx(actual, rel=1 / 3)
    replicated = np.mean([each.replicated.sum() for each in found])
    assert np.mean([each.replicated_by_chance for each in found]) == pytest.approx(replicated, rel=1 / 3, abs=3)


def test_planted_experts_replicate_and_support_removes_chance() -> None:
    documents = simulate(4, per_value=100, length_spread=0.5, planted=100)
    sums, planted = documents.sums(), documents.planted
    found = label_experts(sums)
    assert (found.replicated & (found.label == planted))[:100].mean() >= 0.9
    assert found.replicated.sum() > 2 * found.replicated_by_chance
    supported = label_experts(sums, support=Support(firings=100, documents=8))
    assert (supported.label[found.spread < 8] == NONE).all()
    assert supported.labelled_by_chance < found.labelled_by_chance / 3
    np.testing.assert_array_equal(found.per_value(8), [(found.label == value).sum() for value in range(8)])


def test_the_order_prefers_mass_to_accidents() -> None:
    # a strong expert of value 0, one that was hardly seen, a generalist, one of value 1
    means = means_of([[1.0, 1e-6, 1.0, 0.0], [0.01, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]])
    score, own, rest = removal_order(means, 0)
    assert np.argsort(-score).tolist() == [0, 2, 1, 3]
    np.testing.assert_allclose(own, [1 / 2.000001, 1e-6 / 2.000001, 1 / 2.000001, 0])
    np.testing.assert_allclose(rest, [0.005 / 2.01, 0, (1 / 2.01 + 1) / 2, 0.5 / 2.01])


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_chooses_the_planted(rule: str) -> None:
    documents = simulate(5, per_value=100, planted=160, bursts=False)
    means = documents.sums().half(0)
    wanted = np.flatnonzero(documents.planted == 2)
    chosen = select(means, 2, rule, threshold=20 if rule == "top" else None)
    assert np.isin(wanted, chosen.experts).mean() >= 0.9
    assert np.isin(chosen.experts, wanted).mean() >= 0.8
    assert (np.diff(chosen.scores) <= 0).all()
    assert chosen.own.sum() > 10 * chosen.others.sum()
    few = select(means, 2, rule, budget=5 / means.experts)
    np.testing.assert_array_equal(few.experts, select(means, 2, rule).experts[:5])
    assert len(few.experts) == 5


@pytest.mark.parametrize(("rule", "looser", "stricter"), [("paper", 1.5, 5), ("fdr", 0.2, 1e-6), ("ratio", 2, 20)])
def test_thresholds_nest(rule: str, looser: float, stricter: float) -> None:
    means = simulate(5, per_value=50, planted=100).sums().half(0)
    many, few = select(means, 1, rule, looser).experts, select(means, 1, rule, stricter).experts
    assert set(few) < set(many)


def test_equal_experts_stand_by_their_numbers() -> None:
    means = means_of([[1.0] * 6, [0.1] * 6])
    assert select(means, 0, "ratio").experts.tolist() == [0, 1, 2, 3, 4, 5]
    assert select(means, 0, "ratio", budget=0.5).experts.tolist() == [0, 1, 2]
    assert select(means, 0, "ratio", support=Support(documents=11)).experts.tolist() == []
