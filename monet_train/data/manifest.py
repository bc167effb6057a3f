"""``manifest.json``: what a shard folder says about itself. Written by ``monet-data``, read by the trainer."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from monet_train.errors import UserError
from monet_train.fingerprint import sha256_json
from monet_train.tokenizers.record import TokenizerRecord
from monet_train.typed import from_json

MANIFEST_NAME = "manifest.json"
FORMAT = "monet-shards/1"


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and checksum of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, order=True)
class Position:
    """A place in the stream of source documents: where a shard starts or ends."""

    part: int  # number of the source part (file or stream)
    chunk: int  # number of the chunk in the part
    document: int  # number of the kept document in the chunk


@dataclass(frozen=True)
class NumberCounts:
    """A label that is a number: what has a value, and between which numbers the values are (None where none has)."""

    documents: int
    tokens: int
    min: float | None
    max: float | None

    def __post_init__(self) -> None:
        if (self.min is None) != (self.max is None) or (self.min is None) != (self.documents == 0):
            raise ValueError("the counts of a number are not documents, tokens and the range of its values")

    def __add__(self, other: NumberCounts) -> NumberCounts:
        ends = [end for end in (self.min, self.max, other.min, other.max) if end is not None]
        documents, tokens = self.documents + other.documents, self.tokens + other.tokens
        return NumberCounts(documents, tokens, min(ends, default=None), max(ends, default=None))


@dataclass(frozen=True)
class ShardRecord:
    """One ``.bin``/``.idx`` pair (with its labels) and what is in it."""

    name: str
    documents: int
    tokens: int
    text_bytes: int
    start: Position
    end: Position
    files: dict[str, FileRecord]  # by suffix: bin, idx, labels.parquet
    labels: dict[str, dict[str, list[int]]]  # column -> value -> [documents, tokens, bytes of text]
    numbers: dict[str, NumberCounts] = field(default_factory=dict)  # by column

    def __post_init__(self) -> None:
        if missing := {"bin", "idx", "labels.parquet"} - set(self.files):
            raise ValueError(f"{self.name} lacks {', '.join(sorted(missing))}")
        for column, values in self.labels.items():
            if any(len(counts) != 3 or not all(counts[:2]) for counts in values.values()):
                raise ValueError(f"{self.name}: the counts of `{column}` are not documents, tokens and bytes")

    def to_json(self) -> dict[str, Any]:
        """The values for a file. Without numbers they are those of older shards, to the byte."""
        values = asdict(self)
        return values if self.numbers else {key: value for key, value in values.items() if key != "numbers"}


@dataclass(frozen=True)
class Manifest:
    """The whole folder. It has neither a time nor a path of the machine, so equal work gives equal bytes."""

    tokenizer: TokenizerRecord
    dtype: str
    documents: int
    tokens: int
    text_bytes: int
    filtered: dict[str, int]  # documents left out on purpose, by reason
    rejected: dict[str, int]  # bad documents, by reason; listed in rejects.jsonl
    recipe: dict[str, Any]  # what was asked for
    shards: list[ShardRecord] = field(default_factory=list)
    format: str = FORMAT

    @property
    def fingerprint(self) -> str:
        """Identity of tokens and their order: equal for equal shard contents, whatever the folder is called."""
        identity = [self.tokenizer.sha256, self.dtype]
        for shard in self.shards:
            identity += [shard.files["bin"].sha256, shard.files["idx"].sha256]
        return sha256_json(identity)

    @property
    def label_counts(self) -> dict[str, dict[str, list[int]]]:
        """Documents, tokens and bytes of text over all shards, by string label and value."""
        columns: dict[str, dict[str, list[int]]] = {}
        for record in self.shards:
            for column, values in record.labels.items():
                for value, counts in values.items():
                    row = columns.setdefault(column, {}).setdefault(value, [0, 0, 0])
                    row[:] = [a + b for a, b in zip(row, counts, strict=True)]
        return columns

    @property
    def number_counts(self) -> dict[str, NumberCounts]:
        """What has a value, and the range of the values over all shards, by label that is a number."""
        columns: dict[str, NumberCounts] = {}
        for record in self.shards:
            for column, counts in record.numbers.items():
                columns[column] = columns.get(column, NumberCounts(0, 0, None, None)) + counts
        return columns

    def to_json(self) -> str:
        """The file's text."""
        values = {**asdict(self), "shards": [shard.to_json() for shard in self.shards]}
        return json.dumps({**values, "fingerprint": self.fingerprint}, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read ``folder/manifest.json``.

        Raises:
            UserError: the file is absent, not JSON, of another format, or a field is missing or wrong.
        """
        path = folder / MANIFEST_NAME
        remedy = "make the shards again with `monet-data shards`, or restore the file"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path} is missing: {remedy}") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}): {remedy}") from None
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise UserError(f"{path} is not a manifest of format {FORMAT}: {remedy}")
        stored = values.pop("fingerprint", None)
        try:
            manifest: Manifest = from_json(cls, values, "manifest")
            check_recipe(manifest.recipe)
            if not (manifest.shards and manifest.documents and manifest.tokens):
                raise ValueError("`shards`, `documents` or `tokens` is empty or 0")
        except ValueError as error:
            raise UserError(f"{path}: {error}: {remedy}") from None
        if stored != manifest.fingerprint:
            raise UserError(f"{path} was changed by hand: its fingerprint does not fit its shards: {remedy}")
        return manifest


def check_recipe(recipe: dict[str, Any]) -> None:
    """Check the parts of a recipe that are used for more than comparing.

    Raises:
        ValueError: it is missing or of another type.
    """
    for name, kind in (("tasks", int), ("files", list[list[Any]])):
        from_json(kind, recipe.get(name), f"recipe.{name}")
    if not all(identity and isinstance(identity[0], str) for identity in recipe["files"]):
        raise ValueError("`recipe.files` has an entry that does not begin with a name")
