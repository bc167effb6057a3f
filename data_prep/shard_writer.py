"""One shard on its way to the disk: temporary names, checksums, fsync, rename."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.encode import Column, Encoded
from data_prep.recipe import LABELS, Recipe
from monet_train.data.index_file import write_index
from monet_train.data.manifest import FileRecord, Manifest, NumberCounts, Position, ShardRecord
from monet_train.durable import sync
from monet_train.fingerprint import sha256_file

SUFFIXES = ("labels.parquet", "bin", "idx")  # in the order of renaming: the index comes last
NO_VALUE, OTHERS = "(none)", "(others)"
MANY_VALUES = 1000  # label values counted one by one in the manifest; the labels file has them all


class ShardWriter:
    """Collects documents; ``finish`` puts the shard under its final name, ``abandon`` leaves nothing."""

    def __init__(self, folder: Path, name: str, dtype: type[np.number], start: Position, recipe: Recipe) -> None:
        """``recipe`` says which labels the shard has, also those that none of its documents has."""
        self.folder, self.name = folder, name
        self.start = self.end = start
        self.documents = self.tokens = self.text_bytes = 0
        self._lengths: list[np.ndarray] = []
        self._bytes: list[np.ndarray] = []
        # Of each string, its values with their codes in this shard.
        self._values: dict[str, dict[str, int]] = {name: {} for name in recipe.strings}
        self._codes: dict[str, list[np.ndarray]] = {name: [] for name in recipe.strings}
        self._numbers: dict[str, list[np.ndarray]] = {name: [] for name in recipe.numbers}
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
        for name, codes in self._codes.items():  # a source need not have the labels of another
            column = encoded.labels.get(name)
            none = np.full(end - begin, -1, dtype=np.int32)
            codes.append(_recode(column, begin, end, self._values[name]) if column else none)
        for name, parts in self._numbers.items():
            numbers = encoded.numbers.get(name)
            parts.append(np.full(end - begin, np.nan) if numbers is None else numbers[begin:end])
        self._ids += encoded.ids[begin:end]
        self.documents += end - begin
        self.tokens += int(lengths.sum(dtype=np.int64))
        self.text_bytes += int(encoded.text_bytes[begin:end].sum())

    def finish(self) -> ShardRecord:
        """Write index and labels, make all durable, rename, and describe the shard."""
        lengths, sizes = np.concatenate(self._lengths), np.concatenate(self._bytes)
        self._bin.close()
        write_index(self._temporary("idx"), self._dtype, lengths)
        labels, numbers = self._write_labels(lengths, sizes)
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
            numbers=numbers,
        )

    def abandon(self) -> None:
        """Remove what was written so far."""
        with contextlib.suppress(OSError):  # a full disk cannot take what is still buffered
            self._bin.close()
        for suffix in SUFFIXES:
            self._temporary(suffix).unlink(missing_ok=True)

    def _write_labels(
        self, lengths: np.ndarray, sizes: np.ndarray
    ) -> tuple[dict[str, dict[str, list[int]]], dict[str, NumberCounts]]:
        """Write the labels of every document; return the counts of strings, by value, and of numbers."""
        import pyarrow
        import pyarrow.parquet

        codes = {name: np.concatenate(parts) for name, parts in self._codes.items()}
        numbers = {name: np.concatenate(parts) for name, parts in self._numbers.items()}
        columns = {
            name: pyarrow.DictionaryArray.from_arrays(_numbers(of, of >= 0), _strings(list(self._values[name])))
            for name, of in codes.items()
        }
        columns |= {name: _numbers(of, ~np.isnan(of)) for name, of in numbers.items()}
        table = pyarrow.table({**columns, "bytes": _numbers(sizes)})
        if any(name is not None for name in self._ids):
            table = table.append_column("id", _strings(self._ids))
        # As a stream: a name with a colon would be taken for an address.
        with self._temporary("labels.parquet").open("wb") as stream:
            pyarrow.parquet.write_table(table, stream, compression="zstd")
        counts = {name: count_labels(list(self._values[name]), of, lengths, sizes) for name, of in codes.items()}
        return counts, {name: count_numbers(of, lengths) for name, of in numbers.items()}


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


def count_numbers(values: np.ndarray, lengths: np.ndarray) -> NumberCounts:
    """What has a value (not NaN), and the range of the values."""
    there = ~np.isnan(values)
    ends = (float(values[there].min()), float(values[there].max())) if there.any() else (None, None)
    return NumberCounts(int(there.sum()), int(lengths[there].sum(dtype=np.int64)), *ends)


def labels_without_value(manifest: Manifest) -> list[str]:
    """The further labels that no document has: as likely as not a field's name was misspelt."""
    strings = [name for name, values in manifest.label_counts.items() if values.keys() == {NO_VALUE}]
    numbers = [name for name, counts in manifest.number_counts.items() if not counts.documents]
    return [name for name in strings + numbers if name not in LABELS]
