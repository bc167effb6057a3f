"""The optimizers that ``optimizer.name`` chooses from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from monet_train.config.schema import OptimizerSection
from monet_train.errors import UserError
from monet_train.model.parameters import is_bias
from monet_train.model.transformer import MonetForCausalLM

Builder = Callable[[MonetForCausalLM, OptimizerSection], torch.optim.Optimizer]


def adamw(model: MonetForCausalLM, config: OptimizerSection) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: norms, biases and the experts' output biases are exempt."""
    betas = (config.betas[0], config.betas[1])
    groups = decay_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=config.eps, fused=True)


def decay_groups(model: MonetForCausalLM, weight_decay: float) -> list[dict[str, object]]:
    """Parameter groups: matrices with ``weight_decay``, everything else without.

    The output biases b, b1, b2 are matrices in shape, [E, d], but biases in kind.
    """
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (exempt if is_bias(name, model.config) or parameter.ndim < 2 else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": exempt, "weight_decay": 0.0}]


OPTIMIZERS: dict[str, Builder] = {"adamw": adamw}


def check_optimizer(config: OptimizerSection) -> None:
    """Refuse an ``optimizer.name`` that is not in the table."""
    if config.name not in OPTIMIZERS:
        raise UserError(f"optimizer.name={config.name} is unknown; use one of {', '.join(OPTIMIZERS)}")


def build_optimizer(model: MonetForCausalLM, config: OptimizerSection) -> torch.optim.Optimizer:
    """The optimizer of a run.

    Its learning rate starts at 0 and is set before every step, so that whatever a wrapper does to initialise its state
    cannot move the weights.
    """
    return OPTIMIZERS[config.name](model, config)
