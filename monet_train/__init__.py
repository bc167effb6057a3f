"""Pretraining of Monet language models: mixtures of monosemantic experts that can be read, masked and steered."""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from monet_train.checkpoints.load import load_pretrained
    from monet_train.interop.export import save_pretrained
    from monet_train.model.config import MonetConfig
    from monet_train.model.mask import ExpertSet
    from monet_train.model.transformer import MonetForCausalLM

__all__ = ["ExpertSet", "MonetConfig", "MonetForCausalLM", "load_pretrained", "save_pretrained"]

# Megatron-core warns at import that optional GPU packages are absent; nothing here uses them.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")

_HOMES = {
    "ExpertSet": "monet_train.model.mask",
    "MonetConfig": "monet_train.model.config",
    "MonetForCausalLM": "monet_train.model.transformer",
    "load_pretrained": "monet_train.checkpoints.load",
    "save_pretrained": "monet_train.interop.export",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `monet-data` and its workers do not need torch, whose import takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
