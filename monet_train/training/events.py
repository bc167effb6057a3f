"""``events.jsonl`` in the run folder: what happened to a run, one JSON line per event.

Lines are only ever appended, also by a run that resumes: a ``resume`` line with step s says that the steps after s,
whose lines may be above it, are done again. So nothing is lost, and what occurs twice is explained.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

EVENTS = "events.jsonl"


class Event:
    """Something that happened between two steps: a dataclass whose fields say more about it."""

    event: ClassVar[str]  # its name in the file


@dataclass(frozen=True)
class Start(Event):
    """A run begins at step 0."""

    event = "start"


@dataclass(frozen=True)
class Resume(Event):
    """A run continues from a checkpoint."""

    event = "resume"
    checkpoint: str


@dataclass(frozen=True)
class Changed(Event):
    """A run continues with other values than those it was trained with so far; ``config.yaml`` has the new ones.

    They are in force from this step on, until a later line of the file says otherwise.
    """

    event = "changed"
    changed: dict[str, list[Any]]  # by dotted key: [before, now]


@dataclass(frozen=True)
class Save(Event):
    """A checkpoint is complete."""

    event = "save"
    checkpoint: str


@dataclass(frozen=True)
class Stop(Event):
    """A signal stopped the run before its last step; it is saved."""

    event = "stop"


@dataclass(frozen=True)
class End(Event):
    """The last step is done and saved."""

    event = "end"


@dataclass(frozen=True)
class Fault(Event):
    """A step that cannot be used; the run ends without saving it."""

    event = "fault"
    message: str


def append_event(folder: Path, event: Event, step: int) -> None:
    """Add a line to ``events.jsonl`` of a run folder, and wait until it is on the disk. For the main rank.

    A line that a crash has cut short is removed first, so that every line that is followed by another is whole.

    Args:
        step: optimizer steps done.
    """
    values = {"event": event.event, "step": step, "time": datetime.now(UTC).isoformat(timespec="seconds")}
    line = json.dumps(values | asdict(event)) + "\n"  # type: ignore[call-overload]
    with (folder / EVENTS).open("a+b") as file:
        _cut_partial_line(file.fileno())
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read_events(folder: Path) -> list[dict[str, Any]]:
    """All events of a run, oldest first; a last line that is still being written, or was cut, is left out."""
    file = folder / EVENTS
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def _cut_partial_line(descriptor: int) -> None:
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        os.ftruncate(descriptor, os.pread(descriptor, size, 0).rfind(b"\n") + 1)
