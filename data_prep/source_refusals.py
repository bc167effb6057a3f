"""Sources that cannot be read, in one line each: what is wrong with which, and the remedy."""

from __future__ import annotations

import lzma
import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_prep.zstd import ZstdError
from monet_train.errors import UserError

READ_ERRORS = (OSError, EOFError, lzma.LZMAError, zlib.error, ZstdError)
FORMATS = "txt, jsonl or parquet, plain or with .gz, .zst or .xz"


def unreadable(path: str, error: BaseException) -> UserError:
    """The line for a source that cannot be read to its end."""
    number = error.errno if isinstance(error, OSError) else None
    reason = os.strerror(number) if number else str(error) or type(error).__name__
    if isinstance(error, EOFError | lzma.LZMAError | zlib.error | ZstdError):
        reason = f"cut short or damaged: {reason}"
    return UserError(
        f"source {path} cannot be read ({' '.join(reason.split())}): restore the file and run the same command again, "
        "which resumes where it stopped"
    )


def dataset_unreadable(source: str, error: Exception) -> UserError:
    """The line for a Hugging Face dataset that cannot be opened."""
    reason = " ".join(str(error).split())[:300]
    return UserError(
        f"source {source}: the dataset cannot be opened ({reason}): check name, config, split, access rights and the "
        "network"
    )


def is_utf8(name: str) -> bool:
    """Whether a name can be written as UTF-8: names from a file system or a command line may have other bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def refuse_irregular(path: str) -> None:
    """Refuse anything but a file that can be read twice."""
    if not Path(path).exists():
        raise UserError(f"source {path} is a dangling link: restore what it leads to, or remove it")
    if not Path(path).is_file():
        raise UserError(f"source {path} is not a regular file: write its contents into one")


def refuse_names_beyond_utf8(names: Iterable[str]) -> None:
    """Refuse a path or a label that UTF-8 cannot hold."""
    if wrong := next((name for name in names if not is_utf8(name)), None):
        raise UserError(f"source {wrong!a}: the name is not valid UTF-8: rename it")


def refuse_missing_columns(path: str, present: list[str], wanted: Any) -> None:
    """Refuse a parquet file without the columns of text and id, named by their options."""
    for option, name in (("--text-field", wanted.text), ("--id-field", wanted.id)):
        if name and name not in present:
            raise UserError(f"source {path} has no column {name!r}: choose with {option} from {', '.join(present)}")


def warn_of_links(source: str, count: int) -> None:
    """Say that some paths lead to files that are read anyway."""
    print(
        f"warning: source {source}: {count} paths are links to files that it also matches: each file is read once",
        file=sys.stderr,
    )


def warn_of_data_files(folder: Path, patterns: Counter[str]) -> None:
    """Say that the data files in a folder of source code are left out, and how to read them."""
    print(
        f"warning: source {folder}: only its source code is read, leaving out {patterns.total()} data file"
        f"{'s' * (patterns.total() > 1)}: to read them too, add {' '.join(sorted(patterns))}",
        file=sys.stderr,
    )
