"""The worker's side: chunks in, tokens out; in this process or in several."""

from __future__ import annotations

import gc
import mmap
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np

from data_prep.chunks import Chunk
from data_prep.documents import Reject, parse
from monet_train.data.index_file import token_dtype
from monet_train.errors import UserError
from monet_train.tokenizers import Tokenizer

CHUNKS_AHEAD = 8  # per worker; bounds the memory, and bridges what the writer does between chunks
SLOT_BYTES = 4 << 20  # of shared memory for each of them; pages that are never touched cost nothing


class Column(NamedTuple):
    """A label of some documents, a string."""

    values: list[str]  # in the order in which they first appear
    codes: np.ndarray  # int32 [documents], the place of a document's value in ``values``; -1: none

    @classmethod
    def from_labels(cls, labels: Sequence[str | None]) -> Column:
        """From the label of each document."""
        values = [label for label in dict.fromkeys(labels) if label is not None]
        places: dict[str | None, int] = {None: -1, **{value: place for place, value in enumerate(values)}}
        return cls(values, np.fromiter(map(places.__getitem__, labels), np.int32, len(labels)))


class Encoded(NamedTuple):
    """The kept documents of a chunk. Each ends with the end-of-text token."""

    tokens: np.ndarray  # [sum of lengths], of the shards' type
    lengths: np.ndarray  # int32 [documents]
    text_bytes: np.ndarray  # int64 [documents], UTF-8
    labels: dict[str, Column]  # those of the chunk's source
    numbers: dict[str, np.ndarray]  # float64 [documents] each, those of the chunk's source; NaN: none
    ids: list[str | None]  # None where the source has no field for them
    rejects: list[Reject]
    filtered: dict[str, int]


def encode_chunk(tokenizer: Tokenizer, chunk: Chunk) -> Encoded:
    """Parse and tokenize a chunk."""
    parsed = parse(chunk)
    documents, source = parsed.documents, chunk.part.source
    texts, sizes, labels, numbers, ids = map(list, zip(*documents, strict=True)) if documents else [[]] * 5
    tokens, lengths = tokenizer.encode_documents(texts)
    return Encoded(
        tokens=tokens.astype(token_dtype(tokenizer.record.vocabulary_size)),
        lengths=lengths,
        text_bytes=np.array(sizes, dtype=np.int64),
        labels={name: Column.from_labels(column) for name, column in _columns(source.strings, labels)},
        numbers={name: np.array(column, dtype=np.float64) for name, column in _columns(source.numbers, numbers)},
        ids=ids,
        rejects=parsed.rejects,
        filtered=parsed.filtered,
    )


def _columns(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[tuple[str, Sequence[Any]]]:
    """Each name with what the rows have there; no value where there is no row."""
    return zip(names, zip(*rows, strict=True) if rows else [()] * len(names), strict=True)


class Encoder:
    """Encodes chunks with ``workers`` processes (1: in this one); the order of results is that of the chunks.

    The processes are forked, so that they have the tokenizer without loading it again; make an Encoder before
    anything that starts threads.
    """

    def __init__(self, tokenizer: Tokenizer, workers: int, slot_bytes: int = SLOT_BYTES) -> None:
        """``slot_bytes``: shared memory for each chunk that is being worked on."""
        self.tokenizer = tokenizer
        self._ahead = CHUNKS_AHEAD * workers
        self._pool = None
        if workers > 1:
            self._slots = _Slots(self._ahead, slot_bytes)
            context = multiprocessing.get_context("fork")
            self._pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(tokenizer, self._slots))
            self._pool.submit(os.getpid)  # the first task forks all processes

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def encode(self, chunks: Iterator[Chunk]) -> Iterator[tuple[Chunk, Encoded]]:
        """Every chunk (without its payload) with its tokens, in order; tokens are valid until the next is asked for.

        Raises:
            UserError: a worker was killed.
        """
        if self._pool is None:
            for chunk in chunks:
                yield chunk._replace(payload=None), encode_chunk(self.tokenizer, chunk)
            return
        ahead: deque[tuple[Chunk, int, Future[Encoded]]] = deque()
        try:
            for number, chunk in enumerate(chunks):
                slot = number % self._ahead
                future = self._pool.submit(_work, self._slots.put_lines(slot, chunk), slot)
                ahead.append((chunk._replace(payload=None), slot, future))
                if len(ahead) == self._ahead:
                    yield self._first(ahead)
            while ahead:
                yield self._first(ahead)
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed (out of memory?): run the same command again with fewer --workers; "
                "it resumes where it stopped"
            ) from None
        finally:  # a caller that stops early may start again: the slots must be free by then
            wait([future for _, _, future in ahead if not future.cancel()])

    def _first(self, ahead: deque[tuple[Chunk, int, Future[Encoded]]]) -> tuple[Chunk, Encoded]:
        chunk, slot, future = ahead.popleft()
        return chunk, self._slots.take_tokens(slot, future.result())


class _Slots:
    """Memory that the processes share, one slot per chunk: its lines on their way to a worker, then its tokens back.

    Through pipes the same bytes would cost 4% of a worker's time. What is not bytes, or is too large, uses the pipe.
    """

    def __init__(self, count: int, slot_bytes: int) -> None:
        self._slot_bytes = slot_bytes
        try:
            self._memory = memoryview(mmap.mmap(-1, count * slot_bytes))
        except OSError as error:
            raise UserError(
                f"no shared memory for {count // CHUNKS_AHEAD} workers ({error.strerror}): give fewer --workers"
            ) from None

    def _slot(self, slot: int, size: int) -> memoryview:
        return self._memory[slot * self._slot_bytes : slot * self._slot_bytes + size]

    def put_lines(self, slot: int, chunk: Chunk) -> Chunk:
        """Put a chunk's lines into a slot, if they fit; the chunk to send."""
        data = chunk.payload
        if not isinstance(data, bytes) or len(data) > self._slot_bytes:
            return chunk
        self._slot(slot, len(data))[:] = data
        return chunk._replace(payload=Stored(len(data)))

    def take_lines(self, slot: int, chunk: Chunk) -> Chunk:
        """The chunk that was sent, as it was."""
        if not isinstance(chunk.payload, Stored):
            return chunk
        return chunk._replace(payload=bytes(self._slot(slot, chunk.payload.size)))

    def put_tokens(self, slot: int, encoded: Encoded) -> Encoded:
        """Put the tokens into the slot of their chunk, if they fit; what is left to send."""
        tokens = encoded.tokens
        if tokens.nbytes > self._slot_bytes:
            return encoded
        self._slot(slot, tokens.nbytes)[:] = tokens.view(np.uint8).data
        return encoded._replace(tokens=tokens[:0])

    def take_tokens(self, slot: int, encoded: Encoded) -> Encoded:
        """What was sent, with its tokens, which are still in the slot."""
        size = int(encoded.lengths.sum(dtype=np.int64)) * encoded.tokens.itemsize
        if len(encoded.tokens) or not size:
            return encoded
        return encoded._replace(tokens=np.frombuffer(self._slot(slot, size), encoded.tokens.dtype))


class Stored(NamedTuple):
    """Takes the place of a payload that is in a slot."""

    size: int


_tokenizer: Tokenizer  # of a worker process, as the next
_slots: _Slots


def _start(tokenizer: Tokenizer, slots: _Slots) -> None:
    global _tokenizer, _slots
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _tokenizer, _slots = tokenizer, slots
    if tokenizer.fast:
        tokenizer.fast.compare_next()
    gc.freeze()  # what the parent has loaded stays for good


def _end_with_parent() -> None:
    """A worker would wait forever on the queue of a parent that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _work(chunk: Chunk, slot: int) -> Encoded:
    return _slots.put_tokens(slot, encode_chunk(_tokenizer, _slots.take_lines(slot, chunk)))


def default_workers() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
