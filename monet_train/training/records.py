"""What is known about a step or an evaluation: typed parts, each made in one place, and one flat view for the writers.

Code that needs a figure of another part asks for the part by its class: ``record.get(RouterUsage).active``. The names
in ``metrics.jsonl`` exist only in :meth:`Part.figures`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

Figures = dict[str, Any]  # numbers, strings, lists of them, None: what JSON can hold


class Part:
    """Figures that one place produces: a dataclass, whose fields are their names unless ``figures`` says otherwise."""

    def figures(self) -> Figures:
        """The figures by their names in ``metrics.jsonl``."""
        return asdict(self)  # type: ignore[call-overload]


P = TypeVar("P", bound=Part)


@dataclass
class Record:
    """One line of ``metrics.jsonl``: a training step or an evaluation after it."""

    step: int  # optimizer steps done
    tokens: int  # read so far, over all ranks
    _parts: dict[type[Part], Part] = field(default_factory=dict)

    def add(self, part: Part) -> None:
        """Add a part. Each kind is added once."""
        if type(part) in self._parts:
            raise ValueError(f"the record of step {self.step} has its {type(part).__name__} already")
        self._parts[type(part)] = part

    def get(self, kind: type[P]) -> P:
        """The part of that class. Raises :class:`KeyError` if no earlier callback has added it."""
        part = self._parts[kind]
        assert isinstance(part, kind)
        return part

    def figures(self) -> Figures:
        """Everything, flat."""
        flat: Figures = {"step": self.step, "tokens": self.tokens}
        for part in self._parts.values():
            figures = part.figures()
            if taken := flat.keys() & figures.keys():
                raise ValueError(f"{type(part).__name__} has the figure {min(taken)!r}, which the record has already")
            flat |= figures
        return flat


@dataclass(frozen=True)
class Timing(Part):
    """The figures of the optimizer and of the clock."""

    lr: float
    grad_norm: float  # before clipping
    step_seconds: float
    data_seconds: float  # the part of it that was spent waiting for data
    tokens_per_second: float  # over all ranks


@dataclass(frozen=True)
class HeldOutLoss(Part):
    """Cross-entropy on held-out sequences, averaged over all counted targets."""

    eval_loss: float
