"""One shard on its way to the disk: temporary names, checksums, fsync, rename."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.encode import Encoded
from data_prep.files import sha256_file, sync
from data_prep.recipe import LABELS
from monet_train.data.manifest import FileRecord, Position, ShardRecord
from monet_train.errors import UserError

SUFFIXES = ("labels.parquet", "bin", "idx")  # in the order of renaming: the index comes last
MANY_VALUES = 1000  # label values counted one by one in the manifest; the labels file has all


def shard_dtype(vocabulary_size: int) -> type[np.number]:
    """The type of the tokens: Megatron's choice for a vocabulary."""
    from monet_train.data.megatron import DType

    return DType.optimal_dtype(vocabulary_size)


class ShardWriter:
    """Collects documents; ``finish`` puts the shard under its final name, ``abandon`` leaves nothing."""

    def __init__(self, folder: Path, name: str, dtype: type[np.number], start: Position) -> None:
        from monet_train.data.megatron import IndexedDatasetBuilder

        self.folder, self.name, self.start = folder, name, start
        self.documents = self.tokens = self.text_bytes = 0
        self._lengths: list[np.ndarray] = []
        self._bytes: list[np.ndarray] = []
        self._labels: list[tuple[str | None, ...]] = []
        self._builder = IndexedDatasetBuilder(str(self._temporary("bin")), dtype=dtype)

    def _temporary(self, suffix: str) -> Path:
        return self.folder / f".{self.name}.{suffix}.tmp"

    def _final(self, suffix: str) -> Path:
        return self.folder / f"{self.name}.{suffix}"

    def add(self, encoded: Encoded, begin: int, end: int) -> None:
        """Add documents ``begin`` to ``end`` of a chunk."""
        lengths = encoded.lengths[begin:end]
        position = int(encoded.lengths[:begin].sum(dtype=np.int64))
        for length in lengths.tolist():
            self._builder.add_document(encoded.tokens[position : position + length], [length])
            position += length
        self._lengths.append(lengths)
        self._bytes.append(encoded.text_bytes[begin:end])
        self._labels += encoded.labels[begin:end]
        self.documents += end - begin
        self.tokens += int(lengths.sum(dtype=np.int64))
        self.text_bytes += int(encoded.text_bytes[begin:end].sum())

    def finish(self, end: Position) -> ShardRecord:
        """Write index and labels, make all durable, rename, and describe the shard."""
        self._builder.finalize(str(self._temporary("idx")))
        lengths = np.concatenate(self._lengths or [np.zeros(0, np.int32)])
        sizes = np.concatenate(self._bytes or [np.zeros(0, np.int64)])
        self._write_labels(sizes)
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
            end=end,
            files=files,
            labels={
                column: _count(functools.partial(_column, self._labels, number), lengths, sizes)
                for number, column in enumerate(LABELS)
            },
        )

    def abandon(self) -> None:
        """Remove what was written so far."""
        self._builder.data_file.close()
        for suffix in SUFFIXES:
            self._temporary(suffix).unlink(missing_ok=True)

    def _write_labels(self, sizes: np.ndarray) -> None:
        import pyarrow
        import pyarrow.parquet

        columns = {
            column: pyarrow.array(_column(self._labels, number), pyarrow.string()).dictionary_encode()
            for number, column in enumerate(LABELS)
        }
        table = pyarrow.table({**columns, "bytes": pyarrow.array(sizes)})
        pyarrow.parquet.write_table(table, self._temporary("labels.parquet"), compression="zstd")


def _column(labels: list[tuple[str | None, ...]], number: int) -> Iterator[str | None]:
    return (row[number] for row in labels)


def _count(values: functools.partial, lengths: np.ndarray, sizes: np.ndarray) -> dict[str, list[int]]:
    """Documents, tokens and bytes by value of a label; the rarest values of very many are summed up."""
    counts: dict[str, list[int]] = {}
    for value, length, size in zip(values(), lengths.tolist(), sizes.tolist(), strict=True):
        row = counts.setdefault(value or "(none)", [0, 0, 0])
        row[0] += 1
        row[1] += length
        row[2] += size
    kept = sorted(counts, key=lambda value: (-counts[value][1], value))
    result = {value: counts[value] for value in sorted(kept[:MANY_VALUES])}
    if rest := [counts[value] for value in kept[MANY_VALUES:]]:
        result["(others)"] = [sum(column) for column in zip(*rest, strict=True)]
    return result


def disk_error(folder: Path, error: OSError) -> UserError:
    """The one line for a folder that cannot be written."""
    return UserError(
        f"{folder} cannot be written ({error.strerror or error}): make room or choose another --out, and run the "
        "same command again, which goes on where it stopped"
    )
