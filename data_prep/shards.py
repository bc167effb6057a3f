"""``monet-data shards``: documents to tokens in ``.bin``/``.idx`` pairs, restartable at every shard."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_prep.documents import Chunk, Reject, read_chunks
from data_prep.encode import Encoded, Encoder
from data_prep.files import write_whole
from data_prep.journal import LOCK_NAME, Journal, Totals, exclusive, other_recipe
from data_prep.recipe import Recipe
from data_prep.shard_writer import ShardWriter, disk_error, shard_dtype
from data_prep.sources import Part, list_parts
from data_prep.tokenizers import Tokenizer
from monet_train.data.manifest import MANIFEST_NAME, Manifest, Position, ShardRecord
from monet_train.errors import UserError

REJECTS_NAME = "rejects.jsonl"
ENOUGH_TO_JUDGE = 10_000  # documents seen before too many bad ones stop a run


@dataclass(frozen=True)
class ShardOptions:
    """How shards are cut and how much may go wrong."""

    tokens_per_shard: int = 250_000_000
    workers: int = 1
    max_bad_share: float = 0.01  # of all documents read


@dataclass
class Preparation:
    """A run of ``monet-data shards`` over an output folder."""

    recipe: Recipe
    tokenizer: Tokenizer
    folder: Path
    options: ShardOptions
    parts: list[Part] = field(init=False)
    asked: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.parts = list_parts(self.recipe)
        self.asked = describe(self.recipe, self.parts, self.tokenizer, self.options)

    def run(self) -> Manifest:
        """Make the shards that are not there yet and write the manifest.

        Raises:
            UserError: the folder belongs to another corpus, a source cannot be read, too many documents are bad,
                there is no document, or the disk is full.
        """
        with exclusive(self.folder):
            try:
                return self._run()
            except OSError as error:
                raise disk_error(self.folder, error) from None

    def _run(self) -> Manifest:
        if (self.folder / MANIFEST_NAME).exists():
            manifest = Manifest.read(self.folder)
            if manifest.recipe != self.asked:
                raise other_recipe(self.folder, manifest.recipe, self.asked)
            self._rebuild(manifest)
            return manifest
        journal = Journal(self.folder / "progress.jsonl")
        if not journal.path.exists() and (others := [p.name for p in self.folder.iterdir() if p.name != LOCK_NAME]):
            raise UserError(f"{self.folder} is not empty ({others[0]}): choose another --out, or empty the folder")
        journal.open(self.asked)
        for leftover in self.folder.glob(".*.tmp"):
            leftover.unlink()
        self._continue(journal)
        return self._finish(journal)

    def _continue(self, journal: Journal) -> None:
        """Make all shards after the journal's last."""
        rejects = self.folder / REJECTS_NAME
        with rejects.open("ab") as stream:
            stream.truncate(journal.totals.rejects_bytes)

        def note(chunk_rejects: list[Reject], filtered: dict[str, int]) -> None:
            totals = journal.totals
            for reason, count in filtered.items():
                totals.filtered[reason] = totals.filtered.get(reason, 0) + count
            if chunk_rejects:
                lines = "".join(json.dumps(r._asdict(), ensure_ascii=False) + "\n" for r in chunk_rejects).encode()
                with rejects.open("ab") as stream:
                    stream.write(lines)
                totals.rejects_bytes += len(lines)
            for reject in chunk_rejects:
                totals.rejected[reject.reason] = totals.rejected.get(reject.reason, 0) + 1

        kept = sum(shard.documents for shard in journal.shards)
        size = sum(shard.text_bytes for shard in journal.shards)
        for shard in self._shards(journal.end, len(journal.shards), kept, size, note):
            journal.add(shard)
            kept += shard.documents
            self._judge(journal.totals, kept, ENOUGH_TO_JUDGE)
        self._judge(journal.totals, kept, 1)

    def _judge(self, totals: Totals, kept: int, enough: int) -> None:
        bad = sum(totals.rejected.values())
        seen = bad + kept + sum(totals.filtered.values())
        if seen >= enough and bad > self.options.max_bad_share * seen:
            raise UserError(
                f"{bad} of {seen} documents are bad ({', '.join(totals.rejected)}), more than the share of "
                f"{self.options.max_bad_share} that is allowed: see {self.folder / REJECTS_NAME}, mend the source, or "
                "raise --max-bad-share"
            )

    def _shards(
        self,
        start: Position,
        number: int,
        documents: int,
        text_bytes: int,
        note: Callable[[list[Reject], dict[str, int]], None],
        stop: Position | None = None,
    ) -> Iterator[ShardRecord]:
        """Shards from ``start`` to the end of the sources, the recipe's bounds, or ``stop``."""
        dtype = shard_dtype(self.tokenizer.record.vocabulary_size)
        writer: ShardWriter | None = None
        end = start
        try:
            for position, encoded in self._encoded(start):
                if position.document == 0:
                    note(encoded.rejects, encoded.filtered)
                begin, count = position.document, len(encoded.lengths)
                allowed = begin + self._allowed(encoded, begin, documents, text_bytes)
                while begin < allowed:
                    here = Position(position.part, position.chunk, begin)
                    writer = writer or ShardWriter(self.folder, shard_name(number), dtype, here)
                    cut = self._cut(encoded, begin, allowed, writer.tokens)
                    writer.add(encoded, begin, cut)
                    documents += cut - begin
                    text_bytes += int(encoded.text_bytes[begin:cut].sum())
                    begin = cut
                    end = Position(position.part, position.chunk + (cut == count), cut % count)
                    if writer.tokens >= self.options.tokens_per_shard:
                        finished, writer, number = writer, None, number + 1
                        yield finished.finish(end)
                        if end == stop:
                            return
                if allowed < count or end == stop:
                    break
            if writer:
                finished, writer = writer, None
                yield finished.finish(end)
        finally:
            if writer:
                writer.abandon()

    def _allowed(self, encoded: Encoded, begin: int, documents: int, text_bytes: int) -> int:
        """How many documents of a chunk from ``begin`` on the recipe's bounds leave."""
        count = len(encoded.lengths) - begin
        if self.recipe.max_documents is not None:
            count = min(count, self.recipe.max_documents - documents)
        if self.recipe.max_bytes is not None:
            sizes = np.cumsum(encoded.text_bytes[begin:]) + text_bytes
            count = min(count, int(np.searchsorted(sizes, self.recipe.max_bytes, side="right")))
        return max(count, 0)

    def _cut(self, encoded: Encoded, begin: int, end: int, tokens: int) -> int:
        """The end of the documents that go into a shard which has ``tokens`` already."""
        sizes = np.cumsum(encoded.lengths[begin:end], dtype=np.int64) + tokens
        return begin + min(end - begin, int(np.searchsorted(sizes, self.options.tokens_per_shard)) + 1)

    def _encoded(self, start: Position) -> Iterator[tuple[Position, Encoded]]:
        """Chunks from ``start`` on, encoded; each with the position of its first wanted document."""
        positions: list[Position] = []

        def chunks() -> Iterator[Chunk]:
            for part in range(start.part, len(self.parts)):
                for number, chunk in enumerate(read_chunks(self.parts[part])):
                    first = (part, number) == (start.part, start.chunk)
                    if part == start.part and number < start.chunk:
                        progress.update(chunk.read_bytes)
                    else:
                        positions.append(Position(part, number, start.document if first else 0))
                        yield chunk

        total = sum(part.size for part in self.parts[start.part :]) or None
        with (
            tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", disable=None) as progress,
            Encoder(self.tokenizer, self.options.workers) as encoder,
        ):
            for chunk, encoded in encoder.encode(chunks()):
                progress.update(chunk.read_bytes)
                yield positions.pop(0), encoded

    def _rebuild(self, manifest: Manifest) -> None:
        """Make shards of the manifest whose files are gone again; they must come out as they were."""
        for number, shard in enumerate(manifest.shards):
            if all((self.folder / f"{shard.name}.{suffix}").exists() for suffix in shard.files):
                continue
            documents = sum(record.documents for record in manifest.shards[:number])
            text_bytes = sum(record.text_bytes for record in manifest.shards[:number])
            made = next(self._shards(shard.start, number, documents, text_bytes, lambda *_: None, shard.end))
            if made != shard:
                raise UserError(
                    f"{self.folder / shard.name}.bin came out differently from what {MANIFEST_NAME} says: the source "
                    "has changed; prepare the whole corpus again into another --out"
                )

    def _finish(self, journal: Journal) -> Manifest:
        if not journal.shards:
            journal.path.unlink()
            raise UserError(
                f"the sources hold no document ({sum(journal.totals.rejected.values())} bad, "
                f"{sum(journal.totals.filtered.values())} filtered): check the paths, --text-field and the filters"
            )
        record = self.tokenizer.record
        write_whole(self.folder / record.file, self.tokenizer.path.read_bytes())
        manifest = Manifest(
            tokenizer=record,
            dtype=np.dtype(shard_dtype(record.vocabulary_size)).name,
            documents=sum(shard.documents for shard in journal.shards),
            tokens=sum(shard.tokens for shard in journal.shards),
            text_bytes=sum(shard.text_bytes for shard in journal.shards),
            filtered=dict(sorted(journal.totals.filtered.items())),
            rejected=dict(sorted(journal.totals.rejected.items())),
            recipe=self.asked,
            shards=journal.shards,
        )
        write_whole(self.folder / MANIFEST_NAME, manifest.to_json().encode())
        journal.path.unlink()
        return manifest


def shard_name(number: int) -> str:
    """``shard-00000``."""
    return f"shard-{number:05d}"


def describe(recipe: Recipe, parts: list[Part], tokenizer: Tokenizer, options: ShardOptions) -> dict[str, Any]:
    """What decides the shards' bytes: equal descriptions give equal shards. Not the folders' names, nor the workers."""
    return {
        "sources": [{**asdict(source), "source": Path(source.source).name} for source in recipe.sources],
        "files": [part.identity() for part in parts],
        "max_documents": recipe.max_documents,
        "max_bytes": recipe.max_bytes,
        "tokens_per_shard": options.tokens_per_shard,
        "tokenizer": tokenizer.record.sha256,
    }
