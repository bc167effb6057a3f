"""Initial weights: a pure function of (seed, parameter name), so the same on any topology."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from monet_train.fingerprint import seed_from
from monet_train.model.config import MonetConfig
from monet_train.model.parameters import is_bias, is_norm
from monet_train.model.transformer import MonetForCausalLM


def initial_value(name: str, shape: torch.Size, config: MonetConfig, seed: int) -> Tensor:
    """The full initial value of a parameter: norms 1, biases 0, all else normal(0, initializer_range)."""
    if is_norm(name):
        return torch.ones(shape)
    if is_bias(name, config):
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(seed_from(f"{seed}/{name}"))
    return torch.empty(shape).normal_(0.0, config.initializer_range, generator=generator)


@torch.no_grad()
def initialize(
    model: MonetForCausalLM,
    device: torch.device,
    seed: int,
    share: Callable[[str, Tensor], Tensor] = lambda name, full: full,
) -> None:
    """Give a model built on the meta device its weights and buffers, on ``device``. Its parameters become new objects.

    One full parameter at a time is drawn on the CPU. ``share`` takes this process' part of the parameter ``name``.
    """
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in MonetForCausalLM(model.config).named_parameters()}
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        parameter.copy_(share(name, initial_value(name, shapes[name], model.config, seed)))
    for router in model.model.routers():
        router.norm1.reset()
        router.norm2.reset()
