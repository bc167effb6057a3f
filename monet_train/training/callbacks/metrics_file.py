"""metrics.jsonl: one line per step and per evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Self

from monet_train.training.loop import Callback, Phase, Trainer
from monet_train.training.prepared import Prepared
from monet_train.training.records import Record


class MetricsFile(Callback):
    """Appends records to a JSON-lines file; on resume, lines after the resumed step are dropped first."""

    name = "metrics_file"
    phase = Phase.WRITE

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: IO[str] | None = None

    @classmethod
    def build(cls, prepared: Prepared) -> Self | None:
        return cls(prepared.folder / "metrics.jsonl") if prepared.launch.is_main else None

    def on_start(self, trainer: Trainer) -> None:
        kept = []
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step(line) <= trainer.step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(line + "\n" for line in kept))
        partial.replace(self.path)
        self.file = self.path.open("a", buffering=1)

    def on_step(self, trainer: Trainer, record: Record) -> None:
        self._write(record)

    def on_evaluation(self, trainer: Trainer, record: Record) -> None:
        self._write(record)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def _write(self, record: Record) -> None:
        assert self.file is not None
        self.file.write(json.dumps(record.figures()) + "\n")


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")  # the last line of a killed run may be cut
