"""Checks between the keys of a configuration and against the world it runs in, before anything is built.

The bounds of a single key are declared beside it, in ``config/schema.py`` and ``model/config.py``.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch

from monet_train.config.schema import TrainConfig
from monet_train.data.batches import micro_steps
from monet_train.errors import UserError
from monet_train.model.sharding import check_tensor_size
from monet_train.parallel.launch import Launch
from monet_train.typed import check_bounds


def check_config(config: TrainConfig, launch: Launch) -> None:
    """Refuse what cannot train. Raises :class:`UserError` naming the key, the same on every rank."""
    check_bounds(config)
    if config.train.max_steps is None and config.train.max_tokens is None:
        raise UserError("train.max_steps or train.max_tokens must be given")
    config.model.validate()
    if config.train.seq_length > config.model.max_position_embeddings:
        raise UserError(
            f"train.seq_length={config.train.seq_length} exceeds "
            f"model.max_position_embeddings={config.model.max_position_embeddings}; "
            "raise that, or lower train.seq_length"
        )
    if config.parallel.sequence:
        raise UserError(
            "parallel.sequence=true is not available: Megatron's sequence parallelism needs CUDA buffers and has "
            "not been verified here on GPUs; use parallel.sequence=false"
        )
    check_tensor_size(config.model, config.parallel.tensor)
    check_batch(config, launch.world_size)
    if config.train.compile:
        check_compile(config)


def check_batch(config: TrainConfig, world_size: int) -> None:
    """Refuse a world that does not divide and a global batch that the ranks cannot make."""
    tensor = config.parallel.tensor
    if world_size % tensor:
        raise UserError(
            f"parallel.tensor={tensor} does not divide the {world_size} processes that were started: start a multiple "
            f"of {tensor}, or use one of {', '.join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)}"
        )
    micro_steps(config.train.global_batch_size, config.train.micro_batch_size, world_size // tensor)


def check_compile(config: TrainConfig) -> None:
    """Refuse train.compile where communication within the model would cut it into many graphs."""
    cuts = {
        f"parallel.tensor={config.parallel.tensor}": config.parallel.tensor > 1,
        "zero.stage=3": config.zero.stage == 3,
    }
    for key in (key for key, cut in cuts.items() if cut):
        raise UserError(
            f"train.compile=true cannot be combined with {key}, which would cut the model into many graphs without any "
            "gain; use train.compile=false"
        )


def check_compiler(device: torch.device) -> None:
    """Refuse train.compile on a machine where torch.compile cannot generate code for ``device``.

    It needs Triton on a GPU, otherwise a C++ compiler and Python's headers.
    """
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cuda":
        missing = None if find_spec("triton") else "Triton (pip install triton)"
    elif shutil.which(compiler) is None:
        missing = f"a C++ compiler, and {compiler} is not found; install g++ or set CXX"
    else:
        header = Path(sysconfig.get_path("include"), "Python.h")
        missing = None if header.exists() else f"Python's headers, and {header} does not exist; install python3-dev"
    if missing:
        raise UserError(f"train.compile=true needs {missing}, or use train.compile=false")


def total_steps(config: TrainConfig) -> int:
    """Optimizer steps of the run: whichever of train.max_steps and train.max_tokens ends first."""
    limits = []
    if config.train.max_steps is not None:
        limits.append(config.train.max_steps)
    if config.train.max_tokens is not None:
        step_tokens = config.train.global_batch_size * config.train.seq_length
        limits.append(max(1, config.train.max_tokens // step_tokens))
    return min(limits)
