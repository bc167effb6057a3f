"""Statistics of experts and labels, against plain definitions and against simulated documents."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from monet_train.analysis.statistics import (
    LabelMeans,
    LabelSums,
    information_by_chance,
    jaccard,
    mutual_information,
    others,
    p_values,
    q_values,
    selectivity,
)
from tests.analysis.documents import Documents, simulate

WORLDS = list(product((0.5, 1.2, 2.0), (True, False)))  # spread of lengths, bursts


def means_of(scores: np.ndarray, lengths: np.ndarray, labels: np.ndarray) -> LabelMeans:
    """One half, all documents in it."""
    halves, planted = np.zeros(len(labels), np.int64), np.full(scores.shape[1], -1)
    return Documents(lengths, labels, halves, scores, (scores > 0).astype(np.int64), planted).sums().half(0)


def test_means_and_errors_are_those_of_the_documents() -> None:
    documents = simulate(0, values=3, per_value=12, experts=50)
    sums = documents.sums()
    for means, halves in ((sums.half(0), [0]), (sums.half(1), [1]), (sums.joined(), [0, 1])):
        inside = np.isin(documents.halves, halves)
        lengths, scores = documents.lengths[inside].astype(float), documents.scores[inside]
        for value in range(3):
            here = documents.labels[inside] == value
            mean = scores[here].sum(0) / lengths[here].sum()
            residual = scores[here] - lengths[here, None] * mean
            size = here.sum()
            error = np.sqrt((residual**2).sum(0) * size / (size - 1)) / lengths[here].sum()
            np.testing.assert_allclose(means.mean[value], mean, rtol=1e-12)
            np.testing.assert_allclose(means.standard_error[value], error, rtol=1e-5)
        overall = scores.sum(0) / lengths.sum()
        scatter = ((scores - lengths[:, None] * overall) ** 2).sum(0)
        np.testing.assert_allclose(means.scatter, scatter, rtol=1e-9)
        seen = scores.sum(0) > 0
        np.testing.assert_allclose(means.spread[seen], scores.sum(0)[seen] ** 2 / (scores**2).sum(0)[seen])
        assert (means.spread[~seen] == 0).all() and (means.sightings()[~seen] == 0).all()


def test_one_document_has_no_standard_error() -> None:
    means = means_of(np.ones((3, 1)), np.array([10, 20, 30]), np.array([0, 1, 1]))
    assert np.isinf(means.standard_error[0, 0]) and np.isfinite(means.standard_error[1, 0])


def test_others_leave_out_values_without_tokens() -> None:
    means = simulate(0, values=4, experts=20).sums().half(0)
    emptied = replace(means, tokens=means.tokens * [1, 1, 1, 0], mean=means.mean * np.array([[1], [1], [1], [0]]))
    np.testing.assert_allclose(others(emptied, 1), means.mean[[0, 2]].mean(0))


@pytest.mark.slow
@pytest.mark.parametrize(("length_spread", "bursts"), WORLDS)
def test_p_values_hold_under_shuffled_labels(length_spread: float, bursts: bool) -> None:
    """Few documents, the longest with half of a label's tokens, experts seen in few of them."""
    documents = simulate(1, length_spread=length_spread, bursts=bursts)
    found, p = 0, []
    for sums in documents.shufflings(20):
        p.append(p_values(sums.half(0)))
        found += (q_values(p[-1]) <= 0.05).any()
    assert found <= 3
    for level in (0.1, 0.01, 0.001, 1e-4):
        assert (np.array(p) <= level).mean() <= level


@pytest.mark.parametrize(("length_spread", "bursts"), [(0.5, True), (0.5, False), (1.2, False)])
def test_planted_experts_are_found(length_spread: float, bursts: bool) -> None:
    documents = simulate(2, per_value=200, planted=100, length_spread=length_spread, bursts=bursts)
    found = q_values(p_values(documents.sums().half(0))) <= 0.05
    right = found[documents.planted[:100], np.arange(100)]
    assert right.mean() >= 0.9
    assert found.sum() - right.sum() <= 0.05 * found.sum()


def test_planted_experts_are_found_among_few_documents() -> None:
    """25 documents per value, 200 in all."""
    documents = simulate(2, planted=100, bursts=False)
    found = q_values(p_values(documents.sums().joined())) <= 0.05
    assert found[documents.planted[:100], np.arange(100)].mean() >= 0.9


def test_an_expert_of_k_documents_has_about_two_k_nats() -> None:
    labels = np.repeat(np.arange(8), 100)
    scores = np.zeros((800, 3))
    scores[0, 0] = scores[:10, 1] = scores[:30, 2] = 1
    p = p_values(means_of(scores, np.full(800, 100), labels))[0]
    np.testing.assert_allclose(-np.log(p) / [1, 10, 30], 2, rtol=0.05)


def test_a_long_document_is_one_document() -> None:
    """Its own label's mean is nearly its score, with hardly any residual: a t-test over documents falls for it."""
    random = np.random.default_rng(0)
    lengths = np.full(200, 100)
    lengths[0] = 1_000_000
    labels = np.arange(200) % 8
    scores = lengths[:, None] * np.exp(random.normal(0, 0.1, (200, 1000)))
    scores[0] *= 3
    means = means_of(scores, lengths, labels)
    t = (means.mean[0] - means.mean[1:].mean(0)) / np.hypot(means.standard_error[0], means.standard_error[1:].max(0))
    assert t.mean() > 10
    assert p_values(means).min() > 1e-3


def test_a_longer_document_does_not_count_as_interest() -> None:
    """Documents of one label are ten times as long, the scores per token the same."""
    random = np.random.default_rng(0)
    labels = np.arange(400) % 8
    lengths = np.where(labels == 3, 2000, 200)
    scores = random.poisson(0.05 * lengths[:, None], (400, 500)).astype(float)
    assert not (q_values(p_values(means_of(scores, lengths, labels))) <= 0.05).any()


def test_labels_of_one_value_and_wrong_shapes_are_refused() -> None:
    sums = simulate(0, values=2, per_value=3, experts=4).sums()
    with pytest.raises(ValueError, match="at least 2"):
        replace(sums, firings=sums.firings[:1])
    with pytest.raises(ValueError, match="square has the shape"):
        replace(sums, square=sums.square[:, :, :3])


def test_q_values_are_benjamini_and_hochberg() -> None:
    p = np.array([[0.01, 0.04], [0.03, 0.5]])
    np.testing.assert_allclose(q_values(p), [[0.04, 0.16 / 3], [0.16 / 3, 0.5]])


def test_selectivity_of_specialists_and_generalists() -> None:
    scores = np.array([[1, 1, 0, 2], [1, 0, 0, 2], [1, 0, 0, 0]], float)
    means = means_of(scores, np.array([10, 10, 10]), np.array([0, 1, 2]))
    found = selectivity(means)
    np.testing.assert_allclose(found[[0, 1, 3]], [0, 1, 1 - np.log(2) / np.log(3)], atol=1e-12)
    assert np.isnan(found[2])


def test_mutual_information_is_that_of_the_table() -> None:
    firings, tokens = np.array([[30, 5, 0], [10, 5, 0]]), np.array([100, 100])
    both = np.array([[30, 70], [10, 90]]) / 200
    expected = (both * np.log2(both / np.outer(both.sum(1), both.sum(0)))).sum()
    np.testing.assert_allclose(mutual_information(firings, tokens), [expected, 0, 0], atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("length_spread", "bursts"), WORLDS)
def test_information_by_chance_is_that_of_shuffled_labels(length_spread: float, bursts: bool) -> None:
    documents = simulate(3, length_spread=length_spread, bursts=bursts)
    shuffled = documents.shufflings(5)
    seen = documents.firings.sum(0) >= 100
    expected = np.mean([information_by_chance(each.firings, each.joined())[seen].mean() for each in shuffled])
    actual = np.mean([mutual_information(each.firings, each.joined().tokens)[seen].mean() for each in shuffled])
    assert expected / 3 < actual < expected * 3


def test_jaccard_of_sets() -> None:
    members = np.array([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]], bool)
    np.testing.assert_allclose(jaccard(members), [[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 0]])


def test_blocks_of_experts_change_nothing() -> None:
    documents = simulate(0, per_value=4, experts=1000)
    sums, times = documents.sums(), 40
    tiled = LabelSums(
        *(np.tile(each, times) for each in (sums.total, sums.square, sums.cross, sums.firings)),
        sums.documents,
        sums.tokens,
        sums.token_square,
    )
    few, many = sums.half(0), tiled.half(0)
    for name in ("mean", "standard_error", "scatter", "spread"):
        np.testing.assert_array_equal(np.tile(getattr(few, name), times), getattr(many, name))
    for function in (p_values, selectivity):
        np.testing.assert_allclose(np.tile(function(few), times), function(many), rtol=1e-9)


def test_memory_beside_the_result_is_bounded() -> None:
    values, experts = 16, 262_144
    mean = np.random.default_rng(0).random((values, experts))
    per_expert = np.ones(experts)
    means = LabelMeans(mean, mean, per_expert, per_expert, mean, np.full(values, 9.0), np.full(values, 99.0))
    tracemalloc.start()
    result = p_values(means)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak - result.nbytes < 20 << 20
