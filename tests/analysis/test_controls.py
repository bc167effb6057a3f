"""Random sets and bootstrap intervals."""

from __future__ import annotations

import numpy as np
import pytest

from monet_train.analysis.controls import bootstrap_mean, matched_in_count, matched_in_mass

MASS = np.random.default_rng(0).dirichlet(np.full(2000, 0.3))
CHOSEN = np.argsort(-MASS)[:20]


def test_sets_of_the_same_count_are_uniform() -> None:
    sets = matched_in_count(CHOSEN, MASS, sets=200)
    assert {len(np.unique(each.experts)) for each in sets} == {20}
    assert np.mean([each.overlap for each in sets]) == pytest.approx(20 / 2000, abs=0.005)
    assert np.mean([each.mass for each in sets]) == pytest.approx(20 / 2000, rel=0.15)


def test_sets_of_the_same_mass_reach_it_and_stop() -> None:
    target = MASS[CHOSEN].sum()
    for each in matched_in_mass(CHOSEN, MASS):
        assert target * (1 - 1e-6) <= each.mass <= target + MASS.max()
        assert each.overlap == pytest.approx(np.isin(CHOSEN, each.experts).mean())
        assert len(each.experts) > 3 * len(CHOSEN)


def test_a_set_depends_on_its_number_and_the_seed_alone() -> None:
    few, many = matched_in_mass(CHOSEN, MASS, sets=2, seed=7), matched_in_mass(CHOSEN, MASS, sets=5, seed=7)
    np.testing.assert_array_equal(few[1].experts, many[1].experts)
    assert few[0].experts.tolist() != matched_in_mass(CHOSEN, MASS, sets=1, seed=8)[0].experts.tolist()


def test_the_whole_and_the_empty_set() -> None:
    everything = np.arange(2000)
    assert len(matched_in_mass(everything, MASS, sets=1)[0].experts) >= np.count_nonzero(MASS > 1e-9) - 2000 * 0.01
    nothing = matched_in_mass(everything[:0], MASS, sets=1)[0]
    assert len(nothing.experts) == 0 and nothing.overlap == 0


def test_intervals_cover_the_mean() -> None:
    """Losses that depend on the document and on its length, 300 samples of 100 documents."""
    random = np.random.default_rng(1)
    covered = []
    for _ in range(300):
        counts = np.exp(random.normal(5, 0.7, 100)).round()
        sums = counts * (2 + random.normal(0, 0.5, 100)) + random.normal(0, np.sqrt(counts))
        interval = bootstrap_mean(sums, counts, resamples=300)
        covered.append(interval.low <= 2 <= interval.high)
    assert 0.89 <= np.mean(covered) <= 0.98


def test_series_share_the_draws_and_seeds_repeat() -> None:
    random = np.random.default_rng(2)
    counts = random.integers(10, 500, 50)
    before = counts * random.normal(3, 1, 50)
    series = np.stack([before, before + 0.25 * counts, 0.25 * counts]).reshape(3, 1, 50)
    interval = bootstrap_mean(series, counts, resamples=100)
    assert interval.mean.shape == (3, 1)
    np.testing.assert_allclose(interval.low[1] - interval.low[0], 0.25)
    np.testing.assert_allclose([interval.low[2], interval.high[2]], 0.25)
    np.testing.assert_array_equal(interval.low, bootstrap_mean(series, counts, resamples=100).low)
    assert (interval.low != bootstrap_mean(series, counts, resamples=100, seed=1).low)[0]


def test_no_documents_are_refused() -> None:
    with pytest.raises(ValueError, match="2 sums for 3 documents"):
        bootstrap_mean(np.ones(2), np.ones(3))
