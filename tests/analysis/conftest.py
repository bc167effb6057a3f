"""A small model, and labelled shards that it reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_prep.pipeline import ShardOptions
from data_prep.recipe import recipe_from
from data_prep.shards import prepare as prepare_shards
from monet_train.analysis.atlas import Atlas
from monet_train.analysis.collect import collect
from monet_train.analysis.plan import Plan, Request, make_plan
from monet_train.checkpoints.weights import write_model
from monet_train.model.config import MonetConfig
from monet_train.model.initialize import initialize
from monet_train.model.transformer import MonetForCausalLM
from monet_train.tokenizers import StoredTokenizer, Tokenizer
from tests.support.corpora import text_of

DOCUMENTS = 60
EXPERTS = 16
REQUEST = Request(tokens_per_label=None, window=32)


@pytest.fixture(scope="session")
def labelled(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Shards of made-up documents: ``labelled(name, order)`` -> folder. The order decides in which shard each is."""
    root = tmp_path_factory.mktemp("labelled")

    def make(name: str, order: range | list[int] = range(DOCUMENTS), tokens_per_shard: int = 2000) -> Path:
        out = root / name
        if not out.exists():
            lines = [
                json.dumps(
                    {"text": text_of(i), "lang": ("en", "ru", "zh")[i % 3], "source": "ab"[i % 2]}
                    | ({"toxicity": i % 7 - 2.5} if i % 5 else {})  # not known of every fifth
                )
                for i in order
            ]
            source = root / f"{name}.jsonl"
            source.write_text("\n".join(lines) + "\n")
            recipe = recipe_from([str(source)], {"keep": {"toxicity": "number"}}, {})
            prepare_shards(recipe, tokenizer, out, ShardOptions(tokens_per_shard=tokens_per_shard))
        return out

    return make


@pytest.fixture(scope="session", params=["vertical", "horizontal"])
def model(request: pytest.FixtureRequest) -> MonetForCausalLM:
    """A model of two routing groups with weights so large that experts differ. Read only."""
    config = MonetConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        moe_experts=EXPERTS, moe_heads=3, moe_dim=4, moe_topk=3, moe_groups=2, max_position_embeddings=128,
        moe_decompose=request.param, initializer_range=0.3,
    )  # fmt: skip
    with torch.device("meta"):
        built = MonetForCausalLM(config)
    initialize(built, torch.device("cpu"), seed=0)
    return built.eval()


@pytest.fixture(scope="session")
def model_folder(model: MonetForCausalLM, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model on disk, with its tokenizer. Read only."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, model.state_dict(), model.config, StoredTokenizer(tokenizer.path, tokenizer.record))
    return folder


@pytest.fixture(autouse=True)
def small_models(one_thread: None) -> None:
    """The models here are small."""


@pytest.fixture(scope="session")
def plan(labelled: Callable[..., Path]) -> Plan:
    return make_plan([labelled("corpus")], REQUEST, vocab_size=400)


@pytest.fixture(scope="session")
def atlas(model: MonetForCausalLM, plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Atlas:
    out = tmp_path_factory.mktemp("atlas") / "atlas"
    collect(model, plan, out, [0, 1])
    return Atlas(out)
