"""What the trainer reads: the training and the held-out sequences of one or several shard sets."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from monet_train.data.index_file import check_index
from monet_train.data.megatron import helpers
from monet_train.data.packing import (
    CACHE_FROM_DOCUMENTS,
    DocumentStore,
    IndexCache,
    PackedSequences,
    Piece,
    TokenSequence,
)
from monet_train.data.shards import Shard, ShardSet, check_tokenizer, check_vocabulary, data_paths, find_shards
from monet_train.errors import UserError
from monet_train.fingerprint import mix, sha256_json
from monet_train.tokenizers import StoredTokenizer, TokenizerRecord
from monet_train.typed import check_bounds

if TYPE_CHECKING:
    from monet_train.config.schema import DataSection

BLEND_PERIOD = 1 << 16
SPLIT_BLOCK = 1 << 20  # documents hashed at a time


class Reading(NamedTuple):
    """How much of one pool of shards a run reads."""

    paths: str
    sequences: int  # that the run takes
    per_epoch: int

    def __str__(self) -> str:
        """An exact statement of epochs."""
        epochs, rest = divmod(self.sequences, self.per_epoch)
        return f"{epochs:,} epoch{'s' * (epochs != 1)} and {rest:,} of {self.per_epoch:,} sequences of {self.paths}"


@dataclass(frozen=True)
class Corpus:
    """Training and held-out sequences, and what identifies them.

    Item ``i`` of ``train`` and ``valid`` is a :class:`TokenSequence` of ``seq_length + 1`` tokens and a pure
    function of (identity, i); any non-negative index may be read. ``len(train)`` is the number that was asked
    for, ``len(valid)`` at most one epoch of the held-out documents.
    """

    train: PackedSequences | Blend
    valid: Blend | None
    identity: dict[str, Any]  # what decides the order of sequences, by key
    vocab_size: int  # the tokenizer's; the model's where the shards do not say
    tokenizer: StoredTokenizer | None
    train_tokens: int  # in one epoch
    valid_tokens: int  # of the held-out documents, whether they are read or not
    documents: int  # training and held-out
    readings: list[Reading]  # by path with weights, otherwise one of all paths

    @property
    def held_out_share(self) -> float:
        """Held-out tokens of all tokens; where documents are few it may be far from ``data.validation_fraction``."""
        return self.valid_tokens / (self.train_tokens + self.valid_tokens)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of ``identity``. It does not depend on the length of the run."""
        return sha256_json(self.identity)


def check_shards(config: DataSection, vocab_size: int) -> None:
    """Check all shards against their index, their manifest and the model's vocabulary, without reading them.

    It needs no process group, and takes a moment whatever the size of the corpus.

    Raises:
        UserError: one line that names the file and the remedy.
    """
    _open_sets(config, vocab_size)


def open_corpus(
    config: DataSection,
    *,
    seq_length: int,
    seed: int,
    vocab_size: int,
    train_sequences: int,
    valid_sequences: int,
    cache_dir: Path,
    cache_from_documents: int = CACHE_FROM_DOCUMENTS,
) -> Corpus:
    """Open the shards of ``config.path``. No collective operation: every rank may call it, or one alone.

    Without ``config.weights`` the documents of all paths are one pool, shuffled together: each is read once per
    epoch. With weights each path has epochs of its own, and sequence ``i`` is taken from the paths in turn.

    Args:
        seq_length: input tokens of a sequence.
        vocab_size: the model's.
        train_sequences: the length to give ``train``; does not change the order.
        valid_sequences: how many held-out sequences are wanted at most; 0 for none.
        cache_dir: for the index cache if neither ``config.cache_dir`` is set nor the shard folder writable.
        cache_from_documents: indices over fewer documents are built in memory.

    Raises:
        UserError: as ``check_shards``, or the corpus is too small for one sequence.
    """
    sets = _open_sets(config, vocab_size)
    pools = [[shard_set] for shard_set in sets] if config.weights else [sets]
    cache = IndexCache(_cache_folder(config, sets[0], cache_dir), cache_from_documents)
    splits = [_Split(pool, vocab_size, config.validation_fraction, cache) for pool in pools]

    def packed(number: int, held_out: bool, length: int) -> PackedSequences:
        split = splits[number]
        tokens = split.facts["valid_tokens" if held_out else "train_tokens"]
        if tokens <= seq_length:
            raise _too_short(split, pools[number], held_out, seq_length, config.validation_fraction)
        return PackedSequences(
            split.store,
            lambda: split.documents(held_out),
            tokens=tokens,
            seq_length=seq_length,
            # Component 0 keeps the run's seed; held-out sequences have one fixed order.
            seed=0 if held_out else seed + 1_000_003 * number,
            length=length,
            reset_attention=config.reset_attention,
            reset_positions=config.reset_positions,
            cache=cache,
            identity=f"{split.identity} {'valid' if held_out else 'train'}",
        )

    parts = [packed(number, False, train_sequences) for number in range(len(pools))]
    train = Blend(parts, list(config.weights), train_sequences) if config.weights else parts[0]
    counts = train.counts() if isinstance(train, Blend) else [train_sequences]
    valid = None
    if config.validation_fraction and valid_sequences:
        # A path with nothing to hold out is left out of the evaluation, unless it is the only one.
        able = [number for number, split in enumerate(splits) if split.facts["valid_tokens"]] or [0]
        held_out = [packed(number, True, valid_sequences) for number in able]
        sizes = [part.per_epoch for part in held_out]
        valid = Blend(held_out, [float(size) for size in sizes], min(valid_sequences, sum(sizes)))

    manifests = [shard_set.manifest for shard_set in sets if shard_set.manifest]
    return Corpus(
        train=train,
        valid=valid,
        identity={
            "shards": [shard_set.fingerprint for shard_set in sets],
            "weights": [float(weight) for weight in config.weights] if config.weights else None,
            "validation_fraction": config.validation_fraction,
            "seq_length": seq_length,
            "seed": seed,
            "reset_attention": config.reset_attention,
            "reset_positions": config.reset_positions,
        },
        vocab_size=max([manifest.tokenizer.vocabulary_size for manifest in manifests], default=vocab_size),
        tokenizer=next((s.tokenizer for s in sets if s.tokenizer), None),
        train_tokens=sum(split.facts["train_tokens"] for split in splits),
        valid_tokens=sum(split.facts["valid_tokens"] for split in splits),
        documents=sum(split.facts["documents"] for split in splits),
        readings=[
            Reading(", ".join(str(shard_set.path) for shard_set in pool), count, part.per_epoch)
            for pool, count, part in zip(pools, counts, parts, strict=True)
        ],
    )


def _too_short(
    split: _Split, pool: list[ShardSet], held_out: bool, seq_length: int, validation_fraction: float
) -> UserError:
    """The refusal where the training or the held-out documents do not make one sequence, with what helps."""
    where = f"data.path {', '.join(str(shard_set.path) for shard_set in pool)}"
    train, valid, documents = (split.facts[name] for name in ("train_tokens", "valid_tokens", "documents"))
    needs = f"a sequence needs {seq_length + 1:,}"
    no_evaluation = "data.validation_fraction=0 or eval.every=null to train without evaluation"
    if train + valid <= seq_length:
        return UserError(f"{where} has only {train + valid:,} tokens, {needs}: add text, or lower train.seq_length")
    if not held_out:
        return UserError(
            f"{where}: {train:,} of {train + valid:,} tokens are for training, {needs}: the other documents are held "
            f"out (data.validation_fraction={validation_fraction}); set data.validation_fraction=0 to train on all, "
            "prepare the text as more documents, or lower train.seq_length"
        )
    if documents == 1:
        return UserError(
            f"{where} is one document, which cannot be both trained on and held out: set {no_evaluation}, or prepare "
            "the text as several documents"
        )
    return UserError(
        f"{where}: {valid:,} of {train + valid:,} tokens are held out, {needs}: raise data.validation_fraction "
        f"(now {validation_fraction}), set {no_evaluation}, or lower train.seq_length"
    )


class Blend(torch.utils.data.Dataset[TokenSequence]):
    """Sequences of several datasets in the ratio of ``weights``, spread evenly (Megatron's blending, periodic)."""

    def __init__(
        self, parts: list[PackedSequences], weights: list[float], length: int, period: int = BLEND_PERIOD
    ) -> None:
        """``weights`` are kept to 1/``period``."""
        self.parts = parts
        self._length = length
        self._period = period
        self._shares = _shares(weights, period)
        self._part = np.zeros(period, dtype=np.int16)
        self._index = np.zeros(period, dtype=np.int64)
        helpers.build_exhaustive_blending_indices(self._part, self._index, self._shares, len(parts))

    def __len__(self) -> int:
        return self._length

    def _place(self, index: int) -> tuple[PackedSequences, int]:
        period, place = divmod(int(index), self._period)
        part = int(self._part[place])
        return self.parts[part], int(period * self._shares[part] + self._index[place])

    def __getitem__(self, index: int) -> TokenSequence:
        part, inner = self._place(index)
        return part[inner]

    def pieces(self, index: int) -> list[Piece]:
        """The pieces of documents that a sequence is made of; their lengths add up to ``seq_length + 1``."""
        part, inner = self._place(index)
        return part.pieces(inner)

    def counts(self) -> list[int]:
        """How many of the first ``len(self)`` sequences come from each part."""
        periods, rest = divmod(self._length, self._period)
        return (periods * self._shares + np.bincount(self._part[:rest], minlength=len(self.parts))).tolist()


def _shares(weights: list[float], period: int) -> np.ndarray:
    """Whole numbers in the ratio of the weights that add up to ``period`` (largest remainders), int64 [n]."""
    exact = np.asarray(weights, dtype=np.float64) / np.sum(weights) * period
    shares = np.maximum(np.floor(exact), 1).astype(np.int64)
    for number in np.argsort(np.floor(exact) - exact, kind="stable"):
        if shares.sum() >= period:
            break
        shares[number] += 1
    shares[np.argmax(shares)] -= shares.sum() - period
    return shares


class _Split:
    """The documents of a pool of shard sets, divided into training and held-out ones.

    A document is held out if a hash of its number falls below the fraction: no document is in both, the choice depends
    on nothing but the number, and it is spread evenly over a sorted corpus. It is the same without evaluation
    (``eval.every=null``), so that turning evaluation on later does not change what is trained on.
    """

    def __init__(self, pool: list[ShardSet], vocab_size: int, fraction: float, cache: IndexCache) -> None:
        shards: tuple[Shard, ...] = tuple(shard for shard_set in pool for shard in shard_set.shards)
        self.store = DocumentStore(shards, vocab_size)
        self.identity = " ".join([*(shard_set.fingerprint for shard_set in pool), str(fraction)])
        self._fraction = fraction
        self._whole = sum(s.header.documents for s in shards) == len(self.store)
        if len(self.store) == 0:
            raise UserError(f"data.path: the shards in {pool[0].path} hold no document: prepare some text first")
        cached = cache.is_worthwhile(len(self.store))
        self.facts: dict[str, int] = (
            cache.load_facts(f"{self.identity} split", self._count) if cached else self._count()
        )

    def documents(self, held_out: bool) -> np.ndarray:
        """Numbers of the training or the held-out documents, int64, ascending."""
        return np.flatnonzero(self._held_out() == held_out)

    def _held_out(self) -> np.ndarray:
        if self._whole:
            return held_out_mask(len(self.store), self._fraction)
        owners = self.store.units()
        return held_out_mask(int(owners[-1]) + 1, self._fraction)[owners]

    def _count(self) -> dict[str, int]:
        for shard in self.store.shards:
            check_index(shard.prefix)
        lengths, held_out = self.store.lengths(), self._held_out()
        valid = int(lengths[held_out].sum(dtype=np.int64))
        return {
            "train_tokens": int(lengths.sum(dtype=np.int64)) - valid,
            "valid_tokens": valid,
            "documents": sum(shard.header.documents for shard in self.store.shards),
        }


def held_out_mask(documents: int, fraction: float) -> np.ndarray:
    """Which of ``documents`` documents are held out, bool [documents].

    At least one if the fraction is not 0, and never all: a corpus of one document is trained on.
    """
    mask = np.zeros(documents, dtype=bool)
    if fraction <= 0:
        return mask
    threshold = np.uint64(min(fraction, 1.0) * (2**64 - 2**11))
    for begin in range(0, documents, SPLIT_BLOCK):
        numbers = np.arange(begin, min(begin + SPLIT_BLOCK, documents), dtype=np.uint64)
        mask[begin : begin + SPLIT_BLOCK] = mix(numbers) < threshold
    if not mask.any():
        mask[np.argmin(mix(np.arange(documents, dtype=np.uint64)))] = True
    if mask.all():
        mask[np.argmax(mix(np.arange(documents, dtype=np.uint64)))] = False
    return mask


def _open_sets(config: DataSection, vocab_size: int) -> list[ShardSet]:
    check_bounds(config, "data.")
    paths = data_paths(config.path)
    if config.weights is not None and len(config.weights) != len(paths):
        raise UserError(
            f"data.weights has {len(config.weights)} numbers for {len(paths)} paths in data.path: "
            "give one per path, or data.weights=null"
        )
    sets = [find_shards(path) for path in paths]
    for shard_set in sets:
        check_vocabulary(shard_set, vocab_size)
        if not any(shard.header.bin_bytes for shard in shard_set.shards):
            raise UserError(
                f"data.path: {shard_set.path} holds no document: prepare some text with `monet-data shards`"
            )
    tokenizers: dict[TokenizerRecord, Path] = {}  # the same file with other special tokens is another tokenizer
    for shard_set in sets:
        if shard_set.manifest:
            tokenizers.setdefault(shard_set.manifest.tokenizer, shard_set.path)
    if len(tokenizers) > 1:
        raise UserError(
            f"data.path: {' and '.join(str(path) for path in tokenizers.values())} were made with different "
            "tokenizers: make them again with one tokenizer"
        )
    owners: dict[Path, Path] = {}
    for shard_set in sets:
        check_tokenizer(shard_set)
        for shard in shard_set.shards:
            # Its documents would have two numbers: one might be trained on and the other held out.
            file = shard.bin.resolve()
            if file in owners:
                raise UserError(
                    f"data.path: {owners[file]} and {shard_set.path} both name the shard {shard.prefix}: name it once, "
                    "and raise its weight in data.weights if it should be read more often"
                )
            owners[file] = shard_set.path
    return sets


def _cache_folder(config: DataSection, first: ShardSet, fallback: Path) -> Path:
    if config.cache_dir:
        return Path(config.cache_dir)
    folder = first.path if first.path.is_dir() else first.path.parent
    return folder / "index-cache" if os.access(folder, os.W_OK) else fallback
