"""What each parameter of a Monet is, by its name: a norm, a bias, and how it is split over tensor-parallel ranks."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor

from monet_train.model.config import MonetConfig
from monet_train.model.experts import decomposition
from monet_train.parallel.splits import Split

# Outside the expert layers, whose classes say it themselves. Everything else is whole on every rank.
SPLITS = {
    r"model\.embed_tokens\.weight": Split(0),
    r"lm_head\.weight": Split(0),
    r"model\.layers\.\d+\.self_attn\.[qkv]_proj\.weight": Split(0),
    r"model\.layers\.\d+\.self_attn\.o_proj\.weight": Split(1),
}
EXPERTS = re.compile(r"model\.layers\.\d+\.moe\.(.+)")  # group 1: the name within the expert layer


def is_norm(name: str) -> bool:
    """Whether this is the scale of an RMSNorm. They begin at 1."""
    return name.endswith("norm.weight")


def is_bias(name: str, config: MonetConfig) -> bool:
    """Whether this is a bias: of a projection, or an output bias of the experts (a matrix in shape, a bias in kind).

    They begin at 0 and are exempt from weight decay.
    """
    expert = EXPERTS.fullmatch(name)
    return name.endswith(".bias") or (expert is not None and expert[1] in decomposition(config.moe_decompose).biases)


def split_of(name: str, config: MonetConfig) -> Split | None:
    """How a parameter is split over tensor-parallel ranks, or None where every rank holds it whole."""
    if expert := EXPERTS.fullmatch(name):
        return decomposition(config.moe_decompose).splits.get(expert[1])
    return next((split for pattern, split in SPLITS.items() if re.fullmatch(pattern, name)), None)


def local_shard(name: str, full: Tensor, config: MonetConfig, rank: int, size: int) -> Tensor:
    """The part of parameter ``name`` that tensor rank ``rank`` of ``size`` holds."""
    split = split_of(name, config)
    return full if split is None or size == 1 else split.cut(full, config.moe_experts, rank, size)


def join_shards(name: str, shards: Sequence[Tensor], config: MonetConfig) -> Tensor:
    """The full parameter ``name`` from the parts of all tensor ranks, in rank order."""
    split = split_of(name, config)
    return shards[0] if split is None or len(shards) == 1 else split.join(shards, config.moe_experts)
