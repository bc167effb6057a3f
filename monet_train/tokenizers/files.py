"""The files of a tokenizer: their names, where to find them, and how they are copied."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from monet_train.durable import write_atomically
from monet_train.errors import UserError
from monet_train.tokenizers.record import TokenizerRecord

SENTENCEPIECE_MODEL = "tokenizer.model"
TOKENIZER_JSON = "tokenizer.json"
# In order of preference: a tokenizer.json beside a SentencePiece model is a conversion of it.
TOKENIZER_FILES = (SENTENCEPIECE_MODEL, TOKENIZER_JSON)
TOKENIZER_CONFIG = "tokenizer_config.json"  # names the special tokens of a tokenizer.json
SPECIAL_TOKENS_MAP = "special_tokens_map.json"  # so does this one, of older tokenizers
CHAT_TEMPLATE = "chat_template.jinja"
CHAT_TEMPLATES = "additional_chat_templates"  # a folder of further templates
# What belongs to a tokenizer and is copied with it. Never the other tokenizer file: it would be found instead.
COMPANIONS = (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, "added_tokens.json", CHAT_TEMPLATE, f"{CHAT_TEMPLATES}/*.jinja")


class StoredTokenizer:
    """A tokenizer on disk: its file and its record."""

    def __init__(self, path: Path, record: TokenizerRecord) -> None:
        self.path, self.record = path, record

    def copy_to(self, folder: Path, writer: str = "") -> None:
        """Put the tokenizer and its companions into a folder, durably, so that ``find_tokenizer`` finds it there.

        Args:
            writer: distinguishes writers of the same file at the same time; see ``write_atomically``.
        """
        for name, file in self._files().items():
            (folder / name).parent.mkdir(exist_ok=True)
            write_atomically(folder / name, file.read_bytes(), writer)

    def is_in(self, folder: Path) -> bool:
        """Whether a folder has every file that ``copy_to`` puts there; their contents are not compared."""
        return all((folder / name).is_file() for name in self._files())

    def _files(self) -> dict[str, Path]:
        """Every file by its name in a copy, the tokenizer itself last: with it the copy is whole."""
        return {**companions(self.path.parent), self.record.file: self.path}


def companions(folder: Path) -> dict[str, Path]:
    """The companions of a tokenizer in its folder, by their names below it."""
    files = [file for pattern in COMPANIONS for file in sorted(folder.glob(pattern)) if file.is_file()]
    return {file.relative_to(folder).as_posix(): file for file in files}


def find_tokenizer(folder: Path) -> Path | None:
    """The tokenizer file of a folder (of shards, of a checkpoint, of an export), if it has one."""
    return next((folder / name for name in TOKENIZER_FILES if (folder / name).is_file()), None)


def remove_tokenizer(folder: Path) -> None:
    """Undo ``copy_to``."""
    for file in (*companions(folder).values(), *(folder / name for name in TOKENIZER_FILES)):
        file.unlink(missing_ok=True)
    if (folder / CHAT_TEMPLATES).is_dir():
        (folder / CHAT_TEMPLATES).rmdir()


def resolve_tokenizer(path: Path) -> Path:
    """The file that ``path`` names: a tokenizer file, the folder that holds one, or ``PACKAGE:FILE``.

    Raises:
        UserError: there is none, or it may not be read.
    """
    try:
        return _resolve(path)
    except PermissionError as error:
        raise UserError(
            f"tokenizer {path} cannot be read ({error.filename}: {error.strerror}): get the right to read it, or copy "
            "it to where you have that"
        ) from None


def _resolve(path: Path) -> Path:
    package, _, inside = str(path).partition(":")
    if inside and not path.exists():
        specification = importlib.util.find_spec(package) if package.isidentifier() else None
        if specification is None or specification.origin is None:
            raise UserError(f"tokenizer {path}: there is no installed package {package!r}: pip install it")
        path = Path(specification.origin).parent / inside
    if path.is_dir():
        found = find_tokenizer(path)
        if found is None:
            raise UserError(
                f"tokenizer {path} holds neither {' nor '.join(TOKENIZER_FILES)}: train one with `monet-data tokenizer`"
            )
        return found
    if not path.is_file():
        raise UserError(f"tokenizer {path} is not a file: train one with `monet-data tokenizer`, or correct the path")
    return path
