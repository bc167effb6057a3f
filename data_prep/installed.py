"""The text that every Python installation already has: sources (with their docstrings) and licences."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from monet_train.fingerprint import sha256_text

MAX_FILE_BYTES = 200_000  # larger sources are mostly generated tables
SKIPPED = {"__pycache__", "test", "tests", "idle_test", "site-packages", "dist-packages", "node_modules"}


def installed_files() -> list[tuple[str, str, Path]]:
    """Files as (source, domain, path): the standard library and licences first, then site-packages.

    Each of the two is ordered by a hash of the path below the library's root, so that a bounded part is a
    mixture and equal installations give equal orders.
    """
    paths = sysconfig.get_paths()
    packages = sorted({Path(paths["purelib"]), Path(paths["platlib"])})
    library = _below(Path(paths["stdlib"]), "*.py", "python-stdlib", "code")
    licences = [entry for root in packages for entry in _licences(root)]
    modules = [entry for root in packages for entry in _below(root, "*.py", "python-packages", "code")]
    return [entry[1:] for group in (library + licences, modules) for entry in sorted(group)]


Entry = tuple[str, str, str, Path]  # order, source, domain, path


def _below(root: Path, pattern: str, source: str, domain: str) -> list[Entry]:
    entries = []
    for path in root.rglob(pattern):
        relative = path.relative_to(root)
        if SKIPPED.isdisjoint(relative.parts) and path.is_file() and 0 < path.stat().st_size <= MAX_FILE_BYTES:
            entries.append((_order(relative), source, domain, path))
    return entries


def _licences(root: Path) -> list[Entry]:
    return [
        entry
        for name in ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*")
        for entry in _below(root, name, "licences", "law")
        if any(part.endswith(".dist-info") for part in entry[3].parts)
    ]


def _order(relative: Path) -> str:
    return sha256_text(relative.as_posix())
