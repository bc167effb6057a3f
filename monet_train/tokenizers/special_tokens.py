"""The files beside a ``tokenizer.json`` that say which of its tokens ends a text, begins one, and so on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from monet_train.errors import UserError
from monet_train.tokenizers.files import SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG

ROLES = ("eos_token", "bos_token", "unk_token", "pad_token")
RESTORE = "restore the file that came with the tokenizer"


class NamedToken(NamedTuple):
    """A special token and the file that names it."""

    text: str
    source: Path


def named_tokens(folder: Path, roles: tuple[str, ...] = ROLES) -> dict[str, NamedToken]:
    """Special tokens by role from ``tokenizer_config.json`` and, for roles that it leaves open, the older map.

    Raises:
        UserError: a file cannot be read, or names what is not a token.
    """
    named: dict[str, NamedToken] = {}
    for path in (folder / TOKENIZER_CONFIG, folder / SPECIAL_TOKENS_MAP):
        values = read_companion(path)
        for role in roles:
            if text := _token_text(path, role, values.get(role) or ""):
                named.setdefault(role, NamedToken(text, path))
    return named


def read_companion(path: Path) -> dict[str, Any]:
    """The JSON object in a companion of a tokenizer; empty if there is no such file.

    Raises:
        UserError: it cannot be read.
    """
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}: {RESTORE}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object: {RESTORE}")
    return values


def _token_text(path: Path, role: str, token: Any) -> str:
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise UserError(
            f'{path}: {role}: {json.dumps(token)} does not name a token: write the token, as in "</s>", or '
            '{"content": "</s>"}'
        )
    return text
