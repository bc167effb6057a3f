"""Typed configuration of a run: the schema behind ``conf/``.

:class:`TrainConfig` is the whole; each of its sections is a class of its own. Hydra merges the YAML groups of ``conf/``
onto it, so that an unknown key or a bad type is refused before anything starts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from monet_train.model.config import MonetConfig
from monet_train.typed import above, at_least, bounded, not_empty, one_of, share

MISSING: Any = "???"  # OmegaConf's marker of a value that must be given, by conf/ or by the user


@dataclass
class RunSection:
    """Where the run lives and what it is called."""

    name: str = not_empty(MISSING)
    dir: str = not_empty(MISSING)


@dataclass
class DataSection:
    """What is read, and in which order. Only these fields and the seed decide the order of sequences."""

    path: Any = MISSING  # a shard folder (with manifest.json), a shard prefix, or a list of them
    weights: list[float] | None = bounded(  # one weight per path; None: in proportion to their tokens
        lambda weights: all(0 < weight < math.inf for weight in weights),
        "must be positive numbers; leave out the paths that should not be read",
        default=None,
    )
    # Share of the documents held out for evaluation, also while eval.every=null; 0: none, and no evaluation.
    validation_fraction: float = share(0.01, of="the documents", below_one=True)
    reset_attention: bool = False  # tokens attend only within their document
    reset_positions: bool = False  # positions start at 0 in each document
    # Index cache; None: in the first shard folder, or in the run folder if that cannot be written.
    cache_dir: str | None = not_empty(None)


@dataclass
class OptimizerSection:
    """The optimizer, which the group ``optimizer`` chooses.

    The paper gives AdamW and the learning rate (set beside each model size); the rest is what the field uses.
    """

    name: str = not_empty(MISSING)  # in training/optimizers.py
    lr: float = at_least(0, default=5e-4)
    betas: tuple[float, float] = bounded(
        lambda betas: len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
        "must be two numbers from 0 to below 1, as [0.9,0.95]",
        default=(0.9, 0.95),
    )
    eps: float = above(0, default=1e-8, remedy="as 1e-8")
    weight_decay: float = at_least(0, default=0.1)  # on matrices; not on norms and biases
    clip: float = above(0, default=1.0, remedy="use a large number not to clip")  # global gradient norm


@dataclass
class ScheduleSection:
    """How the learning rate moves, which the group ``schedule`` chooses.

    Linear warm-up to the peak, then cosine decay to ``final`` of it. Not published, but what the field does.
    """

    name: str = not_empty(MISSING)  # in training/schedules.py
    warmup_steps: int = at_least(0, default=0)
    final: float = share(0.1, of="optimizer.lr")


@dataclass
class TrainSection:
    """The training itself."""

    seed: int = at_least(0, default=0)
    seq_length: int = at_least(1, default=2048)
    micro_batch_size: int = at_least(1, default=1)  # sequences per rank and micro-step
    global_batch_size: int = at_least(1, default=1024)  # sequences per step, over all ranks and micro-steps
    max_steps: int | None = at_least(1, default=None)
    max_tokens: int | None = at_least(1, default=None)  # with max_steps: whichever ends first
    precision: str = one_of("fp32", "bf16", default="bf16")
    device: str = one_of("auto", "cpu", "cuda", default="auto")
    recompute: bool = False  # recompute activations, one routing group at a time
    compile: bool = False  # torch.compile the model; the first step then takes about half a minute
    uniformity_weight: float = at_least(0, default=1e-3)
    ambiguity_weight: float = at_least(0, default=1e-3)


@dataclass
class ParallelSection:
    """How the model is split; data parallelism takes the ranks that are left."""

    tensor: int = at_least(1, default=1)
    sequence: bool = False


@dataclass
class ZeroSection:
    """DeepSpeed ZeRO: what is split over the data ranks. The group ``zero`` chooses the stage."""

    stage: int = one_of(0, 1, 2, 3, default=MISSING)


@dataclass
class EvalSection:
    """Held-out evaluation during training. ``every``: steps between two; 0: only at the end; None: never."""

    every: int | None = at_least(0, default=1000)
    sequences: int = at_least(1, default=256)


@dataclass
class CheckpointSection:
    """Checkpoints. ``every``: steps between two (None: only at the end); ``keep``: the newest N stay (None: all)."""

    every: int | None = at_least(1, default=1000)
    keep: int | None = at_least(1, default=3)
    resume: str = not_empty("auto")  # auto, never, or the folder of a checkpoint


@dataclass
class WandbSection:
    """Weights & Biases. ``offline`` writes into the run folder, ``online`` sends, ``disabled`` turns it off."""

    mode: str = one_of("offline", "online", "disabled", default="offline")
    project: str = not_empty("monet_train")
    entity: str | None = not_empty(None)


@dataclass
class LoggingSection:
    """What is shown and written."""

    every: int = at_least(1, default=1)  # steps between two lines of the console and wandb; metrics.jsonl has them all
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
    kernels: str = one_of("auto", "native", "plain", default="auto")
    callbacks: list[str] = field(default_factory=list)  # names of callbacks that installed packages offer
