"""The training loop, to be read from top to bottom, and the interface of the callbacks that it calls."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from enum import IntEnum
from typing import Any, ClassVar, Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor

from monet_train.data.batches import Batch, MicroBatches
from monet_train.errors import UserError
from monet_train.parallel.groups import Topology
from monet_train.training.engine import gradient_norm, set_learning_rate
from monet_train.training.events import End, Event, Fault, Stop
from monet_train.training.prepared import Prepared
from monet_train.training.records import HeldOutLoss, Part, Record, Timing

EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped by a signal after saving; the same command resumes


class Phase(IntEnum):
    """When a callback is called: phase by phase in this order, and within a phase in the order of the table."""

    CONTROL = 0  # may ask for a stop
    MEASURE = 1  # adds parts to the step's record
    WRITE = 2  # takes the record, and shows or keeps it
    EVALUATE = 3  # may run the model
    SAVE = 4  # saves the state, once all others have seen the step


class Callback:
    """Something that a run does besides training. Called by the loop on every rank; it owns its state.

    To add one, see docs/extending.md.
    """

    name: ClassVar[str]  # unique; its state is saved under it
    phase: ClassVar[Phase]

    @classmethod
    def build(cls, prepared: Prepared) -> Callback | None:
        """The callback of a run on this rank, or None where the run has no use for it.

        Raises:
            UserError: the configuration asks for something impossible.
        """
        return cls()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to continue as if it had never stopped; saved with every checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of this process; a checkpoint, if any, is loaded."""

    def on_micro_step(self, trainer: Trainer, output: Any) -> None:
        """After each forward and backward pass, with the model's output."""

    def on_step(self, trainer: Trainer, record: Record) -> None:
        """After each optimizer step."""

    def on_evaluation(self, trainer: Trainer, record: Record) -> None:
        """After each evaluation: see :meth:`Trainer.evaluate`."""

    def on_event(self, trainer: Trainer, event: Event) -> None:
        """After each :meth:`Trainer.emit`."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step, or after the step in which a stop was requested."""

    def close(self) -> None:
        """Release files and services, also after an error."""


class Objective(Protocol):
    """What is minimised: the part of it that the loop uses."""

    def __call__(self, output: Any, mean_targets: Tensor) -> tuple[Tensor, Tensor]:
        """The scalar to differentiate, and this process' metrics as one fp64 tensor, for one micro-step.

        The average of both over the micro-steps of a step and over the data-parallel ranks is that of the global
        batch. ``mean_targets``: counted targets of the global batch, averaged in the same way, fp64; at least 1 in
        the whole batch.
        """

    def record(self, metrics: list[float]) -> Part:
        """The averaged metrics by name."""

    def held_out(self, output: Any) -> Tensor:
        """[sum of the loss over the counted targets, their number] of this process, fp64."""


class Trainer:
    """Runs optimizer steps over a DeepSpeed engine; everything else is a callback.

    A step takes ``step_tokens`` tokens over all ranks. ``resources`` are released at the end of the ``with`` block.
    """

    def __init__(
        self,
        engine: Any,
        objective: Objective,
        batches: MicroBatches,
        learning_rate: Callable[[int], float],
        total_steps: int,
        step_tokens: int,
        topology: Topology,
        callbacks: Sequence[Callback],
    ) -> None:
        self.engine = engine
        self.objective = objective
        self.batches = batches
        self.learning_rate = learning_rate
        self.total_steps = total_steps
        self.step_tokens = step_tokens
        self.topology = topology
        self.callbacks = sorted(callbacks, key=lambda callback: callback.phase)
        self.step = 0  # optimizer steps done
        self.resources = ExitStack()
        self._stop_requested = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.resources.close()  # all of them, in reverse order, even if one fails

    def fit(self) -> None:
        """Train to the last step. A stop signal ends it early with status :data:`EXIT_STOPPED`, after saving.

        Raises:
            UserError: the loss is no longer finite (on every rank).
        """
        for callback in self.callbacks:
            callback.on_start(self)
        stopped = False
        while self.step < self.total_steps and not stopped:
            record, stopped = self._train_step()
            for callback in self.callbacks:
                callback.on_step(self, record)
        for callback in self.callbacks:
            callback.on_end(self)
        if stopped and self.step < self.total_steps:
            self.emit(Stop())
            raise SystemExit(EXIT_STOPPED)
        self.emit(End())

    def _train_step(self) -> tuple[Record, bool]:
        started, waited = time.perf_counter(), self.batches.wait_seconds
        rate = self.learning_rate(self.step)
        set_learning_rate(self.engine, rate)
        self.engine.train()
        batches = list(self.batches.read(self.step))
        mean_targets = self._mean_targets(batches)
        measured = []
        for batch in batches:
            output = self._forward(batch)
            total, metrics = self.objective(output, mean_targets)
            self.engine.backward(total)
            self.engine.step()
            measured.append(metrics)
            for callback in self.callbacks:
                callback.on_micro_step(self, output)
        self.step += 1
        losses = self.objective.record(self._mean_over_data(torch.stack(measured).mean(0)).tolist())
        norm = gradient_norm(self.engine)
        self._refuse_non_finite(losses, norm)
        stopped = self._any_stop_requested()
        seconds = time.perf_counter() - started
        record = Record(self.step, self.step * self.step_tokens)
        record.add(losses)
        record.add(Timing(rate, norm, seconds, self.batches.wait_seconds - waited, self.step_tokens / seconds))
        return record, stopped

    def _forward(self, batch: Batch) -> Any:
        batch = batch.to(self.engine.device)
        return self.engine(
            batch.inputs,
            targets=batch.targets,
            segments=batch.segment_ids,
            positions=batch.positions,
            keep_logits=False,
        )

    @torch.no_grad()
    def evaluate(self, batches: MicroBatches) -> None:
        """Average the loss over the counted targets of ``batches``' first step, and pass it to every callback.

        Every rank calls it. The router takes its running statistics here.
        """
        self.engine.eval()
        with torch.compiler.set_stance("force_eager"):  # too few passes to be worth graphs of their own
            sums = torch.stack([self.objective.held_out(self._forward(batch)) for batch in batches.read(0)]).sum(0)
        self.engine.train()
        loss, targets = self.topology.sum_over_data(sums).tolist()
        record = Record(self.step, self.step * self.step_tokens)
        record.add(HeldOutLoss(loss / max(1, targets)))
        for callback in self.callbacks:
            callback.on_evaluation(self, record)

    def emit(self, event: Event) -> None:
        """Pass an event to every callback; one of them writes ``events.jsonl``. Every rank calls it."""
        for callback in self.callbacks:
            callback.on_event(self, event)

    def request_stop(self) -> None:
        """Stop after the current step, on all ranks if any asks for it, and save."""
        self._stop_requested = True

    def _mean_targets(self, batches: list[Batch]) -> Tensor:
        """Counted targets of the global batch (at least 1), averaged over micro-steps and data-parallel ranks, fp64."""
        counted = sum(batch.counted_targets() for batch in batches)
        total = torch.tensor(counted, dtype=torch.float64, device=self.engine.device)
        parts = len(batches) * self.topology.data_size
        return self.topology.sum_over_data(total).clamp_min(1) / parts

    def _mean_over_data(self, values: Tensor) -> Tensor:
        return self.topology.sum_over_data(values) / self.topology.data_size

    def _any_stop_requested(self) -> bool:
        stop = torch.tensor(float(self._stop_requested), device=self.engine.device)
        dist.all_reduce(stop, dist.ReduceOp.MAX)
        return bool(stop.item())

    def _refuse_non_finite(self, losses: Part, norm: float) -> None:
        values = losses.figures() | {"grad_norm": norm}
        if not all(map(math.isfinite, values.values())):
            shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            self.emit(Fault(f"not finite: {shown}"))
            raise UserError(
                f"step {self.step} is not finite ({shown}); nothing was saved after it: "
                "lower optimizer.lr or lengthen schedule.warmup_steps and start again from the last checkpoint"
            )
