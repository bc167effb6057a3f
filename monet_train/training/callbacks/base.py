"""The interface between the loop and its callbacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from monet_train.training.loop import Trainer

Record = dict[str, Any]  # one line of metrics.jsonl: plain numbers, strings, lists, None


class Callback:
    """Called by the loop on every rank, in the order of the trainer's list. A callback owns its state."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as if never stopped; saved with every checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of this process; a checkpoint, if any, is loaded."""

    def on_micro_step(self, trainer: Trainer, output: Any) -> None:
        """After each forward and backward pass, with the model's output."""

    def on_step(self, trainer: Trainer, record: Record) -> None:
        """After each optimizer step. Callbacks early in the list may add to ``record``."""

    def on_evaluation(self, trainer: Trainer, record: Record) -> None:
        """After each evaluation."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step, or when a stop was asked for."""

    def close(self) -> None:
        """Release files and services, also after an error."""
