"""Reading local and remote files, compressed or not."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path
from typing import Any

from data_prep.source_refusals import unreadable
from data_prep.zstd import ZstdReader

COMPRESSIONS = (".gz", ".zst", ".xz")


def is_remote(path: str) -> bool:
    """Whether ``path`` is an fsspec address (s3://, gs://, memory://, ...) and not a local file."""
    return "://" in path


def open_source(path: str) -> Any:
    """Open a local file or an fsspec address for reading bytes, decompressed by its suffix.

    Raises:
        UserError: it cannot be opened.
    """
    return decompress(open_raw(path), path)


def open_raw(path: str) -> Any:
    """Open a local file or an fsspec address for reading bytes, as they are stored.

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


def suffix_of(path: str) -> str:
    """The suffix that names the format: ``corpus.jsonl.zst`` -> ``.jsonl``."""
    name = path
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return Path(name).suffix.lower()
