"""The worker's side: chunks in, tokens out; in this process or in several."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.documents import Chunk, Reject, parse
from data_prep.recipe import LABELS
from data_prep.tokenizers import Tokenizer, load_tokenizer
from monet_train.data.index_file import token_dtype
from monet_train.errors import UserError

CHUNKS_AHEAD = 8  # a worker; bounds the memory, and bridges what the writer does between chunks


class Encoded(NamedTuple):
    """The kept documents of a chunk. Each ends with the end-of-text token."""

    tokens: np.ndarray  # [sum of lengths], of the shards' type
    lengths: np.ndarray  # int32 [documents]
    text_bytes: np.ndarray  # int64 [documents], UTF-8
    labels: list[list[str | None]]  # a list for each of LABELS
    ids: list[str | None]  # None where the source has no field for them
    rejects: list[Reject]
    filtered: dict[str, int]


def encode_chunk(tokenizer: Tokenizer, chunk: Chunk) -> Encoded:
    """Parse and tokenize a chunk."""
    parsed = parse(chunk)
    tokens, lengths = tokenizer.encode_documents([document.text for document in parsed.documents])
    return Encoded(
        tokens=tokens.astype(token_dtype(tokenizer.record.vocabulary_size)),
        lengths=lengths,
        text_bytes=np.array([document.size for document in parsed.documents], dtype=np.int64),
        labels=[[document.labels[i] for document in parsed.documents] for i in range(len(LABELS))],
        ids=[document.id for document in parsed.documents],
        rejects=parsed.rejects,
        filtered=parsed.filtered,
    )


class Encoder:
    """Encodes chunks with ``workers`` processes (1: in this one); the order of results is that of the chunks."""

    def __init__(self, tokenizer: Tokenizer, workers: int) -> None:
        self.tokenizer = tokenizer
        self.workers = workers
        self._pool = (
            ProcessPoolExecutor(
                workers, multiprocessing.get_context("spawn"), initializer=_start, initargs=(tokenizer.path,)
            )
            if workers > 1
            else None
        )

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def encode(self, chunks: Iterator[Chunk]) -> Iterator[tuple[Chunk, Encoded]]:
        """Every chunk with its tokens, in order.

        Raises:
            UserError: a worker was killed.
        """
        if self._pool is None:
            for chunk in chunks:
                yield chunk, encode_chunk(self.tokenizer, chunk)
            return
        ahead: deque[tuple[Chunk, Future[Encoded]]] = deque()
        try:
            for chunk in chunks:
                ahead.append((chunk, self._pool.submit(_work, chunk)))
                if len(ahead) >= CHUNKS_AHEAD * self.workers:
                    yield self._first(ahead)
            while ahead:
                yield self._first(ahead)
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed (out of memory?): run the same command again with fewer --workers; "
                "it goes on where it stopped"
            ) from None

    @staticmethod
    def _first(ahead: deque[tuple[Chunk, Future[Encoded]]]) -> tuple[Chunk, Encoded]:
        chunk, future = ahead.popleft()
        return chunk, future.result()


_tokenizer: Tokenizer  # of a worker process


def _start(path: Path) -> None:
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _tokenizer = load_tokenizer(path)


def _end_with_parent() -> None:
    """A worker would wait for ever on the queue of a parent that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _work(chunk: Chunk) -> Encoded:
    return encode_chunk(_tokenizer, chunk)


def default_workers() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
