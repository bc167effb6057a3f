"""Typed configuration of a run: the schema behind ``conf/``.

:class:`TrainConfig` is the whole; each of its sections is a class of its own. Hydra merges the YAML groups of ``conf/``
onto it, so that an unknown key or a bad type is refused before anything starts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from monet_train.model.config import MonetConfig

MISSING: Any = "???"  # OmegaConf's marker of a value that must be given


@dataclass
class RunSection:
    """Where the run lives and what it is called."""

    name: str = MISSING
    dir: str = MISSING


@dataclass
class DataSection:
    """What is read, and in which order. Only these fields and the seed decide the order of sequences."""

    path: Any = MISSING  # a shard folder (with manifest.json), a shard prefix, or a list of them
    weights: list[float] | None = None  # one weight a path; None: in proportion to their tokens
    validation_fraction: float = 0.01  # share of the documents held out
    reset_attention: bool = False  # tokens attend only within their document
    reset_positions: bool = False  # positions start at 0 in each document
    cache_dir: str | None = (
        None  # index cache; None: in the first shard folder, or in the run folder if that cannot be written
    )


@dataclass
class OptimizerSection:
    """AdamW. The paper gives the learning rate only; the rest is what the field uses."""

    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1  # on matrices; not on norms and biases
    clip: float = 1.0  # global gradient norm


@dataclass
class ScheduleSection:
    """Linear warm-up, then cosine decay to ``final`` of the peak."""

    warmup_steps: int = 0
    final: float = 0.1


@dataclass
class TrainSection:
    """The training itself."""

    seed: int = 0
    seq_length: int = 2048
    micro_batch_size: int = 1  # sequences a rank and micro-step
    global_batch_size: int = 1024  # sequences a step, over all ranks and micro-steps
    max_steps: int | None = None
    max_tokens: int | None = None  # instead of max_steps
    precision: str = "bf16"
    device: str = "auto"
    recompute: bool = False  # recompute activations, one routing group at a time
    uniformity_weight: float = 1e-3
    ambiguity_weight: float = 1e-3


@dataclass
class ParallelSection:
    """How the model is split; data parallelism takes the ranks that are left."""

    tensor: int = 1
    sequence: bool = False


@dataclass
class ZeroSection:
    """DeepSpeed ZeRO."""

    stage: int = 1


@dataclass
class EvalSection:
    """Held-out evaluation during training. 0: only at the end; null: never."""

    every: int | None = 1000
    sequences: int = 256


@dataclass
class CheckpointSection:
    """Checkpoints. ``keep``: the newest N stay (null: all)."""

    every: int | None = 1000
    keep: int | None = 3
    resume: str = "auto"


@dataclass
class WandbSection:
    """Weights & Biases."""

    mode: str = "offline"
    project: str = "monet_train"
    entity: str | None = None


@dataclass
class LoggingSection:
    """What is shown and written."""

    every: int = 1  # steps between two lines of the console and wandb; metrics.jsonl has them all
    progress: bool = True
    wandb: WandbSection = field(default_factory=WandbSection)


@dataclass
class TrainConfig:
    """A whole run."""

    run: RunSection = field(default_factory=RunSection)
    model: MonetConfig = field(default_factory=MonetConfig)
    data: DataSection = field(default_factory=DataSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    schedule: ScheduleSection = field(default_factory=ScheduleSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    zero: ZeroSection = field(default_factory=ZeroSection)
    train: TrainSection = field(default_factory=TrainSection)
    eval: EvalSection = field(default_factory=EvalSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    logging: LoggingSection = field(default_factory=LoggingSection)
    kernels: str = "auto"  # auto | native | plain
