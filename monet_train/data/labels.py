"""Labels of documents (language, domain, source and others), kept beside the shards for the analysis of experts."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from monet_train.errors import UserError

CACHE_BYTES = 256 << 20  # row groups kept for documents that are asked for by number


def read_labels(
    prefix: Path, documents: slice | Sequence[int] | np.ndarray | None = None, columns: Iterable[str] | None = None
) -> Any:
    """The labels of some documents of a shard, one column per label.

    Text columns are dictionaries: ``table["lang"].chunk(0)`` has ``indices`` [documents] and ``dictionary``, so that
    counting and averaging by label needs no Python object per document. Numbers are float64. Both are null where a
    document has no value.

    Args:
        prefix: the shard, without suffix; ``PackedSequences.pieces`` gives it for a training sequence.
        documents: a slice, or numbers in any order and with repetitions; None: all.
        columns: from those in :func:`label_columns`, ``bytes`` and, if there are any, ``id``; None: all.

    Returns:
        A ``pyarrow.Table`` with one row per document, in the order asked for, each column in one chunk. Besides it, at
        most one row group of the file (a million documents) and CACHE_BYTES are in memory.

    Raises:
        UserError: the shard has no labels (Megatron's own tools write none), or no such document or column.
    """
    import pyarrow

    starts, known, _ = _layout(prefix, _version(prefix))
    names = known if columns is None else tuple(columns)
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"labels {prefix}: there is no column {unknown[0]!r}: choose from {', '.join(known)}")
    if documents is None or isinstance(documents, slice):
        numbers = np.arange(starts[-1], dtype=np.int64)[documents or slice(None)]
        read = _read_group  # a range is read once
    else:
        numbers = np.asarray(documents, dtype=np.int64)
        read = _row_groups.get
    outside = numbers[(numbers < 0) | (numbers >= starts[-1])]
    if len(outside):
        raise UserError(f"{prefix}: there is no document {outside[0]}: the shard has {starts[-1]}")
    order = np.argsort(numbers, kind="stable")
    ascending = numbers[order]
    tables = []
    for group in range(len(starts) - 1):
        rows = ascending[slice(*np.searchsorted(ascending, starts[group : group + 2]))] - starts[group]
        if len(rows):
            tables.append(_take(read(prefix, group, names), rows))
    if not tables:
        tables = [_read_group(prefix, 0, names).slice(0, 0)]
    table = pyarrow.concat_tables(tables).unify_dictionaries()
    if (np.diff(order) != 1).any():
        table = table.take(np.argsort(order, kind="stable"))
    return table.combine_chunks()


def document_labels(prefix: Path, document: int) -> dict[str, str | int | float | None]:
    """The labels of one document of a shard: all columns, ``bytes`` and, if there are any, ``id`` among them.

    Args:
        prefix: see :func:`read_labels`, which reads those of many documents faster.
        document: number of the document in the shard.

    Raises:
        UserError: the shard has no labels, or no such document.
    """
    return read_labels(prefix, [document]).to_pylist()[0]


class LabelColumns(NamedTuple):
    """The labels of a shard, by kind: ``lang``, ``domain`` and ``source``, and what ``--keep`` kept."""

    strings: tuple[str, ...]
    numbers: tuple[str, ...]


def label_columns(prefix: Path) -> LabelColumns:
    """The labels that a shard has; they are the same in all shards of a folder. None of them is read.

    Args:
        prefix: the shard, without suffix.

    Raises:
        UserError: the shard has no labels.
    """
    return _layout(prefix, _version(prefix)).labels


class _Layout(NamedTuple):
    starts: np.ndarray  # int64 [row groups + 1], the first document of each, and the end
    columns: tuple[str, ...]
    labels: LabelColumns


def _file(prefix: Path) -> Path:
    return Path(f"{prefix}.labels.parquet")


def _version(prefix: Path) -> tuple[int, ...]:
    """Distinguishes a file that was rewritten from the one before."""
    try:
        stat = _file(prefix).stat()
    except OSError:
        return ()  # opening it will say what is wrong
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


@lru_cache(maxsize=1024)
def _layout(prefix: Path, version: tuple[int, ...]) -> _Layout:
    """The layout of a shard's labels, without reading them."""
    from pyarrow.types import is_dictionary, is_floating

    with _opened(prefix) as file:
        groups = [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
        schema = file.schema_arrow
        by_kind = [tuple(field.name for field in schema if kind(field.type)) for kind in (is_dictionary, is_floating)]
        return _Layout(np.cumsum([0, *groups], dtype=np.int64), tuple(schema.names), LabelColumns(*by_kind))


def _read_group(prefix: Path, number: int, columns: tuple[str, ...]) -> Any:
    """A row group of a shard's labels."""
    with _opened(prefix) as file:
        # Not with threads: they can outlive the interpreter, which then aborts.
        return file.read_row_group(number, columns=list(columns), use_threads=False)


class RowGroups:
    """Row groups of shards' labels; those that were asked for last are kept in memory.

    Args:
        limit: bytes to keep; the last one always stays.
    """

    def __init__(self, limit: int = CACHE_BYTES) -> None:
        self._limit = limit
        # (shard, version of its file, row group, columns) -> table, the one used last at the end
        self._kept: OrderedDict[tuple[Path, tuple[int, ...], int, tuple[str, ...]], Any] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """What is kept."""
        return sum(table.nbytes for table in self._kept.values())

    def get(self, prefix: Path, number: int, columns: tuple[str, ...]) -> Any:
        """A row group, from memory if it is there."""
        key = (prefix, _version(prefix), number, columns)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = _read_group(prefix, number, columns)
            self._kept.move_to_end(key)
            while len(self._kept) > 1 and self.nbytes > self._limit:
                self._kept.popitem(last=False)
            return self._kept[key]


_row_groups = RowGroups()


def _take(table: Any, rows: np.ndarray) -> Any:
    """The ``rows`` of a table, in ascending order; neighbours without a copy."""
    if rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all():
        return table.slice(int(rows[0]), len(rows))
    return table.take(rows)


@contextmanager
def _opened(prefix: Path) -> Iterator[Any]:
    """The parquet file of a shard's labels.

    Raises:
        UserError: it is missing or cannot be read.
    """
    import pyarrow
    import pyarrow.parquet

    path = _file(prefix)
    try:
        with path.open("rb") as stream:  # a name with a colon would be taken for an address
            yield pyarrow.parquet.ParquetFile(stream)
    except (OSError, pyarrow.ArrowException) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise UserError(f"labels {path}: the file {reason}: make the shards with `monet-data shards`") from None
