"""What to read and how: a recipe in YAML, or its short form on the command line."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data_prep.source_refusals import is_utf8
from monet_train.errors import UserError

LABELS = ("lang", "domain", "source")  # kept for every document beside the shards
ENORMOUS_BYTES = 64 << 20  # a document beyond this is a mistake in the corpus, not a text


@dataclass(frozen=True)
class Source:
    """One source and how its documents are read.

    ``source`` is a file, a glob, a folder of source code, ``hf:NAME`` or ``python``.
    """

    source: str
    text: str = "text"  # the field that holds the text (jsonl, parquet, hf)
    id: str | None = None  # the field that names a document (jsonl, parquet, hf): an id that occurs twice is refused
    fields: dict[str, str] = field(default_factory=lambda: {name: name for name in LABELS})  # label -> field
    labels: dict[str, str] = field(default_factory=dict)  # label -> value for every document
    where: dict[str, list[str]] = field(default_factory=dict)  # label -> the values to keep
    min_chars: int = 0  # shorter documents are left out
    max_chars: int | None = None  # longer ones too
    txt: str = "file"  # a .txt file is one document ("file"), or every line is ("line")
    config: str | None = None  # hf: the configuration's name
    data_dir: str | None = None  # hf: a folder of the dataset
    split: str = "train"  # hf
    revision: str | None = None  # hf

    @property
    def columns(self) -> set[str]:
        """The fields of a record that are read."""
        return {self.text, *self.fields.values(), *([self.id] if self.id else [])}


@dataclass(frozen=True)
class Recipe:
    """Sources in order, and bounds on the whole."""

    sources: list[Source]
    max_documents: int | None = None
    max_bytes: int | None = None  # of UTF-8 text


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        UserError: it cannot be read, or has an unknown key or a bad type.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"recipe {path} is not a regular file: write it into one")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"recipe {path} cannot be read: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("sources"), list) or not values["sources"]:
        raise UserError(f"recipe {path} needs a list `sources:`; see conf/data_prep for examples")
    sources = [_build(Source, entry, f"recipe {path}: sources") for entry in values["sources"]]
    return _build(Recipe, {**values, "sources": sources}, f"recipe {path}")


def recipe_from(arguments: list[str], options: dict[str, Any], bounds: dict[str, Any]) -> Recipe:
    """A recipe from SOURCE arguments; a ``.yaml`` argument means the sources of that recipe.

    ``options`` (fields of :class:`Source`) replace those of every source, ``bounds`` those of the recipe.

    Raises:
        UserError: a recipe is bad, or is one of several arguments and has its own bound: bounds hold for the whole.
    """
    sources: list[Source] = []
    limits: dict[str, Any] = {}
    for argument in arguments:
        if argument.endswith((".yaml", ".yml")):
            recipe = load_recipe(Path(argument))
            sources += recipe.sources
            own = {"max_documents": recipe.max_documents, "max_bytes": recipe.max_bytes}
            for key, value in own.items():
                if value is not None and bounds.get(key) is None and len(arguments) > 1:
                    raise UserError(
                        f"recipe {argument}: {key}: {value} would bound the other sources too: give one bound for all "
                        f"with --{key.replace('_', '-')}, or prepare the recipe alone"
                    )
                limits[key] = value
        elif argument.startswith("hf:"):
            name, *rest = argument.removeprefix("hf:").split(":")
            if len(rest) > 2:
                raise UserError(f"source {argument}: write hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT")
            config, split = [*rest, "", ""][:2]
            sources.append(Source(f"hf:{name}", config=config or None, split=split or "train"))
        else:
            sources.append(Source(argument))
    sources = [_build(Source, {**_shallow(source), **options}, "command line") for source in sources]
    return Recipe(sources, **{**limits, **{key: value for key, value in bounds.items() if value is not None}})


def _shallow(source: Source) -> dict[str, Any]:
    return {f.name: getattr(source, f.name) for f in dataclasses.fields(source)}


def _build(kind: Any, values: Any, where: str) -> Any:
    """``kind(**values)`` with unknown keys and bad types refused, naming the key."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected keys and values, found {values!r}")
    known = {f.name: f for f in dataclasses.fields(kind)}
    for key, value in values.items():
        if key not in known:
            nearest = difflib.get_close_matches(str(key), known, n=1) or [", ".join(known)]
            raise UserError(f"{where}: unknown key {key!r}: did you mean {nearest[0]}?")
        _check(f"{where}: {key}", value, str(known[key].type))
    if kind is Source:
        _check_source(values, where)
    return kind(**values)


def _check(where: str, value: Any, type_name: str) -> None:
    allowed: dict[str, tuple[type, ...]] = {"int": (int,), "str": (str,), "dict": (dict,), "list": (list,)}
    types: tuple[type, ...] = ()
    for part in type_name.split(" | "):
        types += allowed.get(part.split("[")[0], (type(None),))
    if not isinstance(value, types) or isinstance(value, bool):
        raise UserError(f"{where}: {value!r} is not of type {type_name}")


def _check_source(values: dict[str, Any], where: str) -> None:
    if "source" not in values:
        raise UserError(f"{where}: a source lacks the key `source` (a path, a glob, a folder, hf:NAME or python)")
    if values.get("txt", "file") not in ("file", "line"):
        raise UserError(f"{where}: txt={values['txt']!r}: choose file or line")
    for key in ("fields", "labels", "where"):
        for label, value in values.get(key, {}).items():
            if label not in LABELS:
                raise UserError(f"{where}: {key}: unknown label {label!r}: choose from {', '.join(LABELS)}")
            if key == "where" and not isinstance(value, list):
                raise UserError(f"{where}: {key}: {label}: {value!r} is not a list: write {label}: [A, B]")
            for item in value if key == "where" else [value]:
                if not isinstance(item, str):
                    raise UserError(
                        f"{where}: {key}: {label}: YAML reads this value as {item!r}, which is not a string: "
                        "put it in quotes, as in 'no' or '3'"
                    )
                if not is_utf8(item):
                    raise UserError(f"{where}: {key}: {label}: {item!r} is not valid UTF-8: write it otherwise")
