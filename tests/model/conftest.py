"""Small models of both decompositions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from monet_train.model.config import MonetConfig
from monet_train.model.initialize import initialize
from monet_train.model.transformer import MonetForCausalLM

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_models(one_thread: None) -> None:
    """The models here are small."""


@pytest.fixture(params=["vertical", "horizontal"])
def moe_decompose(request: pytest.FixtureRequest) -> str:
    """Each of the two decompositions."""
    return request.param


@pytest.fixture
def config(moe_decompose: str) -> MonetConfig:
    """Two routing groups of two layers; every width divides by 4."""
    return MonetConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=32,
        moe_dim=8, moe_heads=3, moe_experts=16, moe_topk=4, moe_groups=2, moe_decompose=moe_decompose,
        initializer_range=0.3,
    )  # fmt: skip


@pytest.fixture
def build() -> Callable[..., MonetForCausalLM]:
    """Builds a model in evaluation mode, with weights large enough that everything matters.

    Options are those of its constructor.
    """

    def make(config: MonetConfig, **options: Any) -> MonetForCausalLM:
        with torch.device("meta"):
            model = MonetForCausalLM(config, **options)
        initialize(model, CPU, seed=0)
        return model.eval()

    return make


def tokens(batch: int, length: int, vocabulary: int = 64) -> torch.Tensor:
    """Random token ids [batch, length], the same every time."""
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
