"""``manifest.json`` of an atlas: its model and data, how it was made, and what is in it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from monet_train.analysis.parts import PARTS
from monet_train.errors import UserError
from monet_train.model.identity import ModelIdentity
from monet_train.typed import from_json

MANIFEST = "manifest.json"
FORMAT = "monet-atlas/1"
REMEDY = "make the atlas again with monet-experts collect, or restore the file"


@dataclass(frozen=True)
class ModelRecord:
    """The model that was read."""

    identity: ModelIdentity
    weights_sha256: str
    vocab_size: int


@dataclass(frozen=True)
class CellRecord:
    """Tokens and documents of a label value; each a list of two, by half of the documents."""

    documents: list[int]
    tokens: list[int]
    token_squares: list[float]  # of the tokens of its documents


@dataclass(frozen=True)
class NumericRecord:
    """A numeric label, over tokens of documents where it is known."""

    tokens: int
    mean: float
    variance: float


@dataclass(frozen=True)
class AtlasManifest:
    """The whole file. It holds no time and no path, so equal work gives equal bytes."""

    model: ModelRecord
    tokenizer_sha256: str
    shards: list[str]  # fingerprints of the shard folders
    request: dict[str, Any]  # what was asked for
    groups: list[int]  # routing groups that were collected
    documents: int
    tokens: int
    labels: dict[str, dict[str, CellRecord]]  # by column and value
    numeric: dict[str, NumericRecord]
    files: dict[str, str]  # SHA-256 of every other file
    format: str = FORMAT

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, folder: Path) -> AtlasManifest:
        """Read it from an atlas.

        Raises:
            UserError: there is none, the collection is unfinished, or the file is damaged.
        """
        path = folder / MANIFEST
        if not path.is_file():
            if (folder / PARTS).is_dir():
                raise UserError(f"{folder} is unfinished: give the same monet-experts collect again to finish it")
            raise UserError(f"{folder} is not an atlas: give a folder that monet-experts collect wrote")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(values, dict) or values.get("format") != FORMAT:
                raise UserError(f"{path} is not a manifest of format {FORMAT}: {REMEDY}")
            found: AtlasManifest = from_json(cls, values, "manifest")
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}): {REMEDY}") from None
        return found
