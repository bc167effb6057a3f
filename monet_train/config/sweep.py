"""A sweep: one run for each combination of the values that a command gives its keys, each in a folder of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

from monet_train.config.compose import PRIMARY, composition, groups, to_typed
from monet_train.config.overrides import parse_overrides
from monet_train.config.schema import TrainConfig
from monet_train.errors import UserError
from monet_train.fingerprint import sha256_text

LONGEST_SUFFIX = 120  # characters; file systems allow 255 bytes in a name


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    values: str  # the swept keys, as on the command line
    config: TrainConfig


def sweep_jobs(overrides: Sequence[str], config_dir: Path | None = None) -> list[Job]:
    """The runs that a command asks for, in the order in which the last key varies fastest.

    Where runs would share ``run.name`` or ``run.dir``, each gets its values appended to them:
    ``runs/nano-optimizer.lr_1e-3``.

    Raises:
        UserError: a value of a job is invalid, or two jobs are the same.
    """
    with composition(config_dir) as loader:
        options = groups(loader)
        parsed = parse_overrides(overrides, options, sweeper=loader)
        swept = {override.get_key_element() for override in parsed if override.is_sweep_override()}
        combinations = BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]
        jobs = []
        for combination in combinations:
            parse_overrides(combination, options)
            values = [override for override in combination if override.partition("=")[0] in swept]
            jobs.append((values, to_typed(hydra.compose(PRIMARY, combination))))
    for values, _ in jobs:
        if [other for other, _ in jobs].count(values) > 1:
            raise UserError(f"{' '.join(values)} occurs twice in this sweep: give each value once")
    values_of_jobs = [values for values, _ in jobs]
    names = _distinct([config.run.name for _, config in jobs], values_of_jobs, options)
    folders = _distinct([str(Path(config.run.dir)) for _, config in jobs], values_of_jobs, options)
    for (_, config), name, folder in zip(jobs, names, folders, strict=True):
        config.run.name, config.run.dir = name, folder
    return [Job(" ".join(values), config) for values, config in jobs]


def _distinct(texts: list[str], values: list[list[str]], options: Iterable[str]) -> list[str]:
    """The texts, with the values of each job appended where two would be the same.

    The values of ``run.name``, ``run.dir`` and of groups are left out if the others are enough.
    """
    own = {"run.name", "run.dir"}
    for hidden in (own | set(options), own, set()):
        if len(set(texts)) == len(texts):
            return texts
        shown = [[value for value in job if value.partition("=")[0] not in hidden] for job in values]
        made = ["-".join([text, *map(_in_a_name, job)]) for text, job in zip(texts, shown, strict=True)]
        if len(set(made)) == len(made):
            return made
    raise AssertionError(f"jobs with the same values: {values}")


def _in_a_name(value: str) -> str:
    """``key=value`` in characters that file names and Hydra's command line take as they are."""
    plain = re.sub(r"[^\w.+-]", "_", value, flags=re.ASCII)
    if plain == value.replace("=", "_", 1) and len(plain) <= LONGEST_SUFFIX:
        return plain
    return f"{plain[:LONGEST_SUFFIX]}_{sha256_text(value)[:8]}"  # two values may look the same in these characters
