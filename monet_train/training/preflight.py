"""Everything that is checked and chosen before a run is built. What cannot train is refused here, on every rank."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from monet_train.checkpoints.layout import checkpoints_folder
from monet_train.checkpoints.resume import check_complete, check_same_run, find_resume
from monet_train.config.schema import TrainConfig
from monet_train.data.corpus import Corpus, check_shards, open_corpus
from monet_train.errors import UserError
from monet_train.kernels import Kernels
from monet_train.parallel.agreement import agree, from_main_rank
from monet_train.parallel.groups import Topology
from monet_train.parallel.launch import Launch, resolve_device, start_process_group, stop_process_group
from monet_train.training.callbacks.table import find_callbacks
from monet_train.training.checks import check_compiler, check_config, total_steps
from monet_train.training.optimizers import check_optimizer
from monet_train.training.prepared import Prepared
from monet_train.training.run_folder import DATA_CACHE, changes, check_run_folder, check_work_left, lock_run_folder
from monet_train.training.schedules import check_schedule


def preflight(config: TrainConfig, launch: Launch, resources: ExitStack) -> Prepared:
    """Check a run and make its choices. Every process calls it.

    Starts the process group and takes the run folder's lock; ``resources`` ends both.

    Raises:
        UserError: the same on every rank, before anything is written.
        Finished: likewise, where the run is complete already.
    """
    check_config(config, launch)
    check_optimizer(config.optimizer)
    check_schedule(config.schedule)
    device = resolve_device(config.train.device, launch)
    start_process_group(launch, device)
    resources.callback(stop_process_group)
    topology, kernels = Topology(config.parallel.tensor), Kernels(config.kernels)
    folder, steps = Path(config.run.dir).resolve(), total_steps(config)

    def check_inputs() -> Path | None:
        find_callbacks(config.callbacks)
        kernels.is_native(device)  # refuses native kernels that cannot run
        if config.train.compile:
            check_compiler(device)
        check_shards(config.data, config.model.vocab_size)
        check_run_folder(folder, config)
        return find_resume(config.checkpoint.resume, checkpoints_folder(folder))

    resume = agree(check_inputs)
    corpus = agree(lambda: _open_corpus(config, steps, folder))
    identity = run_identity(config, corpus, topology)
    if resume:
        agree(lambda: check_same_run(resume, identity))
        agree(lambda: check_complete(resume) if launch.is_main else None)
        agree(lambda: check_work_left(folder, config, resume, steps))
    lock = agree(lambda: lock_run_folder(folder) if launch.is_main else None)
    if lock is not None:
        resources.enter_context(lock)
    _check_newest(config, folder, resume)
    # compared with the run that wrote the checkpoint, which may be another one
    changed = agree(lambda: changes(resume.parent.parent, config)) if resume else {}
    return Prepared(config, launch, device, topology, kernels, folder, steps, corpus, resume, identity, changed)


def run_identity(config: TrainConfig, corpus: Corpus, topology: Topology) -> dict[str, dict[str, Any]]:
    """What must be the same for a run to resume, by key: model, optimizer, data and their order, how state is split."""
    order = dict(corpus.identity)
    return {
        "model": asdict(config.model),
        "optimizer": {"name": config.optimizer.name},
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


def _check_newest(config: TrainConfig, folder: Path, resume: Path | None) -> None:
    """Look for the newest checkpoint again, under the lock.

    Another run may have saved meanwhile, and hosts may see a shared folder differently. It is compared by name: hosts
    may have mounted the folder in different places.
    """
    newest = from_main_rank(agree(lambda: find_resume(config.checkpoint.resume, checkpoints_folder(folder))))

    def compare() -> None:
        if (newest and newest.name) != (resume and resume.name):
            raise UserError(
                f"{newest or resume} appeared or vanished while this run started, or not all hosts see it yet: "
                "run the command again"
            )

    agree(compare)
