"""The learning-rate schedules that ``schedule.name`` chooses from."""

from __future__ import annotations

import math
from collections.abc import Callable

from monet_train.config.schema import ScheduleSection
from monet_train.errors import UserError

# (0-based step, steps of the run, settings) -> share of optimizer.lr. A pure function, so that a resumed run
# needs no state of it.
Schedule = Callable[[int, int, ScheduleSection], float]


def cosine(step: int, total: int, config: ScheduleSection) -> float:
    """Linear warm-up, then cosine from 1 to ``final``."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    decay_steps = max(1, total - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / decay_steps)
    return config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Schedule] = {"cosine": cosine}


def check_schedule(config: ScheduleSection) -> None:
    """Refuse a ``schedule.name`` that is not in the table."""
    if config.name not in SCHEDULES:
        raise UserError(f"schedule.name={config.name} is unknown; use one of {', '.join(SCHEDULES)}")


def learning_rate(step: int, peak: float, total: int, schedule: ScheduleSection) -> float:
    """The learning rate of 0-based ``step`` in a run of ``total`` steps."""
    return peak * SCHEDULES[schedule.name](step, total, schedule)
