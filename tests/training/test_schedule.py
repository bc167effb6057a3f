"""The learning rate of every step."""

from __future__ import annotations

import math

import pytest

from monet_train.config.schema import ScheduleSection
from monet_train.training.schedules import learning_rate


def test_learning_rate() -> None:
    schedule = ScheduleSection(name="cosine", warmup_steps=10, final=0.1)

    def rate(step: int) -> float:
        return learning_rate(step, peak=2.0, total=110, schedule=schedule)

    assert [rate(step) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])  # the first step is not wasted at 0
    assert rate(10) == pytest.approx(2.0)
    assert rate(60) == pytest.approx(1.1)  # half-way between peak and a tenth of it
    assert rate(35) == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert rate(110) == rate(1000) == pytest.approx(0.2)
    assert all(rate(step) > rate(step + 1) for step in range(10, 110))
    assert learning_rate(0, peak=2.0, total=5, schedule=ScheduleSection(name="cosine", warmup_steps=0)) == 2.0
