"""Entry point of training: compose the configuration, build the parts, fit."""

from __future__ import annotations

import sys

from monet_train.config.command_line import read_command
from monet_train.config.compose import compose
from monet_train.config.schema import TrainConfig
from monet_train.config.sweep import sweep_jobs
from monet_train.errors import one_line_errors
from monet_train.parallel.launch import Launch, read_launch


def main() -> None:
    """Console entry ``monet-train``: see ``monet-train --help``."""
    launch = one_line_errors(read_launch)()
    # the deepspeed launcher adds this argument to what it also says in the environment
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank=")]
    one_line_errors(lambda: run(arguments, launch), launch.rank)()


def run(arguments: list[str], launch: Launch) -> None:
    """Do what a command line asks for: show something, train one run, or train those of a sweep."""
    command = read_command(arguments)
    if command is None:
        return
    if not command.sweep:
        train(compose(command.overrides, command.config_dir), launch)
        return
    from monet_train.training.sweep import run_jobs

    run_jobs(sweep_jobs(command.overrides, command.config_dir), launch, lambda config: train(config, launch))


def train(config: TrainConfig, launch: Launch) -> None:
    """Run a training described by ``config`` as process ``launch``, to its end or to a stop signal."""
    from monet_train.training.run_folder import Finished
    from monet_train.training.setup import build_trainer

    try:
        trainer = build_trainer(config, launch)
    except Finished as finished:
        if launch.is_main:
            print(finished, flush=True)
        return
    with trainer:
        trainer.fit()


if __name__ == "__main__":
    main()
