"""How each module of a Monet is split over tensor-parallel ranks: the one place that says it.

The model itself is written without ranks. :data:`SPLITS` names, for every parameter, the axis that is cut;
:func:`split_model` puts Megatron's parallel layers in place of the plain ones; :func:`local_shard` and
:func:`join_shards` cut and join weights by the same table, for initialisation, import and export.

The experts are cut along their inner dimension m, not by expert: gates mix over half-experts at a fixed inner
unit, so every rank's partial output is exact and one all-reduce ends the layer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
    vocab_parallel_cross_entropy,
)
from torch import Tensor, nn

from monet_train.errors import UserError
from monet_train.model.config import MonetConfig
from monet_train.model.experts import Experts
from monet_train.model.transformer import MonetForCausalLM


@dataclass(frozen=True)
class Split:
    """A parameter is cut along ``axis``; ``by_expert``: within each half-expert, whose units lie side by side."""

    axis: int
    by_expert: bool = False


SPLITS: dict[str, Split] = {
    r"model\.embed_tokens\.weight": Split(0),
    r"lm_head\.weight": Split(0),
    r".*\.self_attn\.[qkv]_proj\.weight": Split(0),
    r".*\.self_attn\.o_proj\.weight": Split(1),
    r".*\.moe\.u[12]?\.(weight|bias)": Split(0, by_expert=True),
    r".*\.moe\.v([12]{2})?\.weight": Split(1, by_expert=True),
}  # everything else (norms, routers, output biases, statistics) is whole on every rank


def split_of(name: str) -> Split | None:
    """How the parameter ``name`` is split, or None where every rank holds it whole."""
    return next((split for pattern, split in SPLITS.items() if re.fullmatch(pattern, name)), None)


def local_shard(name: str, full: Tensor, experts: int, rank: int, size: int) -> Tensor:
    """The part of parameter ``name`` that tensor rank ``rank`` of ``size`` holds."""
    split = split_of(name)
    if split is None or size == 1:
        return full
    if not split.by_expert:
        return full.chunk(size, split.axis)[rank].contiguous()
    units = full.unflatten(split.axis, (experts, -1))
    return units.chunk(size, split.axis + 1)[rank].flatten(split.axis, split.axis + 1).contiguous()


def join_shards(name: str, shards: Sequence[Tensor], experts: int) -> Tensor:
    """The full parameter ``name`` from the parts of all tensor ranks, in rank order."""
    split = split_of(name)
    if split is None or len(shards) == 1:
        return shards[0]
    if not split.by_expert:
        return torch.cat(list(shards), split.axis)
    units = [shard.unflatten(split.axis, (experts, -1)) for shard in shards]
    return torch.cat(units, split.axis + 1).flatten(split.axis, split.axis + 1)


def check_tensor_size(config: MonetConfig, size: int) -> None:
    """Refuse a tensor-parallel size that does not divide the model, naming the sizes that do."""
    units = config.moe_dim // 2 if config.moe_decompose == "vertical" else config.moe_dim
    unit_name = "moe_dim/2" if config.moe_decompose == "vertical" else "moe_dim"
    widths = {
        f"model.{unit_name}={units}": units,
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


def split_model(model: MonetForCausalLM, group: dist.ProcessGroup) -> None:
    """Replace, in place, each module that is split by its tensor-parallel form of the same state-dict names.

    Weights are left uninitialised (the model is usually on the meta device here); see :mod:`.initialize`.
    """
    megatron = ModelParallelConfig(
        tensor_model_parallel_size=group.size(), use_cpu_initialization=True, perform_initialization=False
    )
    column = partial(_Column, config=megatron, init_method=None, bias=False, tp_group=group)
    row = partial(
        _Row, config=megatron, init_method=None, bias=False, input_is_parallel=True, skip_bias_add=False, tp_group=group
    )
    d, vocabulary = model.config.hidden_size, model.config.vocab_size
    model.model.embed_tokens = VocabParallelEmbedding(vocabulary, d, init_method=None, config=megatron, tp_group=group)
    model.lm_head = column(d, vocabulary)
    model.cross_entropy = vocab_parallel_cross_entropy
    model.gather_logits = partial(gather_from_tensor_model_parallel_region, group=group)
    for layer in chain.from_iterable(model.model.groups()):
        attention = layer.self_attn
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(attention, name, column(d, getattr(attention, name).out_features))
        attention.o_proj = row(d, d)
        _split_experts(layer.moe, model.config.moe_experts, group)


def mark_split_parameters(model: MonetForCausalLM) -> None:
    """Mark the parameters of a split model as Megatron does.

    DeepSpeed's gradient norm counts a parameter without this mark on one tensor rank only.
    """
    for name, parameter in model.named_parameters():
        split = split_of(name)
        if split is not None:
            set_tensor_model_parallel_attributes(parameter, True, split.axis, 1)


def _split_experts(moe: Experts, experts: int, group: dist.ProcessGroup) -> None:
    # The kernels take bare weights, so no parallel layer is needed here: smaller weights, and Megatron's
    # conjugate pair of copy (backward: all-reduce) and reduce (forward: all-reduce) around the kernel.
    moe.enter = partial(copy_to_tensor_model_parallel_region, group=group)
    moe.leave = partial(reduce_from_tensor_model_parallel_region, group=group)
    for name, parameter in list(moe.named_parameters()):
        if split_of(f".moe.{name}") is not None:
            owner, _, leaf = name.rpartition(".")
            shard = local_shard(f".moe.{name}", parameter.detach(), experts, group.rank(), group.size())
            setattr(moe.get_submodule(owner), leaf, nn.Parameter(shard.clone()))
