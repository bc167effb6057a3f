"""What makes a document a bad one: it is left out, counted, and listed with file, line and reason."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from numbers import Real
from typing import Any

import orjson

from data_prep.recipe import ENORMOUS_BYTES

INVALID_UTF8, ENORMOUS = "invalid UTF-8", "enormous"


class BadDocument(Exception):
    """The reason, in a few words."""


def parse_json(line: bytes) -> Any:
    """The value of a line of jsonl."""
    try:
        return orjson.loads(line)
    except ValueError:
        try:
            return json.loads(line.decode())  # more lenient (NaN, lone surrogates), and says what is wrong
        except UnicodeDecodeError:
            raise BadDocument(INVALID_UTF8) from None
        except (ValueError, RecursionError):
            raise BadDocument("not JSON") from None


def checked_record(value: Any) -> dict[Any, Any]:
    """The record of fields, if it is one; else BadDocument."""
    if not isinstance(value, dict):
        raise BadDocument(f"a record is a {type(value).__name__}, not an object")
    return value


def checked_id(record: dict[Any, Any], field: str) -> str:
    """The id of a document as text, or BadDocument."""
    value = record.get(field)
    if value is None:
        raise BadDocument(f"no field {field!r}")
    if isinstance(value, bool) or not isinstance(value, str | int):
        kind = type(value).__name__  # orjson reads a whole number beyond 64 bits as a float
        raise BadDocument(f"the id is a {kind}, not a string or a whole number below 2^64")
    text = str(value)
    utf8_bytes(text)
    return text


def checked_label(value: Any) -> str:
    """A label as text, or BadDocument."""
    text = str(value)
    if not text.isascii():
        utf8_bytes(text)
    return text


def checked_string(value: Any, label: str) -> str:
    """The value of a kept string as text, or BadDocument. Whole numbers and booleans are written as in JSON."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int):
        return checked_label(value)
    remedy = ": keep it as a number" * isinstance(value, float)
    raise BadDocument(f"{label} is a {type(value).__name__}, not a string{remedy}")


def checked_number(value: Any, label: str) -> float:
    """The value of a kept number, or BadDocument. Booleans are 0 and 1."""
    if not isinstance(value, Real | Decimal):
        raise BadDocument(f"{label} is a {type(value).__name__}, not a number")
    try:
        number = float(value)
    except (OverflowError, ValueError):  # an integer beyond every float, a signalling NaN of Decimal
        number = math.nan
    if not math.isfinite(number):
        raise BadDocument(f"{label} is not a finite number")
    return number


def checked_text(text: Any) -> tuple[str, int]:
    """A text (str or bytes) and its size in bytes of UTF-8, or BadDocument."""
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError:
            raise BadDocument(INVALID_UTF8) from None
    if not isinstance(text, str):
        raise BadDocument(f"the text is a {type(text).__name__}")
    if not text or text.isspace():
        raise BadDocument("empty")
    size = utf8_bytes(text)
    if size > ENORMOUS_BYTES:
        raise BadDocument(ENORMOUS)
    return text, size


def utf8_bytes(text: str) -> int:
    """Size of a text; BadDocument if it has a lone surrogate, from an escape in JSON."""
    if text.isascii():
        return len(text)
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise BadDocument(INVALID_UTF8) from None
