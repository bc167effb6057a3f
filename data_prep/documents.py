"""From chunks to documents: what a source holds is read, checked, labelled and filtered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from data_prep.bad_documents import (
    ENORMOUS,
    BadDocument,
    checked_id,
    checked_label,
    checked_record,
    checked_text,
    parse_json,
)
from data_prep.chunks import BOM, Chunk, read_file
from data_prep.recipe import LABELS, Source
from data_prep.sources import FileEntry


class Document(NamedTuple):
    """A text and its labels (in the order of LABELS; None: unknown)."""

    text: str
    size: int  # bytes of UTF-8
    labels: tuple[str | None, ...]
    id: str | None


class Reject(NamedTuple):
    """A bad document: the file, its line or row there (from 1; 0 for a whole file), and why."""

    file: str
    line: int
    reason: str


class Parsed(NamedTuple):
    """What a chunk holds."""

    documents: list[Document]
    rejects: list[Reject]
    filtered: dict[str, int]  # documents left out, by the filter


def parse(chunk: Chunk) -> Parsed:
    """The documents of a chunk that the source's filters keep, and what is wrong with the others."""
    source, path = chunk.part.source, chunk.part.path
    reader = _DocumentReader(source)
    parsed = Parsed([], [Reject(path, line, ENORMOUS) for line in chunk.oversized], {})
    for file, line, read, raw in _raw_documents(chunk, reader):
        try:
            document = read(raw)
        except BadDocument as bad:
            parsed.rejects.append(Reject(file, line, str(bad)))
            continue
        if unwanted := reader.unwanted(document):
            parsed.filtered[unwanted] = parsed.filtered.get(unwanted, 0) + 1
        else:
            parsed.documents.append(document)
    return parsed


def _raw_documents(chunk: Chunk, reader: _DocumentReader) -> Iterator[tuple[str, int, Callable[[Any], Document], Any]]:
    """File, line, and how to read what is there."""
    path = chunk.part.path
    if chunk.part.kind == "files":
        for entry in chunk.payload:
            yield entry.path, 0, reader.from_file, entry
    elif isinstance(chunk.payload, bytes):
        read = reader.from_text if chunk.part.kind == "txt" else reader.from_json
        payload = chunk.payload.removeprefix(BOM) if chunk.first == 1 else chunk.payload
        for number, line in enumerate(payload.split(b"\n"), chunk.first):
            if line and not line.isspace():
                yield path, number, read, line
    else:
        for number, record in enumerate(chunk.payload, chunk.first):
            yield path, number, reader.from_record, record


class _DocumentReader:
    """Makes documents from what a source holds, or raises BadDocument."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._fields = [source.fields.get(label) for label in LABELS]  # no record has a key None
        self._fixed = [(number, source.labels[label]) for number, label in enumerate(LABELS) if label in source.labels]
        self._where = [(LABELS.index(label), wanted) for label, wanted in source.where.items()]

    def from_file(self, entry: FileEntry) -> Document:
        """A whole file."""
        given = dict(entry.labels)
        return self._document(read_file(entry), [given.get(label) for label in LABELS])

    def from_text(self, line: bytes) -> Document:
        """A line of text."""
        return self._document(line.removesuffix(b"\r"), [None] * len(LABELS))

    def from_json(self, line: bytes) -> Document:
        """A line of jsonl."""
        return self.from_record(parse_json(line))

    def from_record(self, value: Any) -> Document:
        """A record of jsonl, parquet or a hub dataset."""
        record, source = checked_record(value), self._source
        name = checked_id(record, source.id) if source.id else None
        if source.text not in record:
            raise BadDocument(f"no field {source.text!r}")
        labels = [None if value is None else checked_label(value) for value in map(record.get, self._fields)]
        return self._document(record[source.text], labels, name)

    def _document(self, text: Any, labels: list[str | None], name: str | None = None) -> Document:
        """A text (str or bytes) with its labels in the order of LABELS."""
        text, size = checked_text(text)
        for number, value in self._fixed:
            labels[number] = value
        return Document(text, size, tuple(labels), name)

    def unwanted(self, document: Document) -> str | None:
        """The filter that leaves a document out."""
        for number, wanted in self._where:
            if document.labels[number] not in wanted:
                return LABELS[number]
        length, most = len(document.text), self._source.max_chars
        return "length" if length < self._source.min_chars or (most is not None and length > most) else None
