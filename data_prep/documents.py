"""From chunks to documents: what a source holds is read, checked, labelled and filtered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from data_prep.bad_documents import (
    ENORMOUS,
    BadDocument,
    checked_id,
    checked_label,
    checked_number,
    checked_record,
    checked_string,
    checked_text,
    parse_json,
)
from data_prep.chunks import BOM, Chunk, read_file
from data_prep.recipe import LABELS, Source
from data_prep.sources import FileEntry

T = TypeVar("T")


class Document(NamedTuple):
    """A text and its labels (None: unknown)."""

    text: str
    size: int  # bytes of UTF-8
    labels: tuple[str | None, ...]  # in the order of the source's ``strings``
    numbers: tuple[float | None, ...]  # in the order of the source's ``numbers``
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
        self._strings = source.strings
        self._own = [source.field_of(label) for label in LABELS]
        self._kept = [(label, source.field_of(label)) for label in self._strings[len(LABELS) :]]
        self._numbers = [(label, source.field_of(label)) for label in source.numbers]
        self._no_numbers = (None,) * len(self._numbers)
        self._fixed = [(self._strings.index(label), value) for label, value in source.labels.items()]
        self._where = [(self._strings.index(label), wanted) for label, wanted in source.where.items()]

    def from_file(self, entry: FileEntry) -> Document:
        """A whole file."""
        given = dict(entry.labels)
        return self._document(read_file(entry), [given.get(label) for label in self._strings], self._no_numbers)

    def from_text(self, line: bytes) -> Document:
        """A line of text."""
        return self._document(line.removesuffix(b"\r"), [None] * len(self._strings), self._no_numbers)

    def from_json(self, line: bytes) -> Document:
        """A line of jsonl."""
        return self.from_record(parse_json(line))

    def from_record(self, value: Any) -> Document:
        """A record of jsonl, parquet or a hub dataset."""
        record, source = checked_record(value), self._source
        name = checked_id(record, source.id) if source.id else None
        if source.text not in record:
            raise BadDocument(f"no field {source.text!r}")
        labels = [None if value is None else checked_label(value) for value in map(record.get, self._own)]
        labels += _checked(record, self._kept, checked_string)
        numbers = _checked(record, self._numbers, checked_number)
        return self._document(record[source.text], labels, tuple(numbers), name)

    def _document(
        self, text: Any, labels: list[str | None], numbers: tuple[float | None, ...], name: str | None = None
    ) -> Document:
        """A text (str or bytes) with its labels."""
        text, size = checked_text(text)
        for number, value in self._fixed:
            labels[number] = value
        return Document(text, size, tuple(labels), numbers, name)

    def unwanted(self, document: Document) -> str | None:
        """The filter that leaves a document out."""
        for number, wanted in self._where:
            if document.labels[number] not in wanted:
                return self._strings[number]
        length, most = len(document.text), self._source.max_chars
        return "length" if length < self._source.min_chars or (most is not None and length > most) else None


def _checked(
    record: dict[Any, Any], fields: list[tuple[str, str | None]], check: Callable[[Any, str], T]
) -> list[T | None]:
    """The checked values of kept labels, each given with its field."""
    return [None if (value := record.get(field)) is None else check(value, label) for label, field in fields]
