"""AdamW and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from monet_train.config.schema import OptimizerSection, ScheduleSection
from monet_train.model.parameters import is_bias
from monet_train.model.transformer import MonetForCausalLM


def build_optimizer(model: MonetForCausalLM, config: OptimizerSection) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: norms, biases and the experts' output biases are exempt.

    The output biases b, b1, b2 are matrices in shape, [E, d], but biases in kind. The learning rate starts at 0 and is
    set before every step: what a wrapper does to initialise its state must not move the weights.
    """
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (exempt if is_bias(name, model.config) or parameter.ndim < 2 else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
    betas = (config.betas[0], config.betas[1])
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=config.eps, fused=True)


def learning_rate(step: int, peak: float, total: int, schedule: ScheduleSection) -> float:
    """Learning rate of 0-based ``step``: linear warm-up, then cosine from ``peak`` to ``final`` x ``peak``.

    A pure function of the step, so a resumed run needs no state of it.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    decay_steps = max(1, total - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / decay_steps)
    return peak * (schedule.final + (1 - schedule.final) * 0.5 * (1 + math.cos(math.pi * progress)))
