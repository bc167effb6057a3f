"""The whole model on one rank, from ZeRO and tensor-parallel parts."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from monet_train.model.config import MonetConfig
from monet_train.model.parameters import join_shards, split_of
from monet_train.model.transformer import MonetForCausalLM
from monet_train.parallel.groups import Topology


@torch.no_grad()
def full_state_dict(model: MonetForCausalLM, topology: Topology, zero_stage: int) -> dict[str, Tensor]:
    """Parameters and buffers under their published names, on the CPU of global rank 0; elsewhere empty.

    Every rank calls it. One parameter at a time is gathered, so no device holds more than one whole.
    """
    is_main = dist.get_rank() == 0
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        with _whole_over_data(parameter, zero_stage):
            # data rank 0 holds the answer; the other data ranks only help ZeRO to gather
            if topology.data_rank == 0:
                full = _join_over_tensor(name, parameter.detach(), model.config, topology)
                if is_main:
                    state[name] = full.to("cpu", copy=True).contiguous()
    if is_main:
        persistent = model.state_dict().keys()
        state |= {n: buffer.to("cpu", copy=True) for n, buffer in model.named_buffers() if n in persistent}
    return state


def _whole_over_data(parameter: Tensor, zero_stage: int) -> Any:
    if zero_stage < 3:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])


def _join_over_tensor(name: str, part: Tensor, config: MonetConfig, topology: Topology) -> Tensor:
    if topology.tensor_size == 1 or split_of(name, config) is None:
        return part
    parts = [torch.empty_like(part) for _ in range(topology.tensor_size)] if topology.tensor_rank == 0 else None
    dist.gather(part.contiguous(), parts, group=topology.tensor_group, group_dst=0)
    return part if parts is None else join_shards(name, parts, config)
