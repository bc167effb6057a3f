"""Loading a Monet from any checkpoint that this project writes or the authors published."""

from __future__ import annotations

from pathlib import Path

import torch

from monet_train.checkpoints.layout import resolve_checkpoint
from monet_train.checkpoints.weights import check_weights, read_config, read_weights
from monet_train.kernels import Kernels
from monet_train.model.mask import ExpertSet
from monet_train.model.transformer import MonetForCausalLM


def load_pretrained(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    *,
    experts: str | Path | None = None,
    kernels: str = "auto",
    recompute: bool = False,
) -> MonetForCausalLM:
    """Load a model, in evaluation mode.

    Args:
        path: a published or exported Hugging Face folder, a training checkpoint, or a run folder (newest step).
        dtype: of the parameters; default: as stored. The routers' statistics are fp32 in any case.
        device: where the model goes.
        experts: file of an :class:`~monet_train.ExpertSet`, whose experts are masked.
        kernels: ``auto``, ``native`` or ``plain``: see :class:`monet_train.kernels.Kernels`.
        recompute: for training: recompute activations in the backward pass instead of keeping them.

    Raises:
        UserError: one line that names the file and the key: a missing or truncated file, another architecture, or a
            missing, unexpected or mis-shaped weight; or an expert set of another model.
    """
    chosen = None if experts is None else ExpertSet.load(experts)
    folder = resolve_checkpoint(path)
    config = read_config(folder)
    weights = read_weights(folder)
    check_weights(weights, config, folder)
    with torch.device("meta"):
        model = MonetForCausalLM(config, kernels=Kernels(kernels), recompute=recompute)
    for name, buffer in model.named_buffers():
        weights[name] = weights[name].to(buffer.dtype)  # a checkpoint in bf16 holds these in bf16 too
    model.load_state_dict(weights, assign=True)
    model = model.to(device=device, dtype=dtype).eval()
    if chosen is not None:
        chosen.apply(model)
    return model
