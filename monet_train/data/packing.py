"""Documents packed into sequences as Megatron's GPTDataset packs them, one epoch at a time.

GPTDataset draws one order for all the epochs that a run asks for, so a longer run would reorder its first
steps (docs/data.md shows it). Here each epoch is what GPTDataset builds for one epoch, with a seed of its own;
Megatron's compiled helper does the packing and its IndexedDataset the reading.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import numpy as np
import torch

from monet_train.data.megatron import IndexedDataset, helpers
from monet_train.data.shards import Shard
from monet_train.durable import sync, write_atomically
from monet_train.errors import UserError
from monet_train.fingerprint import cache_name

UNREADABLE = (OSError, EOFError, ValueError)  # what numpy and json raise for files that are cut short or damaged
OPEN_SHARDS = 256  # memory maps held open at a time; each costs file descriptors
CACHE_FROM_DOCUMENTS = 1_000_000  # smaller indices are built in memory in well under a second


class TokenSequence(NamedTuple):
    """One training sequence of ``seq_length + 1`` tokens: inputs are ``tokens[:-1]``, targets ``tokens[1:]``."""

    tokens: torch.Tensor  # int64 [S+1]
    segment_ids: torch.Tensor | None  # int64 [S], number of the document piece; with data.reset_attention
    positions: torch.Tensor | None  # int64 [S], from 0 in each document piece; with data.reset_positions
    loss_mask: torch.Tensor | None = None  # bool [S], which targets the loss counts; None: all


class Piece(NamedTuple):
    """A stretch of one document that is part of a sequence."""

    shard: Path  # prefix of the ``.bin``/``.idx`` pair
    document: int  # number in the shard (of the sequence, if Megatron's tools cut documents into several)
    offset: int  # first token
    length: int  # tokens


class EpochIndex(NamedTuple):
    """Which pieces of which documents make each sequence of one epoch."""

    documents: np.ndarray  # int32 [D], document numbers in shuffled order
    samples: np.ndarray  # int [N+1, 2], where a sample starts: (place in ``documents``, token offset)
    order: np.ndarray  # uint32 [N], sample numbers in shuffled order


def build_epoch(lengths: np.ndarray, documents: np.ndarray, seq_length: int, seed: int) -> EpochIndex:
    """Shuffle the documents, pack them, shuffle the samples: exactly GPTDataset's index for one epoch.

    Args:
        lengths: int32, tokens of every document of the shards.
        documents: the numbers of the documents to use.
        seq_length: tokens of a sequence, without the one that is only a target.
        seed: below 2**32.
    """
    random = np.random.RandomState(seed)  # GPTDataset's generator
    shuffled = documents.astype(np.int32)
    random.shuffle(shuffled)
    tokens = int(lengths[documents].sum(dtype=np.int64))
    samples = helpers.build_sample_idx(lengths, shuffled, seq_length, 1, tokens)
    order = np.arange(len(samples) - 1, dtype=np.uint32)
    random.shuffle(order)
    return EpochIndex(shuffled, samples, order)


class DocumentStore:
    """All documents (Megatron's "sequences") of several shards, numbered through; reading is thread-safe."""

    def __init__(self, shards: tuple[Shard, ...], vocab_size: int) -> None:
        self.shards = shards
        self.vocab_size = vocab_size
        self._numbers = {shard.prefix: number for number, shard in enumerate(shards)}
        self.first = np.cumsum([0] + [shard.header.sequences for shard in shards])
        self._open = lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)

    def __len__(self) -> int:
        return int(self.first[-1])

    def _open_shard(self, number: int) -> IndexedDataset:
        return IndexedDataset(str(self.shards[number].prefix))

    def lengths(self) -> np.ndarray:
        """Tokens of every document, int32 [documents]."""
        filled = [i for i, shard in enumerate(self.shards) if shard.header.sequences]
        # Copies: an evicted dataset closes its memory map.
        return np.concatenate([np.array(self._open(i).sequence_lengths) for i in filled])

    def units(self) -> np.ndarray:
        """The document that every sequence belongs to, int64 [sequences].

        Megatron's tools can cut a document into several sequences (--split-sentences); a split must not
        separate them.
        """
        owners, documents = [], 0
        for number, shard in enumerate(self.shards):
            if shard.header.sequences == 0:
                continue
            borders = np.array(self._open(number).document_indices)
            owners.append(documents + np.repeat(np.arange(len(borders) - 1), np.diff(borders)))
            documents += len(borders) - 1
        return np.concatenate(owners)

    def piece(self, document: int, offset: int, length: int | None) -> Piece:
        """``length`` tokens (None: the rest) of a document from ``offset`` on."""
        number = int(np.searchsorted(self.first, document, side="right")) - 1
        local = int(document - self.first[number])
        if length is None:
            length = int(self._open(number).sequence_lengths[local]) - offset
        return Piece(self.shards[number].prefix, local, offset, length)

    def read(self, piece: Piece) -> np.ndarray:
        """The tokens of a piece, int64.

        Raises:
            UserError: a token lies outside the model's vocabulary.
        """
        dataset = self._open(self._numbers[piece.shard])
        tokens = dataset.get(piece.document, offset=piece.offset, length=piece.length).astype(np.int64)
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise UserError(
                f"{piece.shard}.bin: document {piece.document} has a token outside the model's vocabulary of "
                f"{self.vocab_size}: check the shards with `monet-data verify`, or set model.vocab_size",
                alone=True,
            )
        return tokens


class PackedSequences(torch.utils.data.Dataset[TokenSequence]):
    """Sequence ``i`` of an endless series of epochs; ``len()`` is the number that was asked for.

    Epoch ``e`` holds sequences ``[e*n, (e+1)*n)`` with ``n = per_epoch``: every token of the split once, except
    for fewer than ``seq_length`` at its end. Any non-negative index may be read.
    """

    def __init__(
        self,
        store: DocumentStore,
        documents: Callable[[], np.ndarray],
        *,
        tokens: int,
        seq_length: int,
        seed: int,
        length: int,
        reset_attention: bool,
        reset_positions: bool,
        cache: IndexCache,
        identity: str,
    ) -> None:
        """``documents`` gives the split's document numbers; it is called only when an epoch must be built."""
        self.store = store
        self.seq_length = seq_length
        self.per_epoch = (tokens - 1) // seq_length
        self._documents = documents
        self._seed = seed
        self._length = length
        self._reset_attention = reset_attention
        self._reset_positions = reset_positions
        self._cache = cache
        self._identity = identity
        self._lock = threading.Lock()
        self._epochs = lru_cache(maxsize=2)(self._load_epoch)

    def __len__(self) -> int:
        return self._length

    def _load_epoch(self, epoch: int) -> EpochIndex:
        seed = epoch_seed(self._seed, epoch)

        def build() -> EpochIndex:
            return build_epoch(self.store.lengths(), self._documents(), self.seq_length, seed)

        if not self._cache.is_worthwhile(len(self.store)):
            return build()
        return self._cache.load(f"{self._identity} {self.seq_length} {seed}", build)

    def pieces(self, index: int) -> list[Piece]:
        """The pieces of documents that a sequence is made of; their lengths add up to ``seq_length + 1``."""
        epoch, place = divmod(int(index), self.per_epoch)
        with self._lock:
            documents, samples, order = self._epochs(epoch)
        sample = int(order[place])
        (first, start), (last, stop) = samples[sample].tolist(), samples[sample + 1].tolist()
        pieces = []
        for position in range(first, last + 1):
            begin = start if position == first else 0
            length = stop + 1 - begin if position == last else None
            pieces.append(self.store.piece(int(documents[position]), begin, length))
        return [piece for piece in pieces if piece.length]

    def __getitem__(self, index: int) -> TokenSequence:
        return self._sequence([self.store.read(piece) for piece in self.pieces(index)])

    def _sequence(self, pieces: list[np.ndarray]) -> TokenSequence:
        tokens = torch.from_numpy(np.concatenate(pieces, dtype=np.int64))
        sizes = [len(piece) for piece in pieces]
        segment_ids = positions = None
        if self._reset_attention:
            segment_ids = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes))[:-1]
        if self._reset_positions:
            positions = torch.from_numpy(np.concatenate([np.arange(size) for size in sizes]))[:-1]
        return TokenSequence(tokens, segment_ids, positions)


def epoch_seed(seed: int, epoch: int) -> int:
    """The seed of an epoch. Epoch 0 takes the run's own, as Megatron would."""
    if epoch == 0:
        return seed % 2**32
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


class IndexCache:
    """Epoch indices as memory-mapped files, so that the processes of a node share them.

    Each is written under a temporary name, fsynced and renamed: processes that race (also on a file system without
    locks) at worst do the same work twice, which the lock avoids. An index that cannot be read is built again.
    """

    def __init__(self, folder: Path, from_documents: int = CACHE_FROM_DOCUMENTS) -> None:
        self.folder = folder
        self._from_documents = from_documents

    def is_worthwhile(self, documents: int) -> bool:
        """Whether an index over that many documents takes long enough to build."""
        return documents >= self._from_documents

    def load(self, key: str, build: Callable[[], EpochIndex]) -> EpochIndex:
        """The index of ``key``, built if it is not there yet or is damaged."""
        final = self._path(key)
        with contextlib.suppress(*UNREADABLE):
            return _read_epoch(final)
        with _node_lock(final.with_suffix(".lock")):
            with contextlib.suppress(*UNREADABLE):  # another process was first
                return _read_epoch(final)
            with _mendable(self.folder), contextlib.suppress(FileNotFoundError):
                shutil.rmtree(final)
            self._write(final, build())
        return _read_epoch(final)

    def load_facts(self, key: str, build: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Small facts (JSON) that take a pass over the index to find."""
        final = self._path(key).with_suffix(".json")
        with contextlib.suppress(*UNREADABLE):
            facts = json.loads(final.read_text())
            if isinstance(facts, dict):
                return facts
        facts = build()
        with _mendable(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(final, json.dumps(facts).encode(), writer=f".{uuid.uuid4().hex}")
        return facts

    def _path(self, key: str) -> Path:
        return self.folder / cache_name(key)

    def _write(self, final: Path, index: EpochIndex) -> None:
        with _mendable(self.folder):
            temporary = Path(tempfile.mkdtemp(prefix=f"{final.name}.", suffix=".tmp", dir=self.folder))
            try:
                for name, array in index._asdict().items():
                    np.save(temporary / f"{name}.npy", array)
                    sync(temporary / f"{name}.npy")
                temporary.chmod(0o755)
                sync(temporary)
                temporary.rename(final)
                sync(self.folder)
            except OSError:
                if not final.is_dir():  # otherwise another process was first, with the same contents
                    raise
            finally:
                shutil.rmtree(temporary, ignore_errors=True)


def _read_epoch(folder: Path) -> EpochIndex:
    """Map the arrays of an index.

    Raises:
        OSError, EOFError, ValueError: a file is not there or cannot be read, or the arrays do not fit together.
    """
    index = EpochIndex(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in EpochIndex._fields))
    if index.samples.shape != (len(index.order) + 1, 2) or index.samples[-1, 0] >= len(index.documents):
        raise ValueError(f"{folder}: samples {index.samples.shape}, order {index.order.shape}")
    return index


@contextlib.contextmanager
def _mendable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the index cache {folder} cannot be written ({error.strerror}): free some space, or set "
            "data.cache_dir to a folder that has it"
        ) from None


@contextlib.contextmanager
def _node_lock(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path)
    with contextlib.suppress(NotImplementedError, OSError):  # on a file system without locks, continue without one
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
