"""metrics.jsonl: one line a step and an evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO

from monet_train.training.callbacks.base import Callback, Record


class MetricsFile(Callback):
    """Appends records to a JSON-lines file; on resume, lines after the resumed step are dropped first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: IO[str] | None = None

    def on_start(self, trainer) -> None:
        kept = []
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step(line) <= trainer.step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(line + "\n" for line in kept))
        partial.replace(self.path)
        self.file = self.path.open("a", buffering=1)

    def on_step(self, trainer, record: Record) -> None:
        self._write(record)

    def on_evaluation(self, trainer, record: Record) -> None:
        self._write(record)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def _write(self, record: Record) -> None:
        assert self.file is not None
        self.file.write(json.dumps(record) + "\n")


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")  # the last line of a killed run may be cut
