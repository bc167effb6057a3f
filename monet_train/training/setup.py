"""Building a trainer from a configuration: checks first, then the parts, in the order they depend on each other."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from monet_train.checkpoints.layout import checkpoints_folder
from monet_train.checkpoints.resume import check_complete, check_same_run, find_resume, restore
from monet_train.checkpoints.save import CheckpointWriter
from monet_train.config.schema import TrainConfig
from monet_train.data.batches import MicroBatches
from monet_train.data.corpus import Corpus, check_shards, open_corpus
from monet_train.errors import UserError
from monet_train.kernels import Kernels
from monet_train.model.sharding import build_model
from monet_train.parallel.agreement import agree, from_main_rank
from monet_train.parallel.groups import Topology
from monet_train.parallel.launch import Launch, resolve_device, start_process_group, stop_process_group
from monet_train.planning.devices import peak_flops
from monet_train.planning.flops import WorkDone, training_flops_per_token
from monet_train.training.callbacks.base import Callback
from monet_train.training.callbacks.checkpointing import Checkpointing
from monet_train.training.callbacks.evaluation import Evaluation
from monet_train.training.callbacks.metrics_file import MetricsFile
from monet_train.training.callbacks.progress import Progress
from monet_train.training.callbacks.routers import RouterMonitor
from monet_train.training.callbacks.stop_signal import StopSignal
from monet_train.training.callbacks.utilisation import Utilisation
from monet_train.training.callbacks.wandb import Wandb
from monet_train.training.checks import check_config, total_steps
from monet_train.training.engine import build_engine
from monet_train.training.loop import Trainer
from monet_train.training.objective import METRICS, Objective
from monet_train.training.optimizer import learning_rate
from monet_train.training.run_folder import DATA_CACHE, check_run_folder, lock_run_folder, write_descriptions


def build_trainer(config: TrainConfig, launch: Launch) -> Trainer:
    """A trainer ready to fit, resumed where the run folder says so. Every process calls it.

    Raises:
        UserError: the same on every rank, before anything is written.
    """
    check_config(config, launch)
    device = resolve_device(config.train.device, launch)
    start_process_group(launch, device)
    resources = ExitStack()
    resources.callback(stop_process_group)
    try:
        return _build(config, launch, device, resources)
    except BaseException:
        resources.close()
        raise


def _build(config: TrainConfig, launch: Launch, device: torch.device, resources: ExitStack) -> Trainer:
    topology = Topology(config.parallel.tensor)
    folder = Path(config.run.dir).resolve()
    steps = total_steps(config)
    resume = agree(lambda: _check_inputs(config, folder, device))
    corpus = agree(lambda: _open_corpus(config, steps, folder))
    identity = run_identity(config, corpus, topology)
    agree(lambda: check_same_run(resume, identity) if resume else None)
    agree(lambda: check_complete(resume) if resume and launch.is_main else None)
    lock = agree(lambda: lock_run_folder(folder) if launch.is_main else None)
    if lock is not None:
        resources.enter_context(lock)
    # Again under the lock: another run may have saved meanwhile, and hosts may see a shared folder differently.
    newest = from_main_rank(agree(lambda: find_resume(config.checkpoint.resume, checkpoints_folder(folder))))
    agree(lambda: _check_newest(newest, resume))

    checkpoints = CheckpointWriter(
        checkpoints_folder(folder),
        keep=config.checkpoint.keep,
        identity=identity,
        zero_stage=config.zero.stage,
        tokenizer=corpus.tokenizer,
    )
    model = build_model(
        config.model,
        topology,
        device,
        seed=config.train.seed,
        kernels=Kernels(config.kernels),
        recompute=config.train.recompute,
    )
    engine = build_engine(model, config, topology)
    batches = _micro_batches(corpus.train, config.train.global_batch_size, steps, config, topology)
    resources.callback(batches.close)
    trainer = Trainer(
        engine=engine,
        objective=Objective.of(config.train),
        metrics=METRICS,
        batches=batches,
        learning_rate=partial(learning_rate, peak=config.optimizer.lr, total=steps, schedule=config.schedule),
        total_steps=steps,
        step_tokens=config.train.global_batch_size * config.train.seq_length,
        topology=topology,
        callbacks=_callbacks(config, launch, device, folder, steps, corpus, topology, checkpoints),
        resources=resources,
    )
    if resume:
        restore(trainer, resume)
    if launch.is_main:
        write_descriptions(folder, config, device, launch.world_size)
        _announce(config, trainer, corpus, topology, device, resume)
    return trainer


def run_identity(config: TrainConfig, corpus: Corpus, topology: Topology) -> dict[str, Any]:
    """What must be the same for a run to go on, by key: the model, the data and their order, how state is split."""
    order = dict(corpus.identity)
    return {
        "model": asdict(config.model),
        "train": {
            "seed": order.pop("seed"),
            "seq_length": order.pop("seq_length"),
            "global_batch_size": config.train.global_batch_size,
            "micro_batch_size": config.train.micro_batch_size,
            "precision": config.train.precision,
        },
        "data": {"path": [f"shards {fingerprint[:16]}" for fingerprint in order.pop("shards")]} | order,
        "parallel": {"tensor": topology.tensor_size, "data": topology.data_size},
        "zero": {"stage": config.zero.stage},
    }


def _check_inputs(config: TrainConfig, folder: Path, device: torch.device) -> Path | None:
    Kernels(config.kernels).is_native(device)  # refuses native kernels that cannot run
    check_shards(config.data, config.model.vocab_size)
    check_run_folder(folder, config)
    return find_resume(config.checkpoint.resume, checkpoints_folder(folder))


def _open_corpus(config: TrainConfig, steps: int, folder: Path) -> Corpus:
    return open_corpus(
        config.data,
        seq_length=config.train.seq_length,
        seed=config.train.seed,
        vocab_size=config.model.vocab_size,
        train_sequences=steps * config.train.global_batch_size,
        valid_sequences=config.eval.sequences if config.eval.every is not None else 0,
        cache_dir=folder / DATA_CACHE,
    )


def _check_newest(newest: Path | None, resume: Path | None) -> None:
    # By name: hosts may have the folder mounted in different places.
    if (newest and newest.name) != (resume and resume.name):
        raise UserError(
            f"{newest or resume} came or went while this run started, or not all hosts see it yet: run the command "
            "again"
        )


def _micro_batches(dataset: Any, sequences: int, steps: int, config: TrainConfig, topology: Topology) -> MicroBatches:
    return MicroBatches(
        dataset,
        steps=steps,
        global_batch_size=sequences,
        micro_batch_size=config.train.micro_batch_size,
        data_rank=topology.data_rank,
        data_size=topology.data_size,
    )


def work_done(config: TrainConfig, device: torch.device) -> WorkDone:
    """What the implementation that will run on ``device`` really does of the dense work."""
    native = Kernels(config.kernels).is_native(device)
    return WorkDone(
        rows_skipped=native and device.type == "cpu",
        mixing_skipped=native,
        causal=not config.data.reset_attention,
        recompute=config.train.recompute,
        copies=config.parallel.tensor,
    )


def _utilisation(config: TrainConfig, device: torch.device, world_size: int) -> Utilisation:
    peak = peak_flops(device, config.train.precision)
    all_peaks = None if peak is None else peak * world_size
    return Utilisation(config.model, config.train.seq_length, work_done(config, device), all_peaks)


def _callbacks(
    config: TrainConfig,
    launch: Launch,
    device: torch.device,
    folder: Path,
    steps: int,
    corpus: Corpus,
    topology: Topology,
    checkpoints: CheckpointWriter,
) -> list[Callback]:
    """In the order they are called: what adds to the record, what writes it, what evaluates, what saves."""
    routers = RouterMonitor(list(config.model.router_layers), config.model.moe_experts)
    callbacks: list[Callback] = [StopSignal(), routers, _utilisation(config, device, launch.world_size)]
    if launch.is_main:
        callbacks.append(MetricsFile(folder / "metrics.jsonl"))
        if config.logging.wandb.mode != "disabled":
            callbacks.append(Wandb(config.logging.wandb, folder, config.run.name, asdict(config), config.logging.every))
        callbacks.append(Progress(steps, config.logging.every, config.logging.progress))
    if corpus.valid is not None and config.eval.every is not None:
        micro_step = topology.data_size * config.train.micro_batch_size
        available = len(corpus.valid)
        sequences = max(1, min(config.eval.sequences, available) // micro_step) * micro_step
        evaluation = _micro_batches(corpus.valid, sequences, 1, config, topology)
        callbacks.append(Evaluation(evaluation, config.eval.every))
    return [*callbacks, Checkpointing(checkpoints, config.checkpoint.every)]


def _announce(
    config: TrainConfig, trainer: Trainer, corpus: Corpus, topology: Topology, device: torch.device, resume: Path | None
) -> None:
    flops = training_flops_per_token(config.model, config.train.seq_length)
    print(
        f"{config.run.name}: {topology.data_size} data x {topology.tensor_size} tensor ranks on {device.type}, "
        f"ZeRO {config.zero.stage}, {config.train.precision}, {flops / 1e6:,.0f} MFLOP a token; "
        f"{Kernels(config.kernels).describe(device.type)}; "
        + (f"goes on after step {trainer.step} ({resume})" if resume else f"starts in {Path(config.run.dir)}"),
        flush=True,
    )
    print(f"{trainer.total_steps:,} steps read " + ", ".join(map(str, corpus.readings)), flush=True)
