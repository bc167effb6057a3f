"""events.jsonl: one line per event."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from monet_train.training.events import Event, append_event
from monet_train.training.loop import Callback, Phase, Trainer
from monet_train.training.prepared import Prepared


class EventsFile(Callback):
    """Appends every event to the run folder's ``events.jsonl``."""

    name = "events_file"
    phase = Phase.WRITE

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def build(cls, prepared: Prepared) -> Self | None:
        return cls(prepared.folder) if prepared.launch.is_main else None

    def on_event(self, trainer: Trainer, event: Event) -> None:
        append_event(self.folder, event, trainer.step)
