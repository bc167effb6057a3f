"""One shard on its way to the disk: temporary names, checksums, fsync, rename."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.encode import Column, Encoded
from data_prep.recipe import LABELS
from monet_train.data.index_file import write_index
from monet_train.data.manifest import FileRecord, Position, ShardRecord
from monet_train.durable import sync
from monet_train.fingerprint import sha256_file

SUFFIXES = ("labels.parquet", "bin", "idx")  # in the order of renaming: the index comes last
NO_VALUE, OTHERS = "(none)", "(others)"
MANY_VALUES = 1000  # label values counted one by one in the manifest; the labels file has them all


class ShardWriter:
    """Collects documents; ``finish`` puts the shard under its final name, ``abandon`` leaves nothing."""

    def __init__(self, folder: Path, name: str, dtype: type[np.number], start: Position) -> None:
        self.folder, self.name = folder, name
        self.start = self.end = start
        self.documents = self.tokens = self.text_bytes = 0
        self._lengths: list[np.ndarray] = []
        self._bytes: list[np.ndarray] = []
        self._values: list[dict[str, int]] = [{} for _ in LABELS]  # of each label, with their codes in this shard
        self._codes: list[list[np.ndarray]] = [[] for _ in LABELS]
        self._ids: list[str | None] = []
        self._dtype = dtype
        self._bin = self._temporary("bin").open("wb")

    def _temporary(self, suffix: str) -> Path:
        return self.folder / f".{self.name}.{suffix}.tmp"

    def _final(self, suffix: str) -> Path:
        return self.folder / f"{self.name}.{suffix}"

    def add(self, encoded: Encoded, begin: int, end: int, position: Position) -> None:
        """Add documents ``begin`` to ``end`` of a chunk; ``position`` is that of the document after them."""
        self.end = position
        lengths = encoded.lengths[begin:end]
        offset = int(encoded.lengths[:begin].sum(dtype=np.int64))
        tokens = encoded.tokens[offset : offset + int(lengths.sum(dtype=np.int64))]
        self._bin.write(tokens.astype(self._dtype, copy=False).data)
        self._lengths.append(lengths)
        self._bytes.append(encoded.text_bytes[begin:end])
        for values, codes, column in zip(self._values, self._codes, encoded.labels, strict=True):
            codes.append(_recode(column, begin, end, values))
        self._ids += encoded.ids[begin:end]
        self.documents += end - begin
        self.tokens += int(lengths.sum(dtype=np.int64))
        self.text_bytes += int(encoded.text_bytes[begin:end].sum())

    def finish(self) -> ShardRecord:
        """Write index and labels, make all durable, rename, and describe the shard."""
        lengths, sizes = np.concatenate(self._lengths), np.concatenate(self._bytes)
        self._bin.close()
        write_index(self._temporary("idx"), self._dtype, lengths)
        labels = self._write_labels(lengths, sizes)
        files = {}
        for suffix in SUFFIXES:
            temporary = self._temporary(suffix)
            sync(temporary)
            files[suffix] = FileRecord(temporary.stat().st_size, sha256_file(temporary))
        for suffix in SUFFIXES:
            self._temporary(suffix).replace(self._final(suffix))
        sync(self.folder)
        return ShardRecord(
            name=self.name,
            documents=self.documents,
            tokens=self.tokens,
            text_bytes=self.text_bytes,
            start=self.start,
            end=self.end,
            files=files,
            labels=labels,
        )

    def abandon(self) -> None:
        """Remove what was written so far."""
        with contextlib.suppress(OSError):  # a full disk cannot take what is still buffered
            self._bin.close()
        for suffix in SUFFIXES:
            self._temporary(suffix).unlink(missing_ok=True)

    def _write_labels(self, lengths: np.ndarray, sizes: np.ndarray) -> dict[str, dict[str, list[int]]]:
        """Write the labels of every document; return the counts by label and value."""
        import pyarrow
        import pyarrow.parquet

        codes = [np.concatenate(parts) for parts in self._codes]
        columns = {
            name: pyarrow.DictionaryArray.from_arrays(_numbers(of, of >= 0), _strings(list(values)))
            for name, values, of in zip(LABELS, self._values, codes, strict=True)
        }
        table = pyarrow.table({**columns, "bytes": _numbers(sizes)})
        if any(name is not None for name in self._ids):
            table = table.append_column("id", _strings(self._ids))
        # As a stream: a name with a colon would be taken for an address.
        with self._temporary("labels.parquet").open("wb") as stream:
            pyarrow.parquet.write_table(table, stream, compression="zstd")
        return {
            name: count_labels(list(values), of, lengths, sizes)
            for name, values, of in zip(LABELS, self._values, codes, strict=True)
        }


# pyarrow.array would import pandas first, which takes 0.3 s.
def _numbers(values: np.ndarray, valid: np.ndarray | None = None) -> Any:
    """An Arrow array of numbers, null where not ``valid``."""
    import pyarrow

    bits = None if valid is None else pyarrow.py_buffer(np.packbits(valid, bitorder="little"))
    kind = pyarrow.from_numpy_dtype(values.dtype)
    return pyarrow.Array.from_buffers(kind, len(values), [bits, pyarrow.py_buffer(values)])


def _strings(values: list[str | None]) -> Any:
    """An Arrow array of strings, null for None."""
    import pyarrow

    data = [(value or "").encode() for value in values]
    ends = np.cumsum([0, *map(len, data)], dtype=np.int64)
    valid = np.packbits(np.array([value is not None for value in values], dtype=bool), bitorder="little")
    buffers = [pyarrow.py_buffer(part) for part in (valid, ends, b"".join(data))]
    return pyarrow.Array.from_buffers(pyarrow.large_string(), len(values), buffers)


def _recode(column: Column, begin: int, end: int, values: dict[str, int]) -> np.ndarray:
    """The codes of documents ``begin`` to ``end`` in ``values``, to which new values are added; int32."""
    codes = column.codes[begin:end]
    places = np.full(len(column.values) + 1, -1, dtype=np.int32)  # the last is that of code -1
    for code in dict.fromkeys(codes[codes >= 0].tolist()):
        places[code] = values.setdefault(column.values[code], len(values))
    return places[codes]


def count_labels(values: list[str], codes: np.ndarray, lengths: np.ndarray, sizes: np.ndarray) -> dict[str, list[int]]:
    """Documents, tokens and bytes by value; the rarest of very many values are summed up."""
    values = values if NO_VALUE in values else [*values, NO_VALUE]
    codes = np.where(codes < 0, values.index(NO_VALUE), codes)
    sums = [np.bincount(codes, weights, len(values)).astype(np.int64) for weights in (None, lengths, sizes)]
    rows = {value: [int(x) for x in row] for value, *row in zip(values, *sums, strict=True) if row[0]}
    kept = sorted(rows, key=lambda value: (-rows[value][1], value))
    result = {value: rows[value] for value in sorted(kept[:MANY_VALUES])}
    if rest := [rows[value] for value in kept[MANY_VALUES:]]:
        rest += [result[OTHERS]] if OTHERS in result else []
        result[OTHERS] = [sum(counts) for counts in zip(*rest, strict=True)]
    return result
