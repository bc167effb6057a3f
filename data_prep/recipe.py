"""What to read and how: a recipe in YAML, or its short form on the command line."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data_prep.source_refusals import is_utf8
from monet_train.errors import UserError

LABELS = ("lang", "domain", "source")  # kept for every document beside the shards; `keep` names further ones
STRING, NUMBER = "string", "number"  # what a further label may be
TAKEN = ("text", "bytes", "id")  # names of other columns, or of what would be taken for one
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
    keep: dict[str, str] = field(default_factory=dict)  # further label -> "string" or "number"
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
        kept = [self.fields.get(label, label) for label in self.keep]
        return {self.text, *self.fields.values(), *kept, *([self.id] if self.id else [])}

    @property
    def strings(self) -> tuple[str, ...]:
        """The labels whose values are strings."""
        return _strings([self])

    @property
    def numbers(self) -> tuple[str, ...]:
        """The labels whose values are numbers."""
        return _kept([self], NUMBER)

    def field_of(self, label: str) -> str | None:
        """The field of a label; None, which no record has, where there is none."""
        return self.fields.get(label, label if label in self.keep else None)

    def describe(self) -> dict[str, Any]:
        """What decides the documents. An empty ``keep`` is left out: it was not there when older shards were made."""
        values = {**dataclasses.asdict(self), "source": Path(self.source).name, "keep": dict(sorted(self.keep.items()))}
        return values if self.keep else {key: value for key, value in values.items() if key != "keep"}


@dataclass(frozen=True)
class Recipe:
    """Sources in order, and bounds on the whole."""

    sources: list[Source]
    max_documents: int | None = None
    max_bytes: int | None = None  # of UTF-8 text

    def __post_init__(self) -> None:
        if both := set(self.strings).intersection(self.numbers):
            raise UserError(
                f"the sources keep {min(both)!r} as a string and as a number: give it one kind, or two names"
            )

    @property
    def strings(self) -> tuple[str, ...]:
        """The labels whose values are strings: every shard has them all, whatever its documents have."""
        return _strings(self.sources)

    @property
    def numbers(self) -> tuple[str, ...]:
        """The labels whose values are numbers, likewise."""
        return _kept(self.sources, NUMBER)


def _strings(sources: Iterable[Source]) -> tuple[str, ...]:
    return LABELS + _kept(sources, STRING)


def _kept(sources: Iterable[Source], kind: str) -> tuple[str, ...]:
    """The further labels of a kind, by name: the order in which they were given means nothing."""
    return tuple(sorted({label for source in sources for label, of in source.keep.items() if of == kind}))


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
    keep = values.get("keep", {})
    for label, kind in keep.items():
        _check_kept(label, kind, f"{where}: keep")
    for key in ("fields", "labels", "where"):
        for label, value in values.get(key, {}).items():
            if label not in (known := (*LABELS, *keep)):
                raise UserError(f"{where}: {key}: unknown label {label!r}: choose from {', '.join(known)}")
            if key != "fields" and keep.get(label) == NUMBER:
                raise UserError(
                    f"{where}: {key}: {label} is kept as a number, and `{key}` is for strings: leave it out"
                )
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
    text = values.get("text", "text")
    for label in keep:
        if values.get("fields", {}).get(label, label) == text:
            raise UserError(
                f"{where}: keep: {label} would be the field {text!r}, which is the text: choose another field"
            )


def _check_kept(label: Any, kind: Any, where: str) -> None:
    """Refuse a further label with a name or a kind that it cannot have."""
    if label in LABELS + TAKEN:
        raise UserError(
            f"{where}: the name {label!r} is taken: give the label another one in a recipe, as in "
            f"keep: {{NAME: string}}, fields: {{NAME: {label}}}"
        )
    if not isinstance(label, str) or not is_utf8(label) or not re.fullmatch(r"[\w-]+", label):
        raise UserError(
            f"{where}: {label!r} is not a name of letters, digits, _ and -: give one in a recipe, as in "
            "keep: {NAME: string}, fields: {NAME: 'the field'}"
        )
    if kind not in (STRING, NUMBER):
        raise UserError(f"{where}: {label}: unknown kind {kind!r}: choose {STRING} or {NUMBER}")
