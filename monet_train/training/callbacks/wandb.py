"""Weights & Biases: offline into the run folder unless told otherwise, under one id over all restarts."""

from __future__ import annotations

import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from monet_train.config.schema import WandbSection
from monet_train.errors import UserError
from monet_train.training.loop import Callback, Phase, Trainer
from monet_train.training.prepared import Prepared
from monet_train.training.records import Figures, Record


class Wandb(Callback):
    """Logs every record. ``wandb_id`` in the run folder keeps the id: a restart continues the same wandb run."""

    name = "wandb"
    phase = Phase.WRITE

    def __init__(
        self, config: WandbSection, folder: Path, run_name: str, run_config: dict[str, Any], every: int
    ) -> None:
        self.config, self.folder, self.run_name = config, folder, run_name
        self.run_config, self.every = run_config, every
        self.run: Any = None

    @classmethod
    def build(cls, prepared: Prepared) -> Self | None:
        config = prepared.config
        if not prepared.launch.is_main or config.logging.wandb.mode == "disabled":
            return None
        return cls(config.logging.wandb, prepared.folder, config.run.name, asdict(config), config.logging.every)

    def on_start(self, trainer: Trainer) -> None:
        import wandb

        id_file = self.folder / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8])
        try:
            self.run = wandb.init(
                project=self.config.project,
                entity=self.config.entity,
                name=self.run_name,
                id=id_file.read_text().strip(),
                resume="allow",
                mode=self.config.mode,  # type: ignore[arg-type]
                dir=str(self.folder),
                config=self.run_config,
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.Error as error:
            raise UserError(f"wandb did not start ({error}); repair it, or use logging.wandb.mode=offline") from None

    def on_step(self, trainer: Trainer, record: Record) -> None:
        if record.step % self.every == 0:
            self.run.log(_flat(record.figures()), step=record.step)

    def on_evaluation(self, trainer: Trainer, record: Record) -> None:
        self.run.log(_flat(record.figures()), step=record.step)

    def close(self) -> None:
        if self.run is not None:
            self.run.finish()
            self.run = None


def _flat(figures: Figures) -> Figures:
    """Lists as numbered scalars: what wandb draws."""
    flat = {}
    for key, value in figures.items():
        if isinstance(value, list):
            flat.update({f"{key}/{side}": entry for side, entry in enumerate(value, start=1)})
        elif value is not None:
            flat[key] = value
    return flat
