"""events.jsonl: what happened to a run, one line per event, through kills and resumes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import pytest

from monet_train.config.compose import compose
from monet_train.errors import UserError
from monet_train.parallel.launch import Launch
from monet_train.training.callbacks.stop_signal import SIGNALS
from monet_train.training.events import EVENTS, Event, append_event, read_events
from monet_train.training.setup import build_trainer
from tests.support.runs import TINY, Training, train, train_in_turn


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """Starting a process group sets RANK and the like, and a run that is stopped ignores SIGTERM from then on."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    with mock.patch.dict(os.environ):
        yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@dataclass(frozen=True)
class Noted(Event):
    event = "noted"
    what: str


def told(run: Path) -> list[tuple[Any, ...]]:
    """Name, step and fields of every event."""
    events = read_events(run)
    for event in events:
        assert datetime.fromisoformat(event.pop("time")).utcoffset() is not None
    return [(event.pop("event"), event.pop("step"), *event.values()) for event in events]


def test_a_line_that_was_cut_is_removed_before_the_next(tmp_path: Path) -> None:
    assert read_events(tmp_path) == []
    append_event(tmp_path, Noted("one\ntwo — drei"), 1)
    append_event(tmp_path, Noted("three"), 2)
    whole = (tmp_path / EVENTS).read_bytes()
    for cut in range(len(whole) - 1, 0, -7):  # a crash may leave any part of what was being written
        (tmp_path / EVENTS).write_bytes(whole[:cut])
        kept = whole[:cut].count(b"\n")
        assert len(read_events(tmp_path)) == kept
        append_event(tmp_path, Noted("after"), 3)
        lines = [json.loads(line) for line in (tmp_path / EVENTS).read_text().splitlines()]  # as anybody reads it
        assert [line["what"] for line in lines] == [*["one\ntwo — drei", "three"][:kept], "after"]


@pytest.mark.slow
def test_a_run_that_is_killed_resumed_and_stopped_tells_it(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    base = [*TINY, f"data.path={shards}", f"run.dir={run}", "train.max_steps=6", "checkpoint.every=2"]
    train_in_turn([Training(base, killed_at=4)])
    checkpoint = run / "checkpoints" / "step_00000002"
    killed = [("start", 0), ("save", 2, checkpoint.name)]
    assert told(run) == killed

    with build_trainer(compose(base), Launch(0, 1, 0)) as trainer:
        trainer.request_stop()
        with pytest.raises(SystemExit):
            trainer.fit()
    # step 3 and what came after it is done again, and the file says so
    stopped = [*killed, ("resume", 2, str(checkpoint)), ("save", 3, "step_00000003"), ("stop", 3)]
    assert told(run) == stopped

    (done,) = train(base)
    assert done.returncode == 0, done.stderr
    resumed = ("resume", 3, str(run / "checkpoints" / "step_00000003"))
    saves = [("save", step, f"step_0000000{step}") for step in (4, 6)]
    assert told(run) == [*stopped, resumed, *saves, ("end", 6)]


def test_a_step_that_is_not_finite_is_told(shards: Path, tmp_path: Path) -> None:
    base = [*TINY, f"data.path={shards}", f"run.dir={tmp_path}/run", "train.max_steps=3"]
    with build_trainer(compose(base), Launch(0, 1, 0)) as trainer:
        trainer.engine.module.lm_head.weight.data.fill_(float("inf"))
        with pytest.raises(UserError, match="step 1 is not finite"):
            trainer.fit()
    (start, (name, step, message)) = told(tmp_path / "run")
    assert (start, name, step) == (("start", 0), "fault", 1)
    assert message.startswith("not finite: loss nan")


def test_a_run_that_ends_gives_the_signal_handlers_back(shards: Path, tmp_path: Path) -> None:
    def handler(number: int, frame: FrameType | None) -> None:
        """That of the process which trains."""

    for number in SIGNALS:
        signal.signal(number, handler)
    base = [*TINY, f"data.path={shards}", f"run.dir={tmp_path}/run", "train.max_steps=1"]
    with build_trainer(compose(base), Launch(0, 1, 0)) as trainer:
        trainer.fit()
    assert [signal.getsignal(number) for number in SIGNALS] == [handler, handler]
