"""Pretraining of Monet language models: mixtures of monosemantic experts that can be read, masked and steered."""

from monet_train.model.config import MonetConfig
from monet_train.model.transformer import MonetForCausalLM

__all__ = ["MonetConfig", "MonetForCausalLM"]
