"""What the trainer reads: order, packing, split, blends, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from monet_train.config.schema import DataSection
from monet_train.data import packing
from monet_train.data.corpus import Blend, Corpus, check_shards, held_out_mask, open_corpus
from monet_train.data.index_file import HEADER_BYTES, Index, check_index, read_index
from monet_train.data.labels import document_labels
from monet_train.data.manifest import Manifest
from monet_train.data.megatron import IndexedDataset
from monet_train.errors import UserError
from tests.support.corpora import text_of, write_megatron

S = 64


def open_(path: object, tmp_path: Path, **changes: object) -> Corpus:
    arguments = {"seq_length": S, "seed": 7, "vocab_size": 400, "train_sequences": 50, "valid_sequences": 8}
    arguments |= {name: changes.pop(name) for name in list(changes) if name in {*arguments, "cache_from_documents"}}
    config = dataclasses.replace(DataSection(path=path, validation_fraction=0.1), **changes)
    return open_corpus(config, cache_dir=tmp_path / "cache", **arguments)


def tokens_of(dataset: torch.utils.data.Dataset, count: int) -> torch.Tensor:
    return torch.stack([dataset[i].tokens for i in range(count)])


@pytest.fixture
def one_shard(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    return write_megatron(
        tmp_path / "megatron", [[random.integers(3, 400, random.integers(5, 200)).tolist()] for _ in range(200)]
    )


def test_an_epoch_is_what_gptdataset_builds(one_shard: Path, tmp_path: Path) -> None:
    corpus = open_(one_shard, tmp_path, validation_fraction=0.0)
    tokenizer = SimpleNamespace(vocab_size=400, eod=2, unique_identifiers={})
    config = GPTDatasetConfig(
        random_seed=7, sequence_length=S, split="1", blend=([str(one_shard)], None), tokenizer=tokenizer,
        path_to_cache=str(tmp_path / "gpt"), reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    reference = GPTDataset(
        IndexedDataset(str(one_shard)), str(one_shard), np.arange(200, dtype=np.int32), None, Split.train, config
    )
    assert len(reference) == corpus.train.per_epoch > 100
    for i in range(len(reference)):
        assert torch.equal(corpus.train[i].tokens[:-1], reference[i]["tokens"])
        assert torch.equal(corpus.train[i].tokens[1:], reference[i]["labels"])


def test_gptdataset_itself_reorders_a_longer_run(one_shard: Path, tmp_path: Path) -> None:
    """Why there is a reader of our own over the same files (docs/data.md)."""
    tokenizer = SimpleNamespace(vocab_size=400, eod=2, unique_identifiers={})
    config = GPTDatasetConfig(
        random_seed=7, sequence_length=S, split="1", blend=([str(one_shard)], None), tokenizer=tokenizer,
        path_to_cache=str(tmp_path / "gpt"), reset_position_ids=False, reset_attention_mask=False,
        eod_mask_loss=False, create_attention_mask=False,
    )  # fmt: skip
    ids = np.arange(200, dtype=np.int32)
    short, long = (
        GPTDataset(IndexedDataset(str(one_shard)), str(one_shard), ids, count, Split.train, config)
        for count in (100, 1000)
    )
    assert not torch.equal(short[0]["tokens"], long[0]["tokens"])


def test_sequences_do_not_depend_on_the_length_of_the_run(shards: Path, tmp_path: Path) -> None:
    short = open_(shards, tmp_path, train_sequences=10)
    long = open_(shards, tmp_path, train_sequences=100_000)
    assert (len(short.train), len(long.train)) == (10, 100_000)
    count = 3 * short.train.per_epoch
    assert torch.equal(tokens_of(short.train, count), tokens_of(long.train, count))
    assert short.fingerprint == long.fingerprint


def test_every_epoch_reads_every_token_once_in_another_order(shards: Path, tmp_path: Path) -> None:
    corpus = open_(shards, tmp_path, validation_fraction=0.0)
    n = corpus.train.per_epoch
    whole = np.sort(np.concatenate([np.array(p) for p in map(all_tokens, sorted(shards.glob("*.bin")))]))
    assert corpus.train_tokens == len(whole)
    epochs = [torch.stack([corpus.train[e * n + i].tokens for i in range(n)]) for e in range(2)]
    for epoch in epochs:
        assert epoch.shape == (n, S + 1)
        seen = np.bincount(epoch[:, :-1].flatten().numpy(), minlength=400)
        missing = np.bincount(whole, minlength=400) - seen
        assert (missing >= 0).all() and 1 <= missing.sum() <= S
    assert not torch.equal(epochs[0], epochs[1])


def all_tokens(path: Path) -> np.ndarray:
    return np.fromfile(path, dtype=np.uint16)


def test_the_order_does_not_depend_on_how_shards_are_cut(prepare, shards: Path, tmp_path: Path) -> None:
    other = prepare(tmp_path / "other", tokens_per_shard=1_000_000)
    assert len(list(other.glob("*.bin"))) == 1 < len(list(shards.glob("*.bin")))
    a, b = (open_(path, tmp_path) for path in (shards, other))
    assert torch.equal(tokens_of(a.train, 40), tokens_of(b.train, 40))


def test_seed_and_settings_decide_order_and_fingerprint(shards: Path, tmp_path: Path) -> None:
    base = open_(shards, tmp_path)
    assert torch.equal(tokens_of(base.train, 20), tokens_of(open_(shards, tmp_path).train, 20))
    other = open_(shards, tmp_path, seed=8)
    assert not torch.equal(tokens_of(base.train, 20), tokens_of(other.train, 20))
    assert torch.equal(tokens_of(base.valid, 8), tokens_of(other.valid, 8)), "held-out sequences stay"
    prints = {
        open_(shards, tmp_path, **change).fingerprint
        for change in ({}, {"seed": 8}, {"seq_length": 32}, {"validation_fraction": 0.2}, {"reset_attention": True})
    }
    assert len(prints) == 5


def test_the_fingerprint_belongs_to_the_contents(shards: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(shards, tmp_path / "elsewhere")
    assert open_(copy, tmp_path).fingerprint == open_(shards, tmp_path).fingerprint


def test_no_document_is_both_trained_and_held_out(tmp_path: Path) -> None:
    """Document d consists of the token d; Megatron's documents of several sequences stay whole."""
    documents = [[[3 + d] * 40, [3 + d] * (1 + d % 30)] for d in range(300)]
    prefix = write_megatron(tmp_path / "numbered", documents)
    corpus = open_(prefix, tmp_path, valid_sequences=10_000)
    train = tokens_of(corpus.train, corpus.train.per_epoch).unique()
    valid = tokens_of(corpus.valid, len(corpus.valid)).unique()
    assert not set(train.tolist()) & set(valid.tolist())
    assert len(train) + len(valid) >= 298 and 10 < len(valid) < 60
    assert corpus.documents == 300


def test_the_held_out_share_is_close_and_spread() -> None:
    mask = held_out_mask(100_000, 0.01)
    assert 900 < mask.sum() < 1100
    assert all(part.sum() > 60 for part in np.split(mask, 10))
    assert held_out_mask(20, 0.001).sum() == 1 and not held_out_mask(20, 0.0).any()


def test_borders_for_reset_are_those_of_the_documents(tmp_path: Path) -> None:
    documents = [[[3 + d] * (1 + d % 90)] for d in range(300)]
    prefix = write_megatron(tmp_path / "numbered", documents)
    corpus = open_(prefix, tmp_path, reset_attention=True, reset_positions=True, validation_fraction=0.0)
    borders = 0
    for i in range(corpus.train.per_epoch):
        tokens, segments, positions, _ = corpus.train[i]
        assert tokens.shape == (S + 1,) and segments.shape == positions.shape == (S,)
        starts = torch.cat([torch.tensor([True]), tokens[1:-1] != tokens[:-2]])
        assert torch.equal(segments, starts.cumsum(0) - 1)
        assert torch.equal(positions == 0, starts)
        assert torch.equal(torch.diff(positions)[~starts[1:]], torch.ones_like(torch.diff(positions)[~starts[1:]]))
        borders += int(starts.sum()) - 1
    assert borders > 50
    plain = open_(prefix, tmp_path, validation_fraction=0.0)
    assert plain.train[0].segment_ids is None and plain.train[0].positions is None


def test_a_blend_keeps_its_weights_and_the_order_of_its_parts(tmp_path: Path) -> None:
    a = write_megatron(tmp_path / "a", [[[10] * 50] for _ in range(100)])
    b = write_megatron(tmp_path / "b", [[[20] * 50] for _ in range(100)])
    blend = open_([str(a), str(b)], tmp_path, weights=[3.0, 1.0])
    kinds = torch.tensor([int(blend.train[i].tokens[0]) for i in range(1000)])
    for window in kinds.split(100):
        assert abs(int((window == 10).sum()) - 75) <= 1
    pool = open_([str(a), str(b)], tmp_path)
    share = np.mean([float((pool.train[i].tokens == 10).float().mean()) for i in range(100)])
    assert 0.4 < share < 0.6
    assert blend.train_tokens == pool.train_tokens or abs(blend.train_tokens - pool.train_tokens) < 2000


@pytest.mark.parametrize("weights", [None, [3.0, 1.0]], ids=["pool", "blend"])
def test_a_sequence_tells_its_documents_and_their_labels(
    weights: list[float] | None, shards: Path, prepare, tokenizer, tmp_path: Path
) -> None:
    other = prepare(tmp_path / "other", labels={"domain": "elsewhere"}, tokens_per_shard=9000)
    corpus = open_([str(shards), str(other)], tmp_path, weights=weights)
    domains = set()
    opened = {prefix.with_suffix(""): IndexedDataset(str(prefix.with_suffix("")))
              for folder in (shards, other) for prefix in folder.glob("*.bin")}  # fmt: skip
    for i in range(corpus.readings[0].per_epoch - 5, corpus.readings[0].per_epoch + 60):
        pieces = corpus.train.pieces(i)
        texts = [opened[p.shard].get(p.document, p.offset, p.length) for p in pieces]
        assert np.array_equal(np.concatenate(texts), corpus.train[i].tokens.numpy())
        assert sum(piece.length for piece in pieces) == S + 1
        for piece in pieces:
            labels = document_labels(piece.shard, piece.document)
            whole = tokenizer.decode(opened[piece.shard][piece.document].tolist())
            number = int(whole.removeprefix("Document ").split(".")[0])
            domain = "elsewhere" if piece.shard.parent == other else None
            size = len(text_of(number).encode())
            assert labels == {
                "lang": ("en", "ru")[number % 2], "domain": domain, "source": "made up", "bytes": size
            }  # fmt: skip
            domains.add(domain)
    assert len(domains) == 2


def test_labels_that_are_not_there_are_refused(shards: Path, one_shard: Path) -> None:
    with pytest.raises(UserError, match="shard has"):
        document_labels(shards / "shard-00000", 300)
    with pytest.raises(UserError, match=r"megatron.labels.parquet: the file is missing"):
        document_labels(one_shard, 0)


@pytest.mark.parametrize("weights", [None, [3.0, 1.0]], ids=["pool", "blend"])
def test_a_run_states_its_epochs_exactly(weights: list[float] | None, tmp_path: Path) -> None:
    """Compared with a count over the sequences themselves."""
    a = write_megatron(tmp_path / "a", [[[10] * 50] for _ in range(100)])
    b = write_megatron(tmp_path / "b", [[[20] * 50] for _ in range(100)])
    corpus = open_([str(a), str(b)], tmp_path, weights=weights, train_sequences=1001)
    counts = [reading.sequences for reading in corpus.readings]
    assert sum(counts) == 1001
    if weights:
        blends = [corpus.train, *(Blend(corpus.train.parts, weights, 1001, period) for period in (256, 7))]
        for blend in blends:  # short of its period, and over it
            drawn = Counter(blend.pieces(i)[0].shard.name for i in range(1001))
            assert blend.counts() == [drawn["a"], drawn["b"]]
        assert counts == blends[0].counts()
    else:
        per_epoch = (corpus.train_tokens - 1) // S
        assert str(corpus.readings[0]) == f"{1001 // per_epoch} epochs and {1001 % per_epoch} of {per_epoch} " + (
            f"sequences of {a}, {b}"
        )


def test_a_big_index_is_cached_once_and_read_as_built(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = tokens_of(open_(shards, tmp_path).train, 30)
    cache = tmp_path / "index"
    cached = {"cache_dir": str(cache), "cache_from_documents": 1}
    assert torch.equal(tokens_of(open_(shards, tmp_path, **cached).train, 30), wanted)
    monkeypatch.setattr(packing, "build_epoch", lambda *_: pytest.fail("built again"))
    assert torch.equal(tokens_of(open_(shards, tmp_path, **cached).train, 30), wanted)
    assert list(cache.iterdir()) and not list(cache.glob("*.tmp"))


@pytest.mark.parametrize("locks", [True, False], ids=["one node", "no locks"])
def test_processes_that_race_for_the_index_cache_read_the_same(
    locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks of a node have the lock; nodes over a file system without locks build twice, and one rename wins."""
    if not locks:

        def refuse(*_: object) -> None:
            raise OSError("no locks here")

        monkeypatch.setattr(packing.filelock.FileLock, "acquire", refuse)
    lengths = np.random.default_rng(0).integers(1, 300, 5000).astype(np.int32)
    wanted = packing.build_epoch(lengths, np.arange(5000), S, 3)

    def build() -> packing.EpochIndex:
        with (tmp_path / "built").open("a") as stream:
            stream.write("x")
        time.sleep(0.3)  # so that all are at it
        return packing.build_epoch(lengths, np.arange(5000), S, 3)

    def rank() -> None:
        index = packing.IndexCache(tmp_path / "cache").load("key", build)
        same = all(np.array_equal(a, b) for a, b in zip(index, wanted, strict=True))
        os._exit(0 if same else 1)

    ranks = [multiprocessing.get_context("fork").Process(target=rank) for _ in range(4)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0] * 4
    built = len((tmp_path / "built").read_text())
    assert built == 1 if locks else 2 <= built <= 4
    assert not list((tmp_path / "cache").glob("*.tmp"))


@pytest.mark.parametrize("damage", ["emptied", "cut", "another", "gone"])
def test_a_damaged_index_cache_is_built_again_once(damage: str, tmp_path: Path) -> None:
    lengths = np.full(50, 20, dtype=np.int32)
    wanted = packing.build_epoch(lengths, np.arange(50), S, 3)
    built = []

    def build() -> packing.EpochIndex:
        built.append(1)
        return wanted

    cache = packing.IndexCache(tmp_path)
    cache.load("key", build)
    for name in packing.EpochIndex._fields:
        (file,) = tmp_path.glob(f"*/{name}.npy")
        if damage == "another":
            np.save(file, np.arange(3))
        elif damage == "gone":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[: 0 if damage == "emptied" else -8])
        for _ in range(2):
            assert all(np.array_equal(a, b) for a, b in zip(cache.load("key", build), wanted, strict=True))
    assert len(built) == 4 and not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("content", [b"", b'{"documents', b"[]", b"\xff"])
def test_damaged_facts_are_counted_again(content: bytes, tmp_path: Path) -> None:
    cache = packing.IndexCache(tmp_path)
    cache.load_facts("key", lambda: {"documents": 3})
    (file,) = tmp_path.iterdir()
    file.write_bytes(content)
    assert cache.load_facts("key", lambda: {"documents": 3}) == {"documents": 3}
    assert cache.load_facts("key", lambda: pytest.fail("counted again")) == {"documents": 3}


def test_cached_facts_can_be_read_by_those_whom_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert packing.IndexCache(tmp_path).load_facts("key", lambda: {"documents": 3}) == {"documents": 3}
    finally:
        os.umask(before)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_mode & 0o777 == 0o640


def test_facts_of_the_corpus(shards: Path, tmp_path: Path) -> None:
    corpus = open_(shards, tmp_path)
    manifest = Manifest.read(shards)
    assert corpus.documents == manifest.documents == 300
    assert corpus.vocab_size == 400
    assert corpus.tokenizer is not None and corpus.tokenizer.path == shards / "tokenizer.model"
    assert 0.8 * manifest.tokens < corpus.train_tokens < manifest.tokens
    assert open_(shards, tmp_path, valid_sequences=0).valid is None
    assert open_(shards, tmp_path, validation_fraction=0.0).valid is None


def broken(shards: Path, tmp_path: Path) -> Path:
    return shutil.copytree(shards, tmp_path / "broken")


def refused(path: object, words: str, vocab_size: int = 400, **changes: object) -> None:
    with pytest.raises(UserError, match=words) as error:
        check_shards(dataclasses.replace(DataSection(path=path), **changes), vocab_size)
    assert "\n" not in str(error.value)


def test_a_vocabulary_that_is_too_small_is_refused(shards: Path, one_shard: Path) -> None:
    check_shards(DataSection(path=str(shards)), 400)
    refused(str(shards), "400 pieces.*only 300: set model.vocab_size=400", vocab_size=300)
    check_shards(DataSection(path=str(one_shard)), 400)
    refused(str(one_shard), "tokens from 3 to 399", vocab_size=399)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_missing_and_truncated_shards_are_refused(shards: Path, tmp_path: Path, suffix: str) -> None:
    folder = broken(shards, tmp_path)
    file = folder / f"shard-00001.{suffix}"
    file.write_bytes(file.read_bytes()[:-2])
    refused(str(folder), rf"shard-00001.{suffix} has .* bytes")
    file.unlink()
    refused(str(folder), rf"shard-00001.{suffix} is missing")


def test_an_index_from_elsewhere_is_refused(shards: Path, tmp_path: Path) -> None:
    folder = broken(shards, tmp_path)
    (folder / "shard-00000.idx").write_bytes((folder / "shard-00001.idx").read_bytes())
    refused(str(folder), "shard-00000.bin has .*, its index shard-00000.idx says")
    (folder / "shard-00000.idx").write_bytes(b"no index at all" * 10)
    refused(str(folder), "shard-00000.idx is not a Megatron index")


def test_a_bad_manifest_is_refused(shards: Path, tmp_path: Path) -> None:
    folder = broken(shards, tmp_path)
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    path.write_text("{")
    refused(str(folder), "manifest.json cannot be read")
    path.write_text(json.dumps({key: value for key, value in values.items() if key != "tokenizer"}))
    refused(str(folder), "lacks the field 'tokenizer'")
    path.write_text(json.dumps({**values, "fingerprint": "0"}))
    refused(str(folder), "changed by hand")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("recipe", {}, "`recipe.tasks` is null, not a whole number"),
        ("recipe files", [[5]], "`recipe.files` has an entry"),
        ("recipe", None, "`manifest.recipe` is null, not an object"),
        ("documents", "x", '`manifest.documents` is "x", not a whole number'),
        ("tokens", 0, "is empty or 0"),
        ("documents", 0, "is empty or 0"),
        ("tokens", -1, "`manifest.tokens` is negative"),
        ("shards", [], "is empty or 0"),
        ("tokenizer vocabulary_size", None, "`manifest.tokenizer.vocabulary_size` is null"),
        ("tokenizer file", 5, "`manifest.tokenizer.file` is 5, not a text"),
        ("tokenizer bos_id", [1], "`manifest.tokenizer.bos_id` is .*, not a whole number"),
        ("tokenizer", {}, "`manifest.tokenizer` lacks the field 'file'"),
        ("shards 0 name", 5, "`manifest.shards.0..name` is 5, not a text"),
        ("shards 0 more", 5, "`manifest.shards.0.` has the unknown field 'more'"),
        ("shards 0 start part", "a", '`manifest.shards.0..start.part` is "a", not a whole number'),
        ("shards 0 files bin bytes", "a", '`manifest.shards.0..files.bin.bytes` is "a", not a whole number'),
        ("shards 0 files", {}, "shard-00000 lacks bin, idx, labels.parquet"),
        ("shards 0 labels lang en", [1], "the counts of `lang`"),
    ],
)
def test_a_wrong_field_of_the_manifest_is_named(
    place: str, value: Any, message: str, shards: Path, tmp_path: Path
) -> None:
    folder = broken(shards, tmp_path)
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    *where, last = place.split()
    inner = values
    for key in where:
        inner = inner[int(key) if isinstance(inner, list) else key]
    inner[last] = value
    path.write_text(json.dumps(values))
    refused(str(folder), f"manifest.json: .*{message}")


def test_paths_and_weights_that_make_no_sense_are_refused(shards: Path, tmp_path: Path) -> None:
    refused(str(tmp_path / "nowhere"), "no shards at .*nowhere")
    refused(str(tmp_path), "no shards in")
    refused("???", "data.path is not set")
    refused(None, "data.path=None")
    refused("memory://bucket/corpus", "memory://bucket/corpus is an address")
    refused(str(shards), "data.weights has 2 numbers for 1 paths", weights=[1.0, 2.0])
    refused(str(shards), r"data.weights=\[0.0\] must be positive", weights=[0.0])
    refused(str(shards), "validation_fraction=1.5", validation_fraction=1.5)


HUGE, SMALL = 2000, 20
# tokens of each document (number 1 is held out first), fraction, eval.sequences, fragments of the line
FEW_DOCUMENTS = {
    "too little text": ([30, 30], 0.1, 8, ["has only 60 tokens, a sequence needs 65", "add text"]),
    "one document": ([HUGE], 0.01, 8, ["is one document", "data.validation_fraction=0 or eval.every=null"]),
    "the huge one held out": (
        [SMALL, HUGE, SMALL],
        0.01,
        0,
        ["40 of 2,040 tokens are for", "validation_fraction=0 to"],
    ),
    "most held out": ([SMALL, HUGE, HUGE], 0.9, 0, ["20 of 4,020 tokens are for", "validation_fraction=0 to train"]),
    "a small one held out": ([HUGE, SMALL], 0.01, 8, ["20 of 2,020 tokens are held", "validation_fraction=0 or eval."]),
}


@pytest.mark.parametrize("case", FEW_DOCUMENTS)
def test_few_documents_are_refused_with_the_key_that_helps(case: str, tmp_path: Path) -> None:
    lengths, fraction, sequences, fragments = FEW_DOCUMENTS[case]
    prefix = write_megatron(tmp_path / "few", [[[5] * length] for length in lengths])
    with pytest.raises(UserError) as refusal:
        open_(prefix, tmp_path, validation_fraction=fraction, valid_sequences=sequences)
    for fragment in fragments:
        assert fragment in str(refusal.value)
    if sum(lengths) > S:  # and that key does help
        corpus = open_(prefix, tmp_path, validation_fraction=0.0, valid_sequences=sequences)
        assert (corpus.train_tokens, corpus.valid) == (sum(lengths), None)


def test_an_only_document_is_trained_on(tmp_path: Path) -> None:
    """Without evaluation nothing has to be held out, alone or as one of several weighted paths."""
    one = write_megatron(tmp_path / "one", [[[5] * HUGE]])
    corpus = open_(one, tmp_path, validation_fraction=0.01, valid_sequences=0)
    assert (corpus.train_tokens, corpus.valid_tokens, corpus.valid) == (HUGE, 0, None)
    many = write_megatron(tmp_path / "many", [[[6] * 100] for _ in range(100)])
    corpus = open_([str(one), str(many)], tmp_path, weights=[1.0, 1.0])
    assert {int(corpus.train[i].tokens[0]) for i in range(20)} == {5, 6}
    assert corpus.valid is not None
    assert {int(corpus.valid[i].tokens[0]) for i in range(len(corpus.valid))} == {6}


@pytest.mark.parametrize("documents", [1, 2, 3, 10])
@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999999])
def test_never_are_all_documents_held_out(documents: int, fraction: float) -> None:
    held_out = int(held_out_mask(documents, fraction).sum())
    assert min(1, documents - 1) <= held_out < documents


@pytest.mark.parametrize("change", [{"sha256": "0" * 64}, {"eos_id": 7}], ids=str)
def test_shards_of_two_tokenizers_are_not_mixed(change: dict[str, Any], shards: Path, tmp_path: Path) -> None:
    folder = broken(shards, tmp_path)
    manifest = Manifest.read(folder)
    other = dataclasses.replace(manifest, tokenizer=dataclasses.replace(manifest.tokenizer, **change))
    (folder / "manifest.json").write_text(other.to_json())
    refused([str(shards), str(folder)], "different tokenizers")


def test_another_tokenizer_beside_the_shards_is_refused(shards: Path, tmp_path: Path) -> None:
    """It would be copied into every checkpoint."""
    folder = broken(shards, tmp_path)
    file = folder / "tokenizer.model"
    file.write_bytes(file.read_bytes() + b"?")
    refused(str(folder), "tokenizer.model is not the tokenizer that made the shards: put the tokenizer that made")
    file.unlink()
    refused(str(folder), "tokenizer.model is missing: put")


@pytest.mark.parametrize("weights", [None, [1.0, 1.0]], ids=["pool", "blend"])
def test_a_shard_that_is_named_twice_is_refused(weights: object, shards: Path, tmp_path: Path) -> None:
    """Its documents would be both trained and held out."""
    (tmp_path / "link").symlink_to(shards)
    for again in (shards, tmp_path / "link", shards / "shard-00001.bin"):
        refused([str(shards), str(again)], "both name the shard .*shard-0000", weights=weights)


@pytest.mark.parametrize(
    ("part", "item", "value"),
    [
        (0, 3, -5),
        (0, 3, 10**6),
        (1, 0, 1),
        (1, 7, 2**40),
        (1, 7, -2),
        (2, 0, 1),
        (2, 7, 0),
        (2, 7, 10**6),
        (2, -1, 299),
    ],
)
@pytest.mark.parametrize("block", [4, 1 << 20])
def test_an_index_with_wrong_contents_is_refused(part: int, item: int, value: int, block: int, tmp_path: Path) -> None:
    """Of the right size, with a right last length and pointer: Megatron's reader would take any of them."""
    prefix = write_megatron(tmp_path / "a", [[[5] * (40 + i), [], [6] * i] for i in range(100)])
    open_(prefix, tmp_path)
    check_index(prefix, block)
    index = Index(*(np.array(array) for array in read_index(prefix)))
    index[part][item] = value
    file = Path(f"{prefix}.idx")
    file.write_bytes(file.read_bytes()[:HEADER_BYTES] + b"".join(array.tobytes() for array in index))
    with pytest.raises(UserError, match=r"a\.idx is damaged.*restore it"):
        check_index(prefix, block)
    with pytest.raises(UserError, match=r"a\.idx is damaged.*restore it"):
        open_(prefix, tmp_path)
