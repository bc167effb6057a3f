"""What a checkpoint saves and restores: the parts of a trainer that matter here, without importing the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from monet_train.parallel.groups import Topology


class Stateful(Protocol):
    """A callback: it owns its state, which is saved under its name."""

    @property
    def name(self) -> str: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class TrainingState(Protocol):
    """A training between two steps."""

    step: int  # optimizer steps done

    @property
    def engine(self) -> Any:
        """The ``DeepSpeedEngine``; its ``module`` is this rank's model."""

    @property
    def topology(self) -> Topology: ...

    @property
    def callbacks(self) -> Sequence[Stateful]: ...
