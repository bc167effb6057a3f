"""Checked data classes: types and bounds are declared with the field; one reader and one walker check values by them.

::

    @dataclass
    class OptimizerSection:
        lr: float = at_least(0, default=5e-4)

:func:`from_json` builds a data class from JSON values and checks the types. :func:`check_bounds` checks the bounds of a
data class, however it was built.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import lru_cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from monet_train.errors import UserError

SHOWN = 80  # characters of a wrong value in the error
BOUND = "bound"  # key of a field's metadata


@dataclass(frozen=True)
class Bound:
    """What a field's value must be besides its type. ``requirement`` follows ``KEY=VALUE`` in the error."""

    holds: Callable[[Any], bool]
    requirement: str


def bounded(holds: Callable[[Any], bool], requirement: str, default: Any = MISSING) -> Any:
    """A dataclass field whose value must fulfil ``holds``; None is left to the field's type."""
    return dataclasses.field(default=default, metadata={BOUND: Bound(holds, requirement)})


def at_least(least: float, default: Any = MISSING) -> Any:
    """A field for a finite number of at least ``least``."""
    return bounded(lambda value: least <= value < math.inf, f"must be a number of at least {least}", default)


def above(least: float, default: Any = MISSING, remedy: str = "") -> Any:
    """A field for a finite number above ``least``."""
    requirement = f"must be a number above {least}" + (f"; {remedy}" if remedy else "")
    return bounded(lambda value: least < value < math.inf, requirement, default)


def share(default: Any = MISSING, of: str = "", below_one: bool = False) -> Any:
    """A field for a number from 0 to 1 (``below_one``: less than 1), a share ``of`` something."""
    requirement = f"must be at least 0 and {'below' if below_one else 'at most'} 1" + (
        f": a share of {of}" if of else ""
    )
    return bounded(lambda value: 0 <= value < 1 or (value == 1 and not below_one), requirement, default)


def one_of(*choices: Any, default: Any = MISSING) -> Any:
    """A field for one of a few values."""
    return bounded(lambda value: value in choices, f"is unknown; use one of {', '.join(map(str, choices))}", default)


def not_empty(default: Any = MISSING) -> Any:
    """A field for a text that says something."""
    return bounded(lambda value: bool(str(value).strip()), "is empty; give a value", default)


def check_bounds(values: Any, prefix: str = "") -> None:
    """Hold every field of a data class, and of those inside it, to its bound.

    Args:
        prefix: of the keys in the error, as ``model.``.

    Raises:
        UserError: one line that names the key, its value and what it must be.
    """
    for field in fields(values):
        value, key = getattr(values, field.name), prefix + field.name
        if is_dataclass(value):
            check_bounds(value, f"{key}.")
        elif value is not None and (bound := field.metadata.get(BOUND)) and not _within(bound, value):
            raise UserError(f"{key}={show(value)} {bound.requirement}")


def _within(bound: Bound, value: Any) -> bool:
    try:
        return bound.holds(value)
    except TypeError:  # not of the field's type at all: the data class was made without a reader
        return False


def show(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(show, value))}]"
    return str(value)


def field_types(kind: type) -> dict[str, Any]:
    """The type of each field of a data class, in its order."""
    hints = _hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


def leaves(kind: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """The fields of a data class and of those inside it that hold values, by dotted key."""
    types = field_types(kind)
    for field in fields(kind):
        if is_dataclass(types[field.name]):
            yield from leaves(types[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field


def from_json(kind: Any, value: Any, name: str) -> Any:
    """A dataclass (or a part of one) from JSON: the inverse of ``dataclasses.asdict``, with all types checked.

    Raises:
        ValueError: a field is missing, unknown or of another type, or a number that counts something is negative.
    """
    if isinstance(kind, type) and is_dataclass(kind):
        kinds = field_types(kind)
        for key in from_json(dict[str, Any], value, name):
            if key not in kinds:
                near = difflib.get_close_matches(str(key), kinds, n=1)
                raise ValueError(
                    f"`{name}` has the unknown field {key!r}" + (f"; did you mean {near[0]}?" if near else "")
                )
        for of in fields(kind):
            if of.name not in value and of.default is MISSING and of.default_factory is MISSING:
                raise ValueError(f"`{name}` lacks the field {of.name!r}")
        return kind(**{key: from_json(kinds[key], inner, f"{name}.{key}") for key, inner in value.items()})
    if get_origin(kind) in (UnionType, Union):  # X | None
        return None if value is None else from_json(next(k for k in get_args(kind) if k is not NoneType), value, name)
    container = get_origin(kind)
    if kind is float and type(value) is int:
        value = float(value)
    if kind is not Any and type(value) is not (container or kind):
        shown = json.dumps(value, default=str)[:SHOWN]
        raise ValueError(f"`{name}` is {shown}, not {describe(container or kind)}")
    if kind is int and value < 0:
        raise ValueError(f"`{name}` is negative")
    if container is dict:
        return {key: from_json(get_args(kind)[1], inner, f"{name}.{key}") for key, inner in value.items()}
    if container is list:
        return [from_json(get_args(kind)[0], inner, f"{name}[{place}]") for place, inner in enumerate(value)]
    return value


DESCRIPTIONS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list: "a list",
    tuple: "a list",
    dict: "an object with named values",
    NoneType: "null",
}


def describe(kind: Any) -> str:
    """A type in plain words: ``int | None`` is "a whole number or null"."""
    if get_origin(kind) in (list, tuple):
        return f"a list of {describe(get_args(kind)[0]).removeprefix('a ')}s"
    if get_origin(kind) in (UnionType, Union):
        return " or ".join(map(describe, get_args(kind)))
    if is_dataclass(kind):
        return DESCRIPTIONS[dict]
    return DESCRIPTIONS.get(get_origin(kind) or kind, "a value")


@lru_cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
