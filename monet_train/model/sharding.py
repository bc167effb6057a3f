"""The model of a tensor-parallel rank.

The model itself is written without ranks, and :mod:`.parameters` says how each parameter is split. :func:`build_model`
makes the model of a rank, out of Megatron's parallel layers.

The experts are cut along their inner dimension m, not by expert: gates mix over half-experts at a fixed inner
unit, so every rank's partial output is exact and one all-reduce ends the layer.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
    vocab_parallel_cross_entropy,
)
from torch import Tensor

from monet_train.errors import UserError
from monet_train.kernels import Kernels
from monet_train.model.config import MonetConfig
from monet_train.model.experts import decomposition
from monet_train.model.initialize import initialize
from monet_train.model.parameters import local_shard, split_of
from monet_train.model.transformer import MonetForCausalLM
from monet_train.parallel.collectives import ALONE, Collectives
from monet_train.parallel.groups import Topology
from monet_train.parallel.regions import enter_region, leave_region


def check_tensor_size(config: MonetConfig, size: int) -> None:
    """Refuse a tensor-parallel size that does not divide the model, naming the sizes that do."""
    experts = decomposition(config.moe_decompose)
    units = experts.units(config)
    widths = {
        f"model.{experts.units_key}={units}": units,
        f"model.num_attention_heads={config.num_attention_heads}": config.num_attention_heads,
        f"model.num_key_value_heads={config.kv_heads}": config.kv_heads,
        f"model.vocab_size={config.vocab_size}": config.vocab_size,
    }
    undivided = [name for name, width in widths.items() if size < 1 or width % size]
    if undivided:
        valid = [n for n in range(1, units + 1) if all(width % n == 0 for width in widths.values())]
        raise UserError(
            f"parallel.tensor={size} does not divide {', '.join(undivided)}; use one of {', '.join(map(str, valid))}"
        )


class _Column(ColumnParallelLinear):
    """Megatron's column-parallel linear layer, returning its output alone."""

    def forward(self, input_: Tensor) -> Tensor:
        return super().forward(input_)[0]


class _Row(RowParallelLinear):
    """Megatron's row-parallel linear layer, returning its output alone."""

    def forward(self, input_: Tensor) -> Tensor:
        return super().forward(input_)[0]


class _Gather(torch.autograd.Function):
    """Parts of the last dimension, one on each rank, as the whole on every rank. Megatron's asks for a GPU."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(part) for _ in range(group.size())]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts, -1)

    @staticmethod
    def backward(ctx: Any, dwhole: Tensor) -> tuple[Tensor, None]:  # every rank has the same loss of the whole
        return dwhole.chunk(ctx.group.size(), -1)[ctx.group.rank()].contiguous(), None


def build_model(
    config: MonetConfig, topology: Topology, device: torch.device, *, seed: int, kernels: Kernels, recompute: bool
) -> MonetForCausalLM:
    """The model of this rank on ``device``: its share of the initial weights of ``seed``. Every rank calls it.

    Raises:
        UserError: sizes that make no model, or that the tensor-parallel size does not divide.
    """
    rank, size = topology.tensor_rank, topology.tensor_size
    check_tensor_size(config, size)
    with torch.device("meta"):
        model = MonetForCausalLM(config, collectives_of(topology), kernels, recompute)

    def share(name: str, full: Tensor) -> Tensor:
        return local_shard(name, full, config, rank, size)

    initialize(model, device, seed, share)
    if size > 1:
        mark_split_parameters(model)  # initialisation makes new parameters
    return model


def collectives_of(topology: Topology) -> Collectives:
    """What the model of a rank does together with the other ranks of ``topology``."""
    group = topology.tensor_group
    if group.size() == 1:
        return replace(ALONE, sum_over_batch=topology.sum_over_data)
    megatron = ModelParallelConfig(
        tensor_model_parallel_size=group.size(), use_cpu_initialization=True, perform_initialization=False
    )
    shared = {"init_method": None, "config": megatron, "tp_group": group}
    return Collectives(
        sum_over_batch=topology.sum_over_data,
        tensor_size=group.size(),
        enter=partial(enter_region, group=group),
        leave=partial(leave_region, group=group),
        embedding=partial(VocabParallelEmbedding, **shared),
        column=partial(_Column, **shared, bias=False),
        row=partial(_Row, **shared, bias=False, input_is_parallel=True, skip_bias_add=False),
        cross_entropy=vocab_parallel_cross_entropy,
        gather_logits=lambda logits: _Gather.apply(logits, group),
    )


def mark_split_parameters(model: MonetForCausalLM) -> None:
    """Mark the parameters of a split model as Megatron does.

    DeepSpeed's gradient norm counts a parameter without this mark on one tensor rank only.
    """
    for name, parameter in model.named_parameters():
        split = split_of(name, model.config)
        if split is not None:
            set_tensor_model_parallel_attributes(parameter, True, split.axis, 1)
