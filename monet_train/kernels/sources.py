"""What the extension is built from. ``setup.py`` runs this file, so it imports the standard library alone."""

from __future__ import annotations

import hashlib
from pathlib import Path

SUFFIXES = (".cpp", ".cu", ".h", ".cuh", ".inl")


def sources_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of all sources and headers in ``csrc/``, as hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()
