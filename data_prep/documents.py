"""From parts to documents: chunks are read in order by one process and parsed by any.

How a part is cut into chunks depends on the part alone, so (part, chunk, document) is a lasting address.
jsonl is read line by line here and not by `datasets`, whose reader fails on a whole block where one line is
bad; parquet and the hub go through the readers that `datasets` uses.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from data_prep.files import READ_ERRORS, open_source, unreadable
from data_prep.recipe import ENORMOUS_BYTES, LABELS, Source
from data_prep.sources import FileEntry, Part, open_hub
from monet_train.errors import UserError

CHUNK_BYTES = 1 << 20
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


def read_chunks(part: Part) -> Iterator[Chunk]:
    """Cut a part into chunks of about CHUNK_BYTES.

    Raises:
        UserError: the part cannot be read to its end.
    """
    readers = {"jsonl": _read_lines, "txt": _read_txt, "parquet": _read_parquet, "files": _read_files, "hub": _read_hub}
    try:
        yield from readers[part.kind](part)
    except READ_ERRORS as error:
        raise unreadable(part.path, error) from None


def parse(chunk: Chunk) -> Parsed:
    """The documents of a chunk that the source's filters keep, and what is wrong with the others."""
    parsed = Parsed([], [Reject(chunk.part.path, n, "enormous") for n in chunk.oversized], {})
    source = chunk.part.source
    if chunk.part.kind == "files":
        for entry in chunk.payload:
            _add(parsed, source, _read_file(entry), entry.path, 0, dict(entry.labels))
    elif isinstance(chunk.payload, bytes):
        plain = chunk.part.kind == "txt"
        for number, line in enumerate(chunk.payload.split(b"\n"), chunk.first):
            if not line.strip():
                continue
            if plain:
                _add(parsed, source, line, chunk.part.path, number, {})
            else:
                _add_record(parsed, source, _json(line), chunk.part.path, number)
    else:
        for number, record in enumerate(chunk.payload, chunk.first):
            _add_record(parsed, source, record, chunk.part.path, number)
    return parsed


def _add_record(parsed: Parsed, source: Source, record: Any, file: str, line: int) -> None:
    if isinstance(record, dict):
        labels = {label: str(value) for label, name in source.fields.items() if (value := record.get(name)) is not None}
        text, name = record.get(source.text, KeyError(source.text)), None
        if source.id:
            name = record.get(source.id)
            text = KeyError(source.id) if name is None else text
        _add(parsed, source, text, file, line, labels, None if name is None else str(name))
    else:
        reason = record if isinstance(record, str) else f"a record is a {type(record).__name__}, not an object"
        parsed.rejects.append(Reject(file, line, reason))


def _add(
    parsed: Parsed, source: Source, text: Any, file: str, line: int, labels: dict[str, str], name: str | None = None
) -> None:
    """Add a document, or say why not. ``text``: str, bytes, or the exception that stands for it."""
    reason, size = None, None
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError:
            reason = "invalid UTF-8"
    elif isinstance(text, KeyError):
        reason = f"no field {text}"
    elif isinstance(text, Exception):
        reason = f"cannot be read: {getattr(text, 'strerror', None) or text}"
    elif not isinstance(text, str):
        reason = f"the text is a {type(text).__name__}"
    if reason is None:
        if not text.strip():
            reason = "empty"
        elif len(text) > ENORMOUS_BYTES:
            reason = "enormous"
        elif (size := _utf8_bytes(text)) is None:
            reason = "invalid UTF-8"
    if reason:
        parsed.rejects.append(Reject(file, line, reason))
        return
    labels.update(source.labels)
    for label, wanted in source.where.items():
        if labels.get(label) not in wanted:
            parsed.filtered[label] = parsed.filtered.get(label, 0) + 1
            return
    if len(text) < source.min_chars or (source.max_chars is not None and len(text) > source.max_chars):
        parsed.filtered["length"] = parsed.filtered.get("length", 0) + 1
        return
    parsed.documents.append(Document(text, size or 0, tuple([labels.get(label) for label in LABELS]), name))


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


def _read_file(entry: FileEntry) -> bytes | Exception:
    try:
        with open_source(entry.path) as stream:
            return stream.read(ENORMOUS_BYTES + 1)
    except UserError as error:
        return error
    except READ_ERRORS as error:
        return error if isinstance(error, Exception) else OSError(str(error))


def _read_lines(part: Part) -> Iterator[Chunk]:
    """Whole lines, about CHUNK_BYTES at a time; a line beyond ENORMOUS_BYTES is skipped and named."""
    pending, first, position, told = bytearray(), 1, 0, 0
    skipping = False
    with open_source(part.path) as stream:
        while True:
            block = stream.read(CHUNK_BYTES)
            position = _position(stream, position + len(block))
            if skipping:
                end = block.find(b"\n")
                if end < 0 and block:
                    continue
                skipping, block_left = False, block[end + 1 :] if block else b""
                yield Chunk(part, first, b"", position - told, (first,))
                first, told = first + 1, position
                pending += block_left
            else:
                pending += block
            cut = pending.rfind(b"\n") + 1 if block else len(pending)
            if cut:
                data = bytes(pending[:cut])
                del pending[:cut]
                yield Chunk(part, first, data, position - told)
                first, told = first + data.count(b"\n"), position
            if not block:
                return
            if len(pending) > ENORMOUS_BYTES:
                pending.clear()
                skipping = True


def _position(stream: Any, fallback: int) -> int:
    """How far the file on disk was read: for gzip and xz the compressed position."""
    raw = getattr(stream, "fileobj", None) or getattr(stream, "_fp", None)
    return raw.tell() if raw is not None else fallback


def _read_txt(part: Part) -> Iterator[Chunk]:
    if part.source.txt == "line":
        yield from _read_lines(part)
    else:
        yield from _read_files(Part("files", part.source, part.path, part.size, (FileEntry(part.path, ()),)))


def _read_files(part: Part) -> Iterator[Chunk]:
    group: list[FileEntry] = []
    size = 0
    for number, entry in enumerate(part.files):
        group.append(entry)
        path = Path(entry.path)
        size += path.stat().st_size if path.exists() else 0
        if size >= CHUNK_BYTES or number == len(part.files) - 1:
            yield Chunk(part, 1, tuple(group), size)
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
                yield Chunk(part, rows, batch.to_pylist(), part.size * batch.num_rows // total)
                rows += batch.num_rows
        except pyarrow.ArrowException as error:
            raise unreadable(part.path, error) from None


def _packed(path: str) -> bool:
    return not path.lower().endswith(".parquet")


def _read_hub(part: Part) -> Iterator[Chunk]:
    stream = open_hub(part.source).shard(num_shards=part.streams, index=part.stream)
    rows: list[dict[str, Any]] = []
    first = 1
    wanted = part.source.columns
    for record in stream:
        rows.append({key: value for key, value in record.items() if key in wanted})
        if len(rows) == ROWS_PER_CHUNK:
            yield Chunk(part, first, rows, 0)
            first, rows = first + len(rows), []
    if rows:
        yield Chunk(part, first, rows, 0)
