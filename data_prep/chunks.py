"""From parts to chunks: one process reads them in order, any process parses them.

How a part is cut into chunks depends on the part alone, so (part, chunk, document) is a lasting address.
jsonl is read line by line here and not by `datasets`, whose reader fails on a whole block where one line is
bad; parquet and the hub go through the readers that `datasets` uses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.files import COMPRESSIONS, decompress, is_remote, open_raw, open_source
from data_prep.recipe import ENORMOUS_BYTES
from data_prep.source_refusals import READ_ERRORS, refuse_missing_columns, unreadable
from data_prep.sources import FileEntry, Part, open_hub
from monet_train.errors import UserError

CHUNK_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"  # some editors put it before a text in UTF-8
LONE_SURROGATE = "\ud800"  # in place of bytes that are not UTF-8: a document that contains it is rejected
ROWS_PER_CHUNK = 256


class Chunk(NamedTuple):
    """A piece of a part; picklable. ``payload``: lines as bytes, rows, or files."""

    part: Part
    first: int  # line or row number of the first document, from 1
    payload: Any
    read_bytes: int  # of the part on disk, for the progress bar
    oversized: tuple[int, ...] = ()  # lines that were skipped as enormous


def read_chunks(part: Part, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Cut a part into chunks of about ``chunk_bytes``, or of ROWS_PER_CHUNK.

    Raises:
        UserError: the part cannot be read to its end.
    """
    readers: dict[str, Callable[[Part, int], Iterator[Chunk]]] = {
        "jsonl": _read_lines,
        "txt": _read_txt,
        "files": _read_files,
        "parquet": lambda part, _: _read_parquet(part),
        "hub": lambda part, _: _read_hub(part),
    }
    try:
        if not part.size and part.path.endswith(COMPRESSIONS) and not is_remote(part.path):
            raise EOFError("it is empty")  # even nothing takes some bytes when compressed
        yield from readers[part.kind](part, chunk_bytes)
    except READ_ERRORS as error:
        raise unreadable(part.path, error) from None


def read_file(entry: FileEntry) -> bytes:
    """The start of a file that is one document; the whole file, unless it is enormous."""
    try:
        with open_source(entry.path) as stream:
            return stream.read(ENORMOUS_BYTES + 1).removeprefix(BOM)
    except READ_ERRORS as error:
        raise unreadable(entry.path, error) from None


def _read_lines(part: Part, chunk_bytes: int) -> Iterator[Chunk]:
    """Whole lines, about ``chunk_bytes`` at a time; a line beyond ENORMOUS_BYTES is skipped and its number noted."""
    begun: list[bytes] = []  # a line whose end has not been read yet
    first, reported, skipping = 1, 0, False
    with open_raw(part.path) as raw, decompress(raw, part.path) as stream:
        while block := stream.read(chunk_bytes):
            position = raw.tell()
            if skipping:
                end = block.find(b"\n")
                if end < 0:
                    continue
                yield Chunk(part, first, b"", position - reported, (first,))
                first, reported, skipping = first + 1, position, False
                block = block[end + 1 :]
            if cut := block.rfind(b"\n") + 1:
                lines = b"".join((*begun, memoryview(block)[:cut]))
                yield Chunk(part, first, lines, position - reported)
                first, reported, begun = first + lines.count(b"\n"), position, []
            begun.append(block[cut:])
            if sum(map(len, begun)) > ENORMOUS_BYTES:
                begun, skipping = [], True
        if skipping:
            yield Chunk(part, first, b"", raw.tell() - reported, (first,))
        elif any(begun):
            yield Chunk(part, first, b"".join(begun), raw.tell() - reported)


def _read_txt(part: Part, chunk_bytes: int) -> Iterator[Chunk]:
    if part.source.txt == "line":
        yield from _read_lines(part, chunk_bytes)
    else:
        whole = Part("files", part.source, part.path, part.size, (FileEntry(part.path, ()),))
        yield from _read_files(whole, chunk_bytes)


def _read_files(part: Part, chunk_bytes: int) -> Iterator[Chunk]:
    group: list[FileEntry] = []
    size = 0
    for number, entry in enumerate(part.files):
        group.append(entry)
        path = Path(entry.path)
        size += path.stat().st_size if path.exists() else 0
        if size >= chunk_bytes or number == len(part.files) - 1:
            yield Chunk(dataclasses.replace(part, files=()), 1, tuple(group), size)
            group, size = [], 0


def _read_parquet(part: Part) -> Iterator[Chunk]:
    import pyarrow
    import pyarrow.parquet

    with open_source(part.path) as stream:
        try:
            # Parquet is read from its end: a compressed file has to be unpacked in memory first.
            readable = pyarrow.BufferReader(stream.read()) if _is_compressed(part.path) else stream
            file = pyarrow.parquet.ParquetFile(readable)
            refuse_missing_columns(part.path, file.schema_arrow.names, part.source)
            columns = [name for name in file.schema_arrow.names if name in part.source.columns]
            rows, total = 1, max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=ROWS_PER_CHUNK, columns=columns):
                yield Chunk(part, rows, _rows(batch), part.size * batch.num_rows // total)
                rows += batch.num_rows
        except pyarrow.ArrowException as error:
            raise unreadable(part.path, error) from None


def _rows(batch: Any) -> list[dict[str, Any]]:
    """The rows of a batch. A value that Python cannot hold costs its document or its label, not the batch."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):
        columns = [map(_value, column) for column in batch.columns]
        return [dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return LONE_SURROGATE
    except (ValueError, OverflowError):  # a date beyond the year 9999
        return None


def _is_compressed(path: str) -> bool:
    return not path.lower().endswith(".parquet")


def _read_hub(part: Part) -> Iterator[Chunk]:
    stream = open_hub(part.source).stream.shard(num_shards=part.streams, index=part.stream)
    rows: list[dict[str, Any]] = []
    first = 1
    wanted = part.source.columns
    try:
        for record in stream:
            rows.append({key: value for key, value in record.items() if key in wanted})
            if len(rows) == ROWS_PER_CHUNK:
                yield Chunk(part, first, rows, 0)
                first, rows = first + len(rows), []
    except UserError:
        raise
    except Exception as error:  # of the network, of a reader that datasets chose
        raise unreadable(part.path, error) from None
    if rows:
        yield Chunk(part, first, rows, 0)
