"""Reading (compressed) files, and what to say where they cannot be read."""

from __future__ import annotations

import gzip
import lzma
import os
import zlib
from pathlib import Path
from typing import Any

from data_prep.zstd import ZstdError, ZstdReader
from monet_train.errors import UserError

COMPRESSIONS = (".gz", ".zst", ".xz")
READ_ERRORS = (OSError, EOFError, lzma.LZMAError, zlib.error, ZstdError)


def is_remote(path: str) -> bool:
    """Whether ``path`` is an fsspec address (s3://, gs://, memory://, ...) and no local file."""
    return "://" in path


def open_source(path: str) -> Any:
    """Open a local file or an fsspec address for reading bytes, decompressed by its suffix.

    Raises:
        UserError: it cannot be opened.
    """
    return decompress(open_raw(path), path)


def open_raw(path: str) -> Any:
    """Open a local file or an fsspec address for reading bytes, as they lie there.

    Raises:
        UserError: it cannot be opened.
    """
    try:
        if is_remote(path):
            import fsspec

            return fsspec.open(path, "rb").open()
        return Path(path).open("rb")
    except (OSError, ImportError, ValueError) as error:
        raise unreadable(path, error) from None


def decompress(raw: Any, path: str) -> Any:
    """A stream of the bytes that ``raw`` holds, decompressed by the suffix of ``path``."""
    if path.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if path.endswith(".xz"):
        return lzma.LZMAFile(raw)
    if path.endswith(".zst"):
        return ZstdReader(raw, path)
    return raw


def unreadable(path: str, error: BaseException) -> UserError:
    """The one line for a source that cannot be (wholly) read."""
    number = error.errno if isinstance(error, OSError) else None
    reason = os.strerror(number) if number else str(error) or type(error).__name__
    if isinstance(error, EOFError | lzma.LZMAError | zlib.error | ZstdError):
        reason = f"cut short or damaged: {reason}"
    return UserError(
        f"source {path} cannot be read ({' '.join(reason.split())}): restore the file and run the same command again, "
        "which resumes where it stopped"
    )


def suffix_of(path: str) -> str:
    """The suffix that tells the format: ``corpus.jsonl.zst`` -> ``.jsonl``."""
    name = path
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return Path(name).suffix.lower()


def is_utf8(name: str) -> bool:
    """Whether a name can be written as UTF-8: one of a file system or a command line may have other bytes in it."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def cannot_read(path: Path, error: Exception) -> str:
    """Half a line for a file of an output folder that is there and cannot be read."""
    name, reason = (error.filename, error.strerror) if isinstance(error, OSError) else (None, None)
    return f"{name or path} cannot be read ({reason or ' '.join(str(error).split()) or type(error).__name__})"
