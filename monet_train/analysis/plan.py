"""What a collection reads: which documents, in which order, cut into which units. The same for any order of shards.

Every choice is a function of what a document says, by the hash of its tokens: its place in the order, the half of the
documents that it belongs to, and whether it is among those that are taken when there are more than enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from monet_train.analysis.labels import MOST_VALUES, Documents, LabelColumn, LabelSchema, NumericColumn
from monet_train.data.documents import ShardDocuments
from monet_train.data.labels import label_columns, read_labels
from monet_train.data.shards import ShardSet, find_shards
from monet_train.errors import UserError
from monet_train.fingerprint import hash_tokens, mix, seed_from

WINDOW = 256  # tokens of a unit at most
DEFAULT_TOKENS_PER_LABEL = 262_144
SAVE_SECONDS = 600.0  # between two saves of what a worker has read


@dataclass(frozen=True)
class Request:
    """What is asked for.

    ``labels``: columns to describe experts by; None: all that the shards have. ``tokens_per_label``: of every value of
    every column, None: all. ``max_tokens``: in all, None: no limit.
    """

    labels: tuple[str, ...] | None = None
    tokens_per_label: int | None = DEFAULT_TOKENS_PER_LABEL
    max_tokens: int | None = None
    window: int = WINDOW


@dataclass(frozen=True)
class Plan:
    """The documents of a collection and how they are read."""

    shards: tuple[Path, ...]  # prefixes
    fingerprints: tuple[str, ...]  # of the shard folders, sorted
    schema: LabelSchema
    documents: Documents
    tokenizer_sha256: str  # of the tokenizer that made the shards
    request: Request

    @property
    def window(self) -> int:
        """Tokens of a unit at most."""
        return self.request.window

    @property
    def tokens(self) -> int:
        """Tokens that the model will read."""
        return int(self.documents.tokens.sum())

    @cached_property
    def first_unit(self) -> np.ndarray:
        """Number of the first unit of each document, and the end, int64 [D + 1]."""
        units = -(-self.documents.tokens // self.window)
        return np.concatenate([[0], np.cumsum(units)])

    @cached_property
    def half(self) -> np.ndarray:
        """The half of each document, 0 or 1: experts are chosen on the first and confirmed on the second, int8 [D]."""
        return (_order(self.documents.hash, "half") >> np.uint64(63)).astype(np.int8)

    def read(self, document: int) -> np.ndarray:
        """The tokens of a document, int64."""
        shard = self._opened[self.documents.shard[document]]
        return shard.read(int(self.documents.number[document]))

    @cached_property
    def _opened(self) -> list[ShardDocuments]:
        return [ShardDocuments(prefix) for prefix in self.shards]

    def token_hashes(self, document: int, begin: int, end: int) -> np.ndarray:
        """A hash of every token of a document by its place in it: what samples and ties go by; uint64."""
        with np.errstate(over="ignore"):
            return mix(self.documents.hash[document] + np.arange(begin, end, dtype=np.uint64))

    def units(self, document: int) -> Iterator[tuple[int, int, int]]:
        """(number of the unit, begin, end) of the windows of a document, which follow one another."""
        length = int(self.documents.tokens[document])
        for number, begin in enumerate(range(0, length, self.window), int(self.first_unit[document])):
            yield number, begin, min(begin + self.window, length)


def make_plan(sources: Sequence[Path], request: Request, vocab_size: int, show: bool = False) -> Plan:
    """Find the documents of shard folders and choose those that are read.

    Args:
        vocab_size: of the model that will read them.
        show: a progress bar.

    Raises:
        UserError: one line: no shards, no labels, an unknown column, nothing to read.
    """
    sets = sorted((find_shards(path) for path in sources), key=lambda found: found.fingerprint)
    tokenizer = _check_sets(sets, vocab_size)
    shards = tuple(shard.prefix for found in sets for shard in found.shards)
    schema = _schema(shards, request.labels)
    documents = _all_documents(shards, schema, show)
    if not len(documents):
        raise UserError(f"{sources[0]} has no documents; give a folder that monet-data shards wrote")
    documents = documents.take(_chosen(documents, schema, request))
    return Plan(shards, tuple(found.fingerprint for found in sets), schema, documents, tokenizer, request)


def _check_sets(sets: Sequence[ShardSet], vocab_size: int) -> str:
    """Refuse shards that cannot be read together. SHA-256 of the tokenizer that made them."""
    for found, following in pairwise(sets):
        if found.fingerprint == following.fingerprint:
            raise UserError(f"{found.path} and {following.path} hold the same tokens; give each source once")
    tokenizers = {}
    for found in sets:
        if found.manifest is None:
            raise UserError(f"{found.path} has no labels, as it was not made by monet-data shards; make it with that")
        record = found.manifest.tokenizer
        tokenizers[record.sha256] = found.path
        if record.vocabulary_size > vocab_size:
            raise UserError(
                f"{found.path}: its tokenizer has {record.vocabulary_size} pieces, the model's vocabulary only "
                f"{vocab_size}; give shards made with the model's tokenizer"
            )
    if len(tokenizers) > 1:
        one, other, *_ = tokenizers.values()
        raise UserError(f"{one} and {other} were made with different tokenizers; give shards made with the model's")
    return next(iter(tokenizers))


def _schema(shards: Sequence[Path], asked: tuple[str, ...] | None) -> LabelSchema:
    """The columns of the shards; those without a value, or with too many, are left out unless they are asked for."""
    there: set[str] = set()
    values: dict[str, set[str]] = {}
    scales: dict[str, float] = {}
    for prefix in shards:
        strings, numbers = label_columns(prefix)
        there.update(strings, numbers)
        wanted = [name for name in (*strings, *numbers) if asked is None or name in asked]
        table = read_labels(prefix, columns=wanted)
        for name in wanted:
            if name in numbers:
                known = np.abs(np.nan_to_num(table[name].to_numpy()))
                scales[name] = max(scales.get(name, 0.0), float(known.max(initial=0.0)))
            else:
                values.setdefault(name, set()).update(v for v in table[name].unique().to_pylist() if v is not None)
    for name in asked or ():
        if name not in there:
            raise UserError(f"--labels {name}: the shards have no such column; they have {', '.join(sorted(there))}")
        if len(values.get(name, ())) > MOST_VALUES:
            raise UserError(f"--labels {name}: {len(values[name]):,} values are too many; {MOST_VALUES} are possible")
    return LabelSchema(
        tuple(LabelColumn(n, tuple(sorted(v))) for n, v in sorted(values.items()) if 0 < len(v) <= MOST_VALUES),
        tuple(NumericColumn(name, scale or 1.0) for name, scale in sorted(scales.items())),
    )


def _all_documents(shards: Sequence[Path], schema: LabelSchema, show: bool) -> Documents:
    """Every document that has tokens, ordered by hash; those that say the same, by shard and number."""
    parts = []
    with tqdm(total=len(shards), desc="hashing documents", unit="shard", disable=not show or None) as bar:
        for number, prefix in enumerate(shards):
            parts.append(_documents_of(number, prefix, schema))
            bar.update()
    together = Documents(
        *(np.concatenate([getattr(part, name) for part in parts], axis=-1) for name in Documents.__dataclass_fields__)
    )
    order = np.lexsort((together.number, together.shard, together.hash))
    return together.take(order[together.tokens[order] > 0])


def _documents_of(number: int, prefix: Path, schema: LabelSchema) -> Documents:
    shard, (strings, numbers) = ShardDocuments(prefix), label_columns(prefix)
    wanted = [column.name for column in schema.columns if column.name in strings]
    wanted += [column.name for column in schema.numeric if column.name in numbers]
    labels = read_labels(prefix, columns=wanted)
    if wanted and labels.num_rows != len(shard):
        raise UserError(f"{prefix}.labels.parquet has {labels.num_rows} rows for {len(shard)} documents; make it again")
    cells = np.full((len(schema.columns), len(shard)), -1, np.int32)
    values = np.full((len(schema.numeric), len(shard)), np.nan)
    for place, column in enumerate(schema.columns):
        if column.name in wanted:
            cells[place] = _cells(labels[column.name], column.values, schema.first_cell(place))
    for place, numeric in enumerate(schema.numeric):
        if numeric.name in wanted:
            values[place] = labels[numeric.name].to_numpy() / numeric.scale
    hashes = np.fromiter((hash_tokens(shard.read(n)) for n in range(len(shard))), np.uint64, len(shard))
    return Documents(np.full(len(shard), number, np.int32), np.arange(len(shard)), hashes, shard.lengths, cells, values)


def _cells(column: Any, values: tuple[str, ...], first: int) -> np.ndarray:
    """The cell of each document, -1 where the value is unknown; int32."""
    codes = column.combine_chunks()
    known = {value: cell for cell, value in enumerate(values, first)}
    lookup = np.array([*(known.get(value, -1) for value in codes.dictionary.to_pylist()), -1], np.int32)
    return lookup[codes.indices.fill_null(-1).to_numpy(zero_copy_only=False)]


def _chosen(documents: Documents, schema: LabelSchema, request: Request) -> np.ndarray:
    """The rows that are read, ascending."""
    by_draw = np.argsort(_order(documents.hash, "draw"), kind="stable")
    taken = np.zeros(len(documents), bool)
    if request.tokens_per_label is None or not schema.cells:
        taken[:] = True
    else:
        for cell in range(schema.cells):
            rows = by_draw[(documents.cell[:, by_draw] == cell).any(0)]
            before = np.cumsum(documents.tokens[rows]) - documents.tokens[rows]
            taken[rows[before < request.tokens_per_label]] = True
    if request.max_tokens is not None:
        rows = by_draw[taken[by_draw]]
        before = np.cumsum(documents.tokens[rows]) - documents.tokens[rows]
        taken[rows[before >= request.max_tokens]] = False
    return np.flatnonzero(taken)


def _order(hashes: np.ndarray, purpose: str) -> np.ndarray:
    """Hashes that have nothing to do with those of another purpose; uint64."""
    return mix(hashes ^ np.uint64(seed_from(f"atlas {purpose}")))
