"""Weights & Biases: offline into the run folder unless told otherwise, under one id over all restarts."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from monet_train.config.schema import WandbSection
from monet_train.errors import UserError
from monet_train.training.callbacks.base import Callback, Record


class Wandb(Callback):
    """Logs every record. ``wandb_id`` in the run folder keeps the id: a restart goes on in the same wandb run."""

    def __init__(self, config: WandbSection, folder: Path, name: str, run_config: dict[str, Any], every: int) -> None:
        self.config, self.folder, self.name, self.run_config, self.every = config, folder, name, run_config, every
        self.run: Any = None

    def on_start(self, trainer) -> None:
        import wandb

        id_file = self.folder / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8])
        try:
            self.run = wandb.init(
                project=self.config.project,
                entity=self.config.entity,
                name=self.name,
                id=id_file.read_text().strip(),
                resume="allow",
                mode=self.config.mode,  # type: ignore[arg-type]
                dir=str(self.folder),
                config=self.run_config,
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.Error as error:
            raise UserError(f"wandb did not start ({error}); mend it or use logging.wandb.mode=offline") from None

    def on_step(self, trainer, record: Record) -> None:
        if record["step"] % self.every == 0:
            self.run.log(_flat(record), step=record["step"])

    def on_evaluation(self, trainer, record: Record) -> None:
        self.run.log(_flat(record), step=record["step"])

    def close(self) -> None:
        if self.run is not None:
            self.run.finish()
            self.run = None


def _flat(record: Record) -> Record:
    """Lists as numbered scalars: what wandb draws."""
    flat = {}
    for key, value in record.items():
        if isinstance(value, list):
            flat.update({f"{key}/{side}": entry for side, entry in enumerate(value, start=1)})
        elif value is not None:
            flat[key] = value
    return flat
