"""The training loop, top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from monet_train.data.batches import Batch, MicroBatches
from monet_train.errors import UserError
from monet_train.parallel.groups import Topology
from monet_train.training.callbacks.base import Callback, Record
from monet_train.training.engine import gradient_norm, set_learning_rate

EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped by a signal after saving; the same command goes on


class Trainer:
    """Runs optimizer steps over a DeepSpeed engine; everything else is a callback.

    ``objective`` maps a model output to the scalar to differentiate and a vector of ``metrics``. A step takes
    ``step_tokens`` tokens over all ranks.
    """

    def __init__(
        self,
        engine: Any,
        objective: Callable[[Any], tuple[Tensor, Tensor]],
        metrics: Sequence[str],
        batches: MicroBatches,
        learning_rate: Callable[[int], float],
        total_steps: int,
        step_tokens: int,
        topology: Topology,
        callbacks: Sequence[Callback],
        resources: ExitStack,
    ) -> None:
        self.engine = engine
        self.objective = objective
        self.metrics = metrics
        self.batches = batches
        self.learning_rate = learning_rate
        self.total_steps = total_steps
        self.step_tokens = step_tokens
        self.topology = topology
        self.callbacks = list(callbacks)
        self.step = 0  # optimizer steps done
        self.stop_requested = False  # by a signal to this process
        self._resources = resources

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for callback in self.callbacks:
            self._resources.callback(callback.close)
        self._resources.close()  # all of it, in reverse order, also where one fails

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
            raise SystemExit(EXIT_STOPPED)

    def _train_step(self) -> tuple[Record, bool]:
        started, waited = time.perf_counter(), self.batches.wait_seconds
        rate = self.learning_rate(self.step)
        set_learning_rate(self.engine, rate)
        self.engine.train()
        sums = torch.zeros(len(self.metrics), dtype=torch.float64, device=self.engine.device)
        for batch in self.batches.of(self.step):
            output = self.forward(batch)
            total, metrics = self.objective(output)
            self.engine.backward(total)
            self.engine.step()
            sums += metrics
            for callback in self.callbacks:
                callback.on_micro_step(self, output)
        self.step += 1
        means, stopped = self._average(sums / self.batches.micro_steps)
        norm = gradient_norm(self.engine)
        self._refuse_non_finite(means, norm)
        seconds = time.perf_counter() - started
        return self._record(means, rate, norm, seconds, self.batches.wait_seconds - waited), stopped

    def forward(self, batch: Batch) -> Any:
        """Run the model on sequences of S + 1 tokens: S inputs, each with the token that follows it."""
        device = self.engine.device
        tokens = batch.tokens.to(device, non_blocking=True)
        extras = {
            name: value.to(device, non_blocking=True)
            for name, value in (("segments", batch.segment_ids), ("positions", batch.positions))
            if value is not None
        }
        return self.engine(tokens[:, :-1], targets=tokens[:, 1:], keep_logits=False, **extras)

    def mean_over_data(self, values: Tensor) -> Tensor:
        """Average over the data-parallel ranks."""
        return self.topology.sum_over_data(values) / self.topology.data_size

    def _average(self, metrics: Tensor) -> tuple[list[float], bool]:
        means = self.mean_over_data(metrics)
        # any rank's stop signal stops all of them, after the same step
        stop = torch.tensor(float(self.stop_requested), device=means.device)
        dist.all_reduce(stop, dist.ReduceOp.MAX)
        return means.tolist(), bool(stop.item())

    def _refuse_non_finite(self, means: list[float], norm: float) -> None:
        if not all(map(math.isfinite, [*means, norm])):
            values = ", ".join(f"{name} {value:.4g}" for name, value in zip(self.metrics, means, strict=True))
            raise UserError(
                f"step {self.step} is not finite ({values}, grad_norm {norm:.4g}); nothing was saved after it: "
                "lower optimizer.lr or lengthen schedule.warmup_steps and start again from the last checkpoint"
            )

    def _record(self, means: list[float], rate: float, norm: float, seconds: float, waited: float) -> Record:
        return {
            "step": self.step,
            "tokens": self.step * self.step_tokens,
            **dict(zip(self.metrics, means, strict=True)),
            "lr": rate,
            "grad_norm": norm,
            "step_seconds": seconds,
            "data_seconds": waited,
            "tokens_per_second": self.step_tokens / seconds,
        }
