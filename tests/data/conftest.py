"""Shards of the small corpus."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import data_prep.shard_writer
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


def killed_at_sync(number: int, work: Callable[[], object]) -> int:
    """Status of a forked process that does ``work`` and kills itself at the n-th fsync of a shard's file (0: never).

    No timing decides.
    """
    child = os.fork()
    if child == 0:
        inner, count = data_prep.shard_writer.sync, itertools.count(1)

        def sync(path: Path) -> None:
            if next(count) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            inner(path)

        data_prep.shard_writer.sync = sync
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
