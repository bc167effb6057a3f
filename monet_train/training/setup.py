"""Building a trainer from a configuration: checks first, then the parts, in the order they depend on each other."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from monet_train.checkpoints.resume import restore
from monet_train.config.schema import TrainConfig
from monet_train.model.sharding import build_model
from monet_train.parallel.agreement import agree
from monet_train.parallel.launch import Launch
from monet_train.planning.flops import training_flops_per_token
from monet_train.training.callbacks.table import build_callbacks
from monet_train.training.engine import build_engine
from monet_train.training.events import Changed, Resume, Start
from monet_train.training.loop import Trainer
from monet_train.training.objective import LanguageModelling
from monet_train.training.preflight import preflight
from monet_train.training.prepared import Prepared
from monet_train.training.run_folder import write_descriptions
from monet_train.training.schedules import learning_rate


def build_trainer(config: TrainConfig, launch: Launch) -> Trainer:
    """A trainer ready to fit, resumed where the run folder says so. Every process calls it.

    Raises:
        UserError: the same on every rank, before anything is written.
        Finished: the run is complete already.
    """
    with ExitStack() as resources:
        prepared = preflight(config, launch, resources)
        callbacks = agree(lambda: build_callbacks(prepared))
        for callback in callbacks:
            resources.callback(callback.close)
        batches = prepared.training_batches()
        resources.callback(batches.close)
        model = build_model(
            config.model,
            prepared.topology,
            prepared.device,
            seed=config.train.seed,
            kernels=prepared.kernels,
            recompute=config.train.recompute,
        )
        trainer = Trainer(
            engine=build_engine(model, config, prepared.topology),
            objective=LanguageModelling(config.train.uniformity_weight, config.train.ambiguity_weight),
            batches=batches,
            learning_rate=partial(
                learning_rate, peak=config.optimizer.lr, total=prepared.steps, schedule=config.schedule
            ),
            total_steps=prepared.steps,
            step_tokens=config.train.global_batch_size * config.train.seq_length,
            topology=prepared.topology,
            callbacks=callbacks,
        )
        if prepared.resume:
            restore(trainer, prepared.resume)
        trainer.emit(Resume(str(prepared.resume)) if prepared.resume else Start())
        if prepared.changed:
            trainer.emit(Changed(prepared.changed))
        if launch.is_main:  # after the events: a kill between the two must not lose the changed values
            write_descriptions(prepared.folder, config, prepared.device, launch.world_size)
            print(announcement(prepared, trainer.step), flush=True)
        trainer.resources = resources.pop_all()
        return trainer


def announcement(prepared: Prepared, step: int) -> str:
    """The first lines of a run: its name, what it runs on, where it starts or resumes, and what it will read."""
    config, topology, device = prepared.config, prepared.topology, prepared.device
    begin = f"resumes after step {step} ({prepared.resume})" if prepared.resume else f"starts in {config.run.dir}"
    flops = training_flops_per_token(config.model, config.train.seq_length)
    return (
        f"{config.run.name}: {topology.data_size} data x {topology.tensor_size} tensor ranks on {device.type}, "
        f"ZeRO {config.zero.stage}, {config.train.precision}, {flops / 1e6:,.0f} MFLOP per token; "
        f"{prepared.kernels.describe(device.type)}; "
        + begin
        + f"\n{prepared.steps:,} steps read "
        + ", ".join(map(str, prepared.corpus.readings))
        + f"; {prepared.corpus.held_out_share:.1%} of the tokens are held out"
    )
