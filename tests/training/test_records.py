"""The record of a step: typed parts, and one flat view for the writers."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from monet_train.training.callbacks.routers import RouterUsage
from monet_train.training.records import HeldOutLoss, Part, Record


@dataclass(frozen=True)
class Again(Part):
    eval_loss: float


def test_parts_are_asked_for_by_their_class_and_written_by_name() -> None:
    record = Record(step=3, tokens=192)
    record.add(HeldOutLoss(2.5))
    record.add(RouterUsage(layers=[0, 4], active=[[1, 2], [3, 4]], unused=[[0, 0]] * 2, entropy=[[5, 6]] * 2))
    assert record.get(HeldOutLoss).eval_loss == 2.5
    assert list(record.figures())[:4] == ["step", "tokens", "eval_loss", "router/0/active"]
    assert record.figures()["router/4/active"] == [3, 4]


def test_a_figure_is_never_overwritten() -> None:
    record = Record(step=3, tokens=192)
    with pytest.raises(KeyError):
        record.get(HeldOutLoss)
    record.add(HeldOutLoss(2.5))
    with pytest.raises(ValueError, match="HeldOutLoss already"):
        record.add(HeldOutLoss(2.6))
    record.add(Again(2.7))
    with pytest.raises(ValueError, match="Again has the figure 'eval_loss'"):
        record.figures()
