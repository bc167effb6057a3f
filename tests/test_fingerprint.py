"""Fingerprints of earlier versions stay valid: one value of each, as the first release made it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from data_prep import installed, sources
from monet_train.config.schema import DataSection
from monet_train.data.corpus import held_out_mask, open_corpus
from monet_train.data.manifest import FileRecord, Manifest, Position, ShardRecord, TokenizerRecord
from monet_train.data.shards import find_shards
from monet_train.fingerprint import cache_name, mix, sha256_file, sha256_samples, sha256_text
from monet_train.model.config import MonetConfig
from monet_train.model.initialize import initial_value
from tests.support.corpora import write_megatron


def test_manifest() -> None:
    tokenizer = TokenizerRecord("t.model", "sentencepiece", "ab" * 32, 512, 2, 1, 0)
    files = {
        suffix: FileRecord(10, digit * 64) for suffix, digit in (("bin", "1"), ("idx", "2"), ("labels.parquet", "3"))
    }
    shard = ShardRecord("shard_00000", 2, 5, 20, Position(0, 0, 0), Position(0, 0, 2), files, {})
    manifest = Manifest(tokenizer, "uint16", 2, 5, 20, {}, {}, {"tasks": 1, "files": []}, [shard])
    assert manifest.fingerprint == "aa659cd9ab0da87fc9ab6be70458b03dceaaf0b5ddb5e7a8080c5fe3f501277e"


def test_shards_without_a_manifest_and_their_corpus(tmp_path: Path) -> None:
    prefix = write_megatron(tmp_path / "megatron", [[list(range(3, 3 + n % 50 + 1))] for n in range(200)])
    assert find_shards(prefix).fingerprint == "c4be65f5847a75aadb7de1cabc7d21647403e0fa51cdbcc6a23501284c0ab28a"
    corpus = open_corpus(
        DataSection(path=str(prefix), validation_fraction=0.1), seq_length=64, seed=7, vocab_size=400,
        train_sequences=5, valid_sequences=2, cache_dir=tmp_path / "cache",
    )  # fmt: skip
    assert corpus.fingerprint == "686def55f42f8d4e9df8c7c5cf4859d65705b1891cf7f53a9b5327927306f148"


def test_index_cache() -> None:
    assert cache_name("abc 0.01 split") == "e113780f8d3c10cc2398216e"


def test_held_out_documents() -> None:
    assert np.flatnonzero(held_out_mask(300, 0.02)).tolist() == [48, 68, 120, 133, 173, 186, 196, 295]
    assert list(map(hex, mix(np.arange(2, dtype=np.uint64)).tolist())) == ["0xe220a8397b1dcdaf", "0x910a2dec89025cc1"]


def test_initial_weights() -> None:
    value = initial_value("model.layers.0.self_attn.q_proj.weight", torch.Size((2, 2)), MonetConfig(), 7)
    assert torch.allclose(value, torch.tensor([[0.0212, 0.0125], [0.0002, -0.0215]]), atol=5e-5)


def test_sources() -> None:
    order = "8aac9d23a4e340f034a9daa0efca686faad1b85b5dc8a02e109104155fb72f0c"
    assert installed._order(Path("json/__init__.py")) == order
    version = "files e606f98c5e1367f480822b7cd61e5d3d3928b8b2a101fb6529dc1bb12346a36c"
    assert sources._version(["hf://x/y"]) == version


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"text")
    assert sha256_file(file) == sha256_text("text")
    assert sha256_samples(["a", file]) == sha256_text("atexttext")  # a short file's first and last MiB are the same
    assert sha256_text("\udcff") != sha256_text("\udcfe")  # of a file name that is not UTF-8
