"""Small real corpora for the data tests."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep.__main__ import main
from data_prep.pipeline import ShardOptions
from data_prep.recipe import Recipe, Source, recipe_from
from data_prep.shards import prepare as prepare_shards
from data_prep.tokenizers import Tokenizer, load_tokenizer
from data_prep.train_tokenizer import TokenizerOptions, make_tokenizer
from monet_train.data.manifest import Manifest
from monet_train.data.megatron import IndexedDataset, IndexedDatasetBuilder

REPOSITORY = Path(__file__).parents[2]
SENTENCES = (
    "The cat sat on the mat.\nЁжик в тумане, 北京欢迎你 — naïve café.\n"
    "\tdef f(x):\n        return x + 1\n# </ABCDEF> ok\n"
)


def text_of(number: int) -> str:
    """A document whose text tells its number."""
    return f"Document {number}.\n" + SENTENCES[number % 7 :] * (1 + number % 5)


@pytest.fixture(scope="session")
def jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 documents in two files, with labels."""
    folder = tmp_path_factory.mktemp("jsonl")
    for part in range(2):
        lines = [
            json.dumps({"text": text_of(i), "lang": ("en", "ru")[i % 2], "source": "made up"}, ensure_ascii=False)
            for i in range(part * 150, part * 150 + 150)
        ]
        (folder / f"part-{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer(jsonl: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A SentencePiece model of 400 pieces."""
    folder = tmp_path_factory.mktemp("tokenizer") / "model"
    make_tokenizer(Recipe([Source(str(jsonl / "*.jsonl"))]), TokenizerOptions(400), folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def prepare(jsonl: Path, tokenizer: Tokenizer) -> Callable[..., Path]:
    """Make shards: ``prepare(out, sources=..., tokens_per_shard=..., **source options)`` -> ``out``."""

    def make(
        out: Path, sources: list[str] | None = None, tokens_per_shard: int = 4000, workers: int = 1, **options: object
    ) -> Path:
        recipe = recipe_from(sources or [str(jsonl / "*.jsonl")], options, {})
        prepare_shards(recipe, tokenizer, out, ShardOptions(tokens_per_shard, workers))
        return out

    return make


@pytest.fixture(scope="session")
def shards(prepare: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of several shards of the 300 documents. Read only."""
    return prepare(tmp_path_factory.mktemp("shards") / "corpus")


def write_megatron(prefix: Path, documents: list[list[list[int]]]) -> Path:
    """A pair as Megatron's tools make it: documents of one or more sequences, no manifest."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for document in documents:
        builder.add_document(np.concatenate(document), [len(sequence) for sequence in document])
    builder.finalize(f"{prefix}.idx")
    return prefix


def command(*arguments: object, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run ``monet-data`` in this process; the exit status."""
    monkeypatch.setattr(sys, "argv", ["monet-data", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """``data(arguments...)`` -> exit status, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        status = command(*arguments, monkeypatch=monkeypatch)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def documents_of(folder: Path, tokenizer: Tokenizer) -> list[str]:
    """The decoded documents, with a check that each ends with the end-of-text token once."""
    texts = []
    for record in Manifest.read(folder).shards:
        shard = IndexedDataset(str(folder / record.name))
        for i in range(len(shard)):
            tokens = shard[i].tolist()
            assert tokens[-1] == tokenizer.record.eos_id and tokens.count(tokenizer.record.eos_id) == 1
            texts.append(tokenizer.decode(tokens[:-1]))
    return texts


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
