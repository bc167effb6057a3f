"""Checked data classes: JSON values into typed fields, with an error that names the field."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

SHOWN = 80  # characters of a wrong value in the error


def from_json(kind: Any, value: Any, name: str) -> Any:
    """A dataclass (or a part of one) from its JSON form: the inverse of ``dataclasses.asdict``, with all types checked.

    Raises:
        ValueError: a field is missing, unknown or of another type, or a number is negative.
    """
    if isinstance(kind, type) and is_dataclass(kind):
        kinds = _field_types(kind)
        for key in from_json(dict[str, Any], value, name):
            if key not in kinds:
                raise ValueError(f"`{name}` has the unknown field {key!r}")
        for of in fields(kind):
            if of.name not in value and of.default is MISSING and of.default_factory is MISSING:
                raise ValueError(f"`{name}` lacks the field {of.name!r}")
        return kind(**{key: from_json(kinds[key], inner, f"{name}.{key}") for key, inner in value.items()})
    if isinstance(kind, UnionType):  # X | None
        return None if value is None else from_json(next(k for k in get_args(kind) if k is not NoneType), value, name)
    container = get_origin(kind)
    if kind is not Any and type(value) is not (container or kind):
        raise ValueError(f"`{name}` is {json.dumps(value)[:SHOWN]} and no {(container or kind).__name__}")
    if kind is int and value < 0:
        raise ValueError(f"`{name}` is negative")
    if container is dict:
        return {key: from_json(get_args(kind)[1], inner, f"{name}.{key}") for key, inner in value.items()}
    if container is list:
        return [from_json(get_args(kind)[0], inner, f"{name}[{place}]") for place, inner in enumerate(value)]
    return value


@lru_cache
def _field_types(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
