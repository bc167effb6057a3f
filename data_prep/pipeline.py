"""From a position in the sources to finished shards."""

from __future__ import annotations

import copy
import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from data_prep.chunks import CHUNK_BYTES, Chunk, read_chunks
from data_prep.encode import SLOT_BYTES, Encoded, Encoder
from data_prep.journal import Totals
from data_prep.recipe import Recipe
from data_prep.shard_writer import ShardWriter
from data_prep.sources import Part
from monet_train.data.index_file import token_dtype
from monet_train.data.manifest import Position, ShardRecord
from monet_train.tokenizers import Tokenizer


@dataclass(frozen=True)
class ShardOptions:
    """How shards are cut, how the work is shared and how much may go wrong."""

    tokens_per_shard: int = 250_000_000
    workers: int = 1
    max_bad_share: float = 0.01  # of all documents read
    task: int = 0
    tasks: int = 1
    chunk_bytes: int = CHUNK_BYTES  # of text, read at a time; the same in every run over a folder
    slot_bytes: int = SLOT_BYTES  # of shared memory for each chunk at work


@dataclass(frozen=True)
class Plan:
    """What to do. ``parts`` are those of the whole corpus, even where a task does only some."""

    recipe: Recipe
    parts: list[Part]
    tokenizer: Tokenizer
    options: ShardOptions

    @property
    def dtype(self) -> type[np.number]:
        """The type of stored tokens."""
        return token_dtype(self.tokenizer.record.vocabulary_size)

    def describe(self) -> dict[str, Any]:
        """What decides the shards' bytes: equal descriptions give equal shards.

        Neither the folders' names nor the number of workers belong to it; a revision is part of the files' identity.
        """
        return {
            "sources": [{**source.describe(), "revision": None} for source in self.recipe.sources],
            "files": [part.identity() for part in self.parts],
            "max_documents": self.recipe.max_documents,
            "max_bytes": self.recipe.max_bytes,
            "tokens_per_shard": self.options.tokens_per_shard,
            "tasks": self.options.tasks,
            "tokenizer": asdict(self.tokenizer.record),
        }

    def range_of(self, task: int) -> range:
        """Parts of a task: neighbours, so that the tasks in order are the corpus in order; about equal in bytes."""
        sizes = np.array([max(part.size, 1) for part in self.parts], dtype=np.float64)
        middles = (np.cumsum(sizes) - sizes / 2) / sizes.sum()
        borders = np.searchsorted(middles, [task / self.options.tasks, (task + 1) / self.options.tasks])
        return range(int(borders[0]), int(borders[1]))


class StartPoint(NamedTuple):
    """Where to start, and what came before (for names and for the recipe's bounds)."""

    position: Position
    shard: int = 0
    documents: int = 0
    text_bytes: int = 0

    @classmethod
    def after(cls, shards: list[ShardRecord], first: Position) -> StartPoint:
        """Behind the last of ``shards``; at ``first`` if there is none."""
        return cls(
            shards[-1].end if shards else first,
            len(shards),
            sum(shard.documents for shard in shards),
            sum(shard.text_bytes for shard in shards),
        )


class Finished(NamedTuple):
    """A finished shard, and what had been left out when its last document was read."""

    shard: ShardRecord
    totals: Totals


class RejectsLog:
    """The rejects file and the counts that belong to it."""

    def __init__(self, path: Path, totals: Totals) -> None:
        """Truncates the file to what ``totals`` counts: a stopped run may have written more."""
        self.path, self.totals = path, totals
        if path.exists():
            with path.open("ab") as stream:
                stream.truncate(totals.rejects_bytes)

    def note(self, encoded: Encoded) -> None:
        """Add the rejects and the filtered documents of a chunk."""
        for reason, count in encoded.filtered.items():
            self.totals.filtered[reason] = self.totals.filtered.get(reason, 0) + count
        for reject in encoded.rejects:
            self.totals.rejected[reject.reason] = self.totals.rejected.get(reject.reason, 0) + 1
        if encoded.rejects:
            lines = "".join(json.dumps(r._asdict(), ensure_ascii=False) + "\n" for r in encoded.rejects)
            data = lines.encode(errors="backslashreplace")
            with self.path.open("ab") as stream:
                stream.write(data)
            self.totals.rejects_bytes += len(data)


def make_shards(
    plan: Plan,
    encoder: Encoder,
    folder: Path,
    start: StartPoint,
    parts_end: int,
    log: RejectsLog | None,
    stop: Position | None = None,
) -> Iterator[Finished]:
    """Write shards from ``start`` to the end of the parts, the recipe's bounds, or ``stop``; yield each finished one.

    A thread makes a full shard durable (checksums, fsync) while the next one fills.

    Raises:
        UserError: a source cannot be read, or a worker was killed.
        OSError: the folder cannot be written; what was being written is removed.
    """
    limit = plan.options.tokens_per_shard
    number, documents, text_bytes = start.shard, start.documents, start.text_bytes
    writer: ShardWriter | None = None
    with _Finisher() as finisher:
        try:
            for position, encoded in _encoded(plan, encoder, start.position, parts_end):
                yield from finisher.ready()
                if log and position.document == 0:
                    log.note(encoded)
                first, count = position.document, len(encoded.lengths)
                allowed = first + _allowed(plan.recipe, encoded, first, documents, text_bytes)
                end = None
                while first < allowed and (end is None or end != stop):
                    begin = Position(position.part, position.chunk, first)
                    writer = writer or ShardWriter(
                        folder, shard_name(plan.options, number), plan.dtype, begin, plan.recipe
                    )
                    cut = _cut(encoded, first, allowed, limit - writer.tokens)
                    end = Position(position.part, position.chunk + (cut == count), cut % count)
                    writer.add(encoded, first, cut, end)
                    documents += cut - first
                    text_bytes += int(encoded.text_bytes[first:cut].sum())
                    first = cut
                    if writer.tokens >= limit or end == stop:
                        full, writer, number = writer, None, number + 1
                        yield from finisher.finish(full, log)
                if allowed < count or (end is not None and end == stop):
                    break
            if writer:
                full, writer = writer, None
                yield from finisher.finish(full, log)
            yield from finisher.wait()
        finally:
            if writer:
                writer.abandon()


class _Finisher:
    """One shard at a time is made durable in a thread; shards are handed out in order."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="finish")
        self._pending: tuple[Future[ShardRecord], Totals] | None = None

    def __enter__(self) -> _Finisher:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True)

    def finish(self, writer: ShardWriter, log: RejectsLog | None) -> Iterator[Finished]:
        """Start with ``writer``; hand out the shard before it."""
        try:
            yield from self.wait()
        except BaseException:  # the shard before could not be written, or the reader has gone
            writer.abandon()
            raise
        totals = copy.deepcopy(log.totals) if log else Totals()
        self._pending = self._thread.submit(_finish, writer), totals

    def ready(self) -> Iterator[Finished]:
        """Hand out the shard that is being written, if it is done: whatever is recorded late is lost by a kill."""
        if self._pending and self._pending[0].done():
            yield from self.wait()

    def wait(self) -> Iterator[Finished]:
        """Wait for the shard that is being written, if there is one, and hand it out."""
        if self._pending:
            (future, totals), self._pending = self._pending, None
            yield Finished(future.result(), totals)


def _finish(writer: ShardWriter) -> ShardRecord:
    try:
        return writer.finish()
    except BaseException:
        writer.abandon()
        raise


def _allowed(recipe: Recipe, encoded: Encoded, begin: int, documents: int, text_bytes: int) -> int:
    """How many documents of a chunk, from ``begin`` on, the recipe's bounds allow."""
    count = len(encoded.lengths) - begin
    if recipe.max_documents is not None:
        count = min(count, recipe.max_documents - documents)
    if recipe.max_bytes is not None:
        sizes = np.cumsum(encoded.text_bytes[begin:]) + text_bytes
        count = min(count, int(np.searchsorted(sizes, recipe.max_bytes, side="right")))
    return max(count, 0)


def _cut(encoded: Encoded, begin: int, end: int, room: int) -> int:
    """The end of the documents that go into a shard with room for this many tokens; the last one fills it."""
    sizes = np.cumsum(encoded.lengths[begin:end], dtype=np.int64)
    return begin + min(end - begin, int(np.searchsorted(sizes, room)) + 1)


def _encoded(plan: Plan, encoder: Encoder, start: Position, parts_end: int) -> Iterator[tuple[Position, Encoded]]:
    """Chunks from ``start`` on, encoded; each with the position of its first wanted document."""
    positions: deque[Position] = deque()
    parts = range(start.part, parts_end)

    def chunks() -> Iterator[Chunk]:
        for part in parts:
            for number, chunk in enumerate(read_chunks(plan.parts[part], plan.options.chunk_bytes)):
                if part == start.part and number < start.chunk:
                    progress.update(chunk.read_bytes)
                    continue
                first = (part, number) == (start.part, start.chunk)
                positions.append(Position(part, number, start.document if first else 0))
                yield chunk

    total = sum(plan.parts[part].size for part in parts) or None
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", disable=None) as progress:
        for chunk, encoded in encoder.encode(chunks()):
            progress.update(chunk.read_bytes)
            yield positions.popleft(), encoded


def shard_name(options: ShardOptions, number: int) -> str:
    """``shard-00000``, or ``shard-0003-00000`` for task 3 of several."""
    return f"shard-{number:05d}" if options.tasks == 1 else f"shard-{options.task:04d}-{number:05d}"
