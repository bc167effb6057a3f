"""The command line of ``monet-train``: Hydra's options, checked overrides, and sweeps over several values."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.types import Override

from monet_train.config.compose import PRIMARY, compose, composition, config_folder, groups
from monet_train.config.overrides import parse_overrides
from monet_train.config.schema import TrainConfig
from monet_train.errors import UserError, one_line, one_line_errors

Run = Callable[[TrainConfig], None]


def run_command(run: Run, rank: int, world_size: int) -> None:
    """Read the command line and call ``run`` with the typed configuration: once, or with ``-m`` once per combination.

    Bad input ends every process with exit status 2 and one line of one of them; see :func:`one_line_errors`.
    """

    def checked() -> None:
        arguments = get_args_parser().parse_args()
        if arguments.config_name or arguments.config_path:
            raise UserError(
                "--config-name and --config-path: monet-train has one primary configuration; put your keys into "
                "FOLDER/experiment/NAME.yaml and give --config-dir FOLDER experiment=NAME"
            )
        config_dir = Path(arguments.config_dir) if arguments.config_dir else None
        with composition(config_dir) as loader:
            parsed = parse_overrides(arguments.overrides, groups(loader), sweep=arguments.multirun)
        if shows_only(arguments):
            _show()
        elif arguments.multirun:
            sweep(parsed, config_dir, run, world_size)
        else:
            run(compose(arguments.overrides, config_dir))

    one_line_errors(checked, rank)()


def shows_only(arguments: argparse.Namespace) -> bool:
    """Whether an option asks Hydra to print something instead of running."""
    return bool(arguments.cfg or arguments.help or arguments.hydra_help or arguments.info or arguments.shell_completion)


def _show() -> None:
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # a bug shows its whole traceback; bad input never gets there
    # Hydra also prints by logging, which meets a closed output itself; here is no socket to lose
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if "-m" in sys.argv or "--multirun" in sys.argv:
        raise UserError("-m trains; leave it out where something is only shown (--cfg, --info, --help)")
    hydra.main(config_path=str(config_folder()), config_name=PRIMARY, version_base="1.3")(lambda config: None)()


def sweep(overrides: Sequence[Override], config_dir: Path | None, run: Run, world_size: int) -> None:
    """One training after another, each with a run folder and a name of its own.

    A training that is refused costs one line, and the next one starts.

    Raises:
        UserError: the sweep cannot be, before anything starts; or trainings were refused, after the last one.
    """
    if world_size > 1:
        raise UserError(
            "-m trains one run after another in one process; under a launcher start each run by a command of its own"
        )
    jobs = _jobs(overrides, config_dir)
    refused = []
    for number, (label, config) in enumerate(jobs, start=1):
        print(f"== run {number} of {len(jobs)}: {label or 'as given'}, in {config.run.dir}", flush=True)
        try:
            run(config)
        except UserError as error:
            print(f"run {number} of {len(jobs)} ({label}): {one_line(error)}", file=sys.stderr, flush=True)
            refused.append(label)
    if refused:
        raise UserError(f"{len(refused)} of {len(jobs)} runs were refused, see above: {'; '.join(refused)}")


def _jobs(overrides: Sequence[Override], config_dir: Path | None) -> list[tuple[str, TrainConfig]]:
    """The swept values of each training, as ``optimizer.lr=1e-3``, and its configuration."""
    swept = {override.key_or_group for override in overrides if override.is_sweep_override()}
    (batch,) = BasicSweeper.split_arguments(list(overrides), None)
    labels = [",".join(text for text in job if text.partition("=")[0].lstrip("+") in swept) for job in batch]
    configs = [compose(job, config_dir) for job in batch]
    if len({config.run.dir for config in configs}) < len(configs):  # the swept keys do not name folders by themselves
        for label, config in zip(labels, configs, strict=True):
            suffix = "-" + label.replace("/", "_")
            config.run.dir += suffix
            config.run.name += suffix
    folders = [Path(config.run.dir).resolve() for config in configs]
    for number, folder in enumerate(folders):
        if folder in folders[:number]:
            raise UserError(f"-m: {labels[number]} gives two runs the folder {folder}; give each value once")
    return list(zip(labels, configs, strict=True))
