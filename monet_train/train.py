"""Entry point of training: compose the configuration, build the parts, fit."""

from __future__ import annotations

import sys

from monet_train.config.command_line import run_command
from monet_train.config.schema import TrainConfig
from monet_train.errors import one_line_errors
from monet_train.parallel.launch import Launch, read_launch


def main() -> None:
    """Console entry ``monet-train``: see ``monet-train --help``."""
    launch = one_line_errors(read_launch)()
    # the deepspeed launcher adds this argument to what it also says in the environment
    sys.argv = [argument for argument in sys.argv if not argument.startswith("--local_rank=")]
    run_command(lambda config: train(config, launch), launch.rank, launch.world_size)


def train(config: TrainConfig, launch: Launch) -> None:
    """Run a training described by ``config`` as process ``launch``, to its end or to a stop signal."""
    from monet_train.training.setup import build_trainer

    with build_trainer(config, launch) as trainer:
        trainer.fit()


if __name__ == "__main__":
    main()
