"""The command line of ``monet-train``: what it asks for, and what Hydra shows of the configuration."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig

from monet_train.config.compose import PRIMARY, VERSION_BASE, composition, config_folder, explained, groups
from monet_train.config.overrides import key_type, parse_overrides, unknown_key
from monet_train.errors import UserError

ONE_CONFIGURATION = (
    "monet-train has one configuration: keep changes to it in FOLDER/experiment/NAME.yaml, and give "
    "--config-dir FOLDER experiment=NAME"
)


@dataclass(frozen=True)
class Command:
    """A command to train."""

    overrides: list[str]
    config_dir: Path | None
    sweep: bool  # one run for each combination of values


def read_command(arguments: list[str]) -> Command | None:
    """Read the arguments of the command line. None if they only ask to see something, which is shown here.

    Raises:
        UserError: an argument is unknown, or two contradict each other.
    """
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}; see monet-train --help")

    parser.error = refuse  # type: ignore[method-assign]
    if "--version" in arguments:  # Hydra's parser would print its own
        print(f"monet-train {version('monet-train')}")
        return None
    options = parser.parse_intermixed_args(arguments)
    if options.config_name or options.config_path or options.experimental_rerun:
        raise UserError(f"--config-name, --config-path and --experimental-rerun are not read: {ONE_CONFIGURATION}")
    shows = {"--help": options.help, "--hydra-help": options.hydra_help, "--cfg": options.cfg, "--info": options.info,
             "--shell-completion": options.shell_completion}  # fmt: skip
    modes = [name for name, given in (shows | {"--multirun": options.multirun, "--run": options.run}).items() if given]
    if len(modes) > 1:
        raise UserError(f"{' and '.join(modes)} cannot be given together; choose one")
    if options.resolve and not (options.cfg or options.help):
        raise UserError("--resolve goes with --cfg or --help only")
    config_dir = Path(options.config_dir) if options.config_dir else None
    if any(shows.values()):
        if options.package and options.cfg == "job" and key_type(options.package) is None:
            raise UserError(unknown_key(options.package))
        if not options.shell_completion:  # its override is a command to Hydra
            with composition(config_dir) as loader:
                parse_overrides(options.overrides, groups(loader))
        _show([argument for argument in arguments if argument not in options.overrides] + options.overrides)
        return None
    return Command(options.overrides, config_dir, options.multirun)


def _show(arguments: list[str]) -> None:
    @hydra.main(config_path=str(config_folder()), config_name=PRIMARY, version_base=VERSION_BASE)
    def never_called(_: DictConfig) -> None:
        raise AssertionError("Hydra was asked to show something")

    with explained(), _process_of_hydra(arguments):
        try:
            never_called()
        except ValueError as error:  # of --shell-completion
            raise UserError(" ".join(str(error).split())) from None


@contextmanager
def _process_of_hydra(arguments: list[str]) -> Iterator[None]:
    """Set what Hydra reads from the process, and restore it afterwards.

    The signal: Hydra also prints by logging, which would report a closed output at length; nothing is lost here.
    The variable: Hydra raises its errors, instead of printing a report of its own.
    """
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [argv[0], *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    handler = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGPIPE, handler)
        sys.argv = argv
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error
