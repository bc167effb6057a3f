"""Shards of the small corpus."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.pipeline import ShardOptions
from data_prep.recipe import recipe_from
from data_prep.shards import prepare as prepare_shards
from monet_train.tokenizers import Tokenizer


@pytest.fixture(scope="session")
def prepare(jsonl: Path, tokenizer: Tokenizer) -> Callable[..., Path]:
    """Make shards: ``prepare(out, sources, **options of ShardOptions and of sources)`` -> ``out``."""

    def make(out: Path, sources: list[str] | None = None, **options: object) -> Path:
        how = {name: options.pop(name) for name in ShardOptions.__dataclass_fields__ if name in options}
        recipe = recipe_from(sources or [str(jsonl / "*.jsonl")], options, {})
        prepare_shards(recipe, tokenizer, out, ShardOptions(**{"tokens_per_shard": 4000} | how))
        return out

    return make


@pytest.fixture(scope="session")
def shards(prepare: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of several shards of the 300 documents. Read only."""
    return prepare(tmp_path_factory.mktemp("shards") / "corpus")
