"""The functions that the processes of :mod:`tests.support.processes` run."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from monet_train import ExpertSet
from monet_train.analysis.cli import main as experts_main
from monet_train.analysis.parts import Parts
from monet_train.checkpoints.weights import read_config, read_weights
from monet_train.config.compose import compose
from monet_train.data.packing import PackedSequences, TokenSequence
from monet_train.kernels import AUTO
from monet_train.model.parameters import local_shard
from monet_train.model.sharding import build_model
from monet_train.parallel.groups import Topology
from monet_train.parallel.launch import read_launch, start_process_group, stop_process_group
from monet_train.parallel.regions import enter_region, leave_region
from monet_train.train import main
from monet_train.training.loop import Callback, Phase
from monet_train.training.setup import build_trainer

if TYPE_CHECKING:
    from tests.support.runs import Training


class KilledWhileSaving(Callback):
    """Kills its process while it writes the checkpoint of ``step``: when its state is asked for."""

    name = "killed_while_saving"
    phase = Phase.CONTROL

    def __init__(self, step: int) -> None:
        self.step = step
        self.due = False

    def on_step(self, trainer, record) -> None:
        self.due = trainer.step == self.step

    def state_dict(self) -> dict[str, Any]:
        if self.due:
            os.kill(os.getpid(), signal.SIGKILL)
        return {}


def mask_experts(model: torch.nn.Module) -> None:
    """Mask half of the experts of the first routing group, per head, and scale those of the second."""
    generator = torch.Generator().manual_seed(0)
    shape = model.config.moe_heads, model.config.moe_experts, model.config.moe_experts
    model.set_expert_mask(0, torch.rand(shape, generator=generator) > 0.5)
    model.set_expert_mask(1, torch.randn(shape[1:], generator=generator))


def counted_targets(index: int, length: int) -> torch.Tensor:
    """Which targets of training sequence ``index`` count, in global batches of 8; bool [length].

    Another share of every sequence; in some steps none of the second micro-step of 4, or none of its first two
    sequences; in step 8 none at all.
    """
    step, place = divmod(index, 8)
    if step == 7 or (step % 4 == 1 and place >= 4) or (step % 4 == 2 and place < 2):
        return torch.zeros(length, dtype=torch.bool)
    return torch.rand(length, generator=torch.Generator().manual_seed(index)) < (place + 1) / 8


def masked_sequence(dataset: PackedSequences, index: int) -> TokenSequence:
    """A sequence as in conversations: some of its targets do not count."""
    sequence = READ(dataset, index)
    return sequence._replace(loss_mask=counted_targets(index, len(sequence.tokens) - 1))


READ = PackedSequences.__getitem__


def collect(arguments: list[str], killed_after: int | None = None) -> None:
    """``monet-experts collect``; its process is killed after it has saved that many times."""
    numbers, write = itertools.count(1), Parts.write

    def write_and_die(parts: Parts, *values: Any, **options: Any) -> Path:
        written = write(parts, *values, **options)
        if next(numbers) == killed_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    Parts.write = write_and_die  # type: ignore[method-assign]
    sys.argv = ["monet-experts", "collect", *arguments]
    experts_main()


def fit_in_turn(trainings: list[Training]) -> None:
    """Run the trainings, each with a rendezvous of its own."""
    warnings.filterwarnings("ignore")
    for training in trainings:
        os.environ["MASTER_PORT"] = str(training.port)
        PackedSequences.__getitem__ = masked_sequence if training.masked_targets else READ
        with build_trainer(compose(training.overrides), read_launch()) as trainer:
            if training.masked:
                mask_experts(trainer.engine.module)
            if training.killed_at is not None:
                trainer.callbacks.insert(0, KilledWhileSaving(training.killed_at))
            trainer.fit()


def monet_train(overrides: list[str]) -> None:
    """The command with these arguments."""
    sys.argv = ["monet-train", *overrides]
    main()


def save_outputs(checkpoint: Path, experts: Path, folder: Path) -> None:
    """As one of two tensor-parallel ranks: what a checkpoint with masked experts outputs, to ``rank_N.pt``."""
    launch, device = read_launch(), torch.device("cpu")
    start_process_group(launch, device)
    topology = Topology(launch.world_size)
    config = read_config(checkpoint)
    model = build_model(config, topology, device, seed=0, kernels=AUTO, recompute=False).eval()
    whole = read_weights(checkpoint)
    shards = {name: local_shard(name, tensor, config, launch.rank, launch.world_size) for name, tensor in whole.items()}
    model.load_state_dict(shards)
    ExpertSet.load(experts).apply(model)
    out = model(torch.arange(24).view(2, 12), output_gates=True)
    assert out.gates is not None and out.logits is not None
    out.logits.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    gates = [side.dense().detach() for sides in out.gates for side in sides]
    outputs = {"logits": out.logits.detach(), "gates": gates, "gradients": gradients}
    torch.save(outputs, folder / f"rank_{launch.rank}.pt")
    stop_process_group()


def check_regions() -> None:
    """As one of two ranks: values and gradients of the pair, for contiguous tensors and for others."""
    launch, device = read_launch(), torch.device("cpu")
    start_process_group(launch, device)
    group = Topology(launch.world_size).tensor_group
    mine = torch.arange(6.0).view(2, 3) * 10**launch.rank
    both = torch.arange(6.0).view(2, 3) * 11
    for name, tensor, total in (("contiguous", mine, both), ("transposed", mine.T, both.T)):
        given = tensor.clone()
        x = torch.zeros_like(tensor).contiguous().requires_grad_()
        enter_region(x, group).backward(tensor)
        assert torch.equal(x.grad, total), f"{name}: {x.grad}"
        assert torch.equal(leave_region(tensor, group), total), name
        assert torch.equal(tensor, given), f"{name}: what was given has changed"
    stop_process_group()
