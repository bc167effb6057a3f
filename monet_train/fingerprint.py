"""Every hash that is made for identity: of files, of what a corpus or a run is, of names and numbers.

Shards, manifests, checkpoints and index caches of earlier runs hold these values, so none may ever change:
``tests/test_fingerprint.py`` has one of each.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

SAMPLED_BYTES = 1 << 20  # at each end of a file that is too large to be read whole at every start
CACHE_KEY_DIGITS = 24


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's contents, as hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    """SHA-256 of a text in UTF-8; bytes of file names that are not UTF-8 count as they are."""
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a value's JSON, whose keys are sorted: the order of a dictionary does not count."""
    return sha256_text(json.dumps(value, sort_keys=True))


def sha256_samples(parts: Iterable[str | Path]) -> str:
    """SHA-256 of texts and files in turn, of each file the first and the last MiB only.

    For shards without a manifest: reading them whole would take minutes at every start.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode())
            continue
        with part.open("rb") as stream:
            digest.update(stream.read(SAMPLED_BYTES))
            stream.seek(max(0, part.stat().st_size - SAMPLED_BYTES))
            digest.update(stream.read(SAMPLED_BYTES))
    return digest.hexdigest()


def cache_name(key: str) -> str:
    """The file name under which something that ``key`` identifies is cached."""
    return sha256_text(key)[:CACHE_KEY_DIGITS]


def seed_from(name: str) -> int:
    """A seed of 64 bits that is a pure function of ``name``."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def hash_tokens(tokens: np.ndarray) -> int:
    """64 bits that identify a document by its token ids, whatever type they are stored in."""
    return int.from_bytes(hashlib.blake2b(tokens.astype("<i4").tobytes(), digest_size=8).digest(), "little")


def mix(numbers: np.ndarray) -> np.ndarray:
    """SplitMix64 of uint64 numbers, uint64: neighbouring numbers become unrelated ones."""
    z = numbers + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
