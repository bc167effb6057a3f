"""From parts to documents: chunks are read in order by one process and parsed by any.

How a part is cut into chunks depends on the part alone, so (part, chunk, document) is a lasting address.
jsonl is read line by line here and not by `datasets`, whose reader fails on a whole block where one line is
bad; parquet and the hub go through the readers that `datasets` uses.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from data_prep.files import COMPRESSIONS, READ_ERRORS, decompress, is_remote, open_raw, open_source, unreadable
from data_prep.recipe import ENORMOUS_BYTES, LABELS, Source
from data_prep.sources import FileEntry, Part, open_hub
from monet_train.errors import UserError

CHUNK_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"  # some editors put it before a text in UTF-8
LONE_SURROGATE = "\ud800"  # stands for bytes that are not UTF-8: a document with it is rejected for that
ROWS_PER_CHUNK = 256


class Document(NamedTuple):
    """A text and its labels (in the order of LABELS; None: unknown)."""

    text: str
    size: int  # bytes of UTF-8
    labels: tuple[str | None, ...]
    id: str | None


class Reject(NamedTuple):
    """A bad document: the file, its line or row there (from 1), and why."""

    file: str
    line: int
    reason: str


class Chunk(NamedTuple):
    """A piece of a part; picklable. ``payload``: lines as bytes, rows, or files."""

    part: Part
    first: int  # line or row number of the first document, from 1
    payload: Any
    read_bytes: int  # of the part on disk, for the progress bar
    oversized: tuple[int, ...] = ()  # lines that were skipped as enormous


class Parsed(NamedTuple):
    """What a chunk holds."""

    documents: list[Document]
    rejects: list[Reject]
    filtered: dict[str, int]


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
            raise EOFError("it is empty")  # what compresses nothing has some bytes
        yield from readers[part.kind](part, chunk_bytes)
    except READ_ERRORS as error:
        raise unreadable(part.path, error) from None


def parse(chunk: Chunk) -> Parsed:
    """The documents of a chunk that the source's filters keep, and what is wrong with the others."""
    sieve = _Sieve(chunk.part.source, chunk.part.path)
    for number in chunk.oversized:
        sieve.reject(number, "enormous")
    if chunk.part.kind == "files":
        for entry in chunk.payload:
            given = dict(entry.labels)
            sieve.add(_read_file(entry), 0, [given.get(label) for label in LABELS], file=entry.path)
    elif isinstance(chunk.payload, bytes):
        plain = chunk.part.kind == "txt"
        payload: bytes = chunk.payload.removeprefix(BOM) if chunk.first == 1 else chunk.payload
        for number, line in enumerate(payload.split(b"\n"), chunk.first):
            if not line or line.isspace():
                continue
            if plain:
                sieve.add(line.removesuffix(b"\r"), number, [None] * len(LABELS))
            else:
                sieve.add_record(_json(line), number)
    else:
        for number, record in enumerate(chunk.payload, chunk.first):
            sieve.add_record(record, number)
    return sieve.parsed


class _Sieve:
    """Sorts what a source gives into documents, rejects, and documents that the filters leave out."""

    def __init__(self, source: Source, file: str) -> None:
        self.parsed = Parsed([], [], {})
        self._source, self._file = source, file
        self._fields = [source.fields.get(label) for label in LABELS]
        self._fixed = [(number, source.labels[label]) for number, label in enumerate(LABELS) if label in source.labels]
        self._where = [(LABELS.index(label), wanted) for label, wanted in source.where.items()]

    def reject(self, line: int, reason: str, file: str | None = None) -> None:
        """Note a bad document."""
        self.parsed.rejects.append(Reject(file or self._file, line, reason))

    def add_record(self, record: Any, line: int) -> None:
        """A record of jsonl, parquet or a hub dataset; a str is the reason why there is none."""
        if not isinstance(record, dict):
            reason = record if isinstance(record, str) else f"a record is a {type(record).__name__}, not an object"
            return self.reject(line, reason)
        source, name = self._source, None
        if source.id:
            name = record.get(source.id)
            if name is None:
                return self.reject(line, f"no field {source.id!r}")
            if isinstance(name, bool) or not isinstance(name, str | int):
                kind = type(name).__name__  # orjson takes a whole number beyond 64 bits for a float
                return self.reject(line, f"the id is a {kind}, not a string or a whole number below 2^64")
            name = str(name)
            if _utf8_bytes(name) is None:
                return self.reject(line, "invalid UTF-8")
        if source.text not in record:
            return self.reject(line, f"no field {source.text!r}")
        labels: list[str | None] = []
        for field in self._fields:
            value = None if field is None else record.get(field)
            if value is not None:
                value = str(value)
                if not value.isascii() and _utf8_bytes(value) is None:
                    return self.reject(line, "invalid UTF-8")
            labels.append(value)
        return self.add(record[source.text], line, labels, name)

    def add(
        self, text: Any, line: int, labels: list[str | None], name: str | None = None, file: str | None = None
    ) -> None:
        """A text (str or bytes) with its labels in the order of LABELS."""
        if isinstance(text, bytes):
            try:
                text = text.decode()
            except UnicodeDecodeError:
                return self.reject(line, "invalid UTF-8", file)
        if not isinstance(text, str):
            return self.reject(line, f"the text is a {type(text).__name__}", file)
        if not text or text.isspace():
            return self.reject(line, "empty", file)
        size = _utf8_bytes(text)
        if size is None:
            return self.reject(line, "invalid UTF-8", file)
        if size > ENORMOUS_BYTES:
            return self.reject(line, "enormous", file)
        for number, value in self._fixed:
            labels[number] = value
        if unwanted := self._unwanted(text, labels):
            self.parsed.filtered[unwanted] = self.parsed.filtered.get(unwanted, 0) + 1
        else:
            self.parsed.documents.append(Document(text, size, tuple(labels), name))
        return None

    def _unwanted(self, text: str, labels: list[str | None]) -> str | None:
        """The filter that leaves a document out."""
        for number, wanted in self._where:
            if labels[number] not in wanted:
                return LABELS[number]
        least, most = self._source.min_chars, self._source.max_chars
        return "length" if len(text) < least or (most is not None and len(text) > most) else None


def _utf8_bytes(text: str) -> int | None:
    """Size of a text; None if it has a lone surrogate, from an escape in JSON."""
    if text.isascii():
        return len(text)
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        return None


def _json(line: bytes) -> Any:
    """The value of a line, or the reason (a str) why there is no object."""
    try:
        value = orjson.loads(line)
    except ValueError:
        try:
            value = json.loads(line.decode())  # more lenient (NaN, lone surrogates), and tells what is wrong
        except UnicodeDecodeError:
            return "invalid UTF-8"
        except (ValueError, RecursionError):
            return "not JSON"
    return f"a record is a {type(value).__name__}, not an object" if isinstance(value, str) else value


def _read_file(entry: FileEntry) -> bytes:
    try:
        with open_source(entry.path) as stream:
            return stream.read(ENORMOUS_BYTES + 1).removeprefix(BOM)
    except READ_ERRORS as error:
        raise unreadable(entry.path, error) from None


def _read_lines(part: Part, chunk_bytes: int) -> Iterator[Chunk]:
    """Whole lines, about ``chunk_bytes`` at a time; a line beyond ENORMOUS_BYTES is skipped and named."""
    begun: list[bytes] = []  # a line whose end was not read yet
    first, told, skipping = 1, 0, False
    with open_raw(part.path) as raw, decompress(raw, part.path) as stream:
        while block := stream.read(chunk_bytes):
            position = raw.tell()
            if skipping:
                end = block.find(b"\n")
                if end < 0:
                    continue
                yield Chunk(part, first, b"", position - told, (first,))
                first, told, skipping = first + 1, position, False
                block = block[end + 1 :]
            if cut := block.rfind(b"\n") + 1:
                lines = b"".join((*begun, memoryview(block)[:cut]))
                yield Chunk(part, first, lines, position - told)
                first, told, begun = first + lines.count(b"\n"), position, []
            begun.append(block[cut:])
            if sum(map(len, begun)) > ENORMOUS_BYTES:
                begun, skipping = [], True
        if skipping:
            yield Chunk(part, first, b"", raw.tell() - told, (first,))
        elif any(begun):
            yield Chunk(part, first, b"".join(begun), raw.tell() - told)


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
            file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(stream.read()) if _packed(part.path) else stream)
            columns = [name for name in file.schema_arrow.names if name in part.source.columns]
            for option, name in (("--text-field", part.source.text), ("--id-field", part.source.id)):
                if name and name not in columns:
                    raise UserError(
                        f"source {part.path} has no column {name!r}: choose with {option} from "
                        f"{', '.join(file.schema_arrow.names)}"
                    )
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


def _packed(path: str) -> bool:
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
