"""Finding and checking ``.bin``/``.idx`` pairs, cheaply and before any training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from monet_train.data.index_file import REBUILD, IndexHeader, read_index_header
from monet_train.data.manifest import MANIFEST_NAME, Manifest
from monet_train.errors import UserError
from monet_train.fingerprint import sha256_file, sha256_samples
from monet_train.tokenizers import StoredTokenizer

SCAN_BYTES = 32 << 20  # how much of a shard without manifest is searched for tokens that are too large


@dataclass(frozen=True)
class Shard:
    """One ``.bin``/``.idx`` pair, found and measured."""

    prefix: Path
    header: IndexHeader

    @property
    def bin(self) -> Path:
        """The tokens."""
        return Path(f"{self.prefix}.bin")

    @property
    def idx(self) -> Path:
        """The index."""
        return Path(f"{self.prefix}.idx")


@dataclass(frozen=True)
class ShardSet:
    """The shards of one path, in order. ``manifest`` is None for shards of Megatron's own tools."""

    path: Path
    shards: tuple[Shard, ...]
    manifest: Manifest | None
    fingerprint: str

    @property
    def tokenizer(self) -> StoredTokenizer | None:
        """The tokenizer beside the shards; None where no manifest names it."""
        if self.manifest is None:
            return None
        return StoredTokenizer(self.path / self.manifest.tokenizer.file, self.manifest.tokenizer)


def find_shards(path: Path) -> ShardSet:
    """Resolve a ``data.path`` entry: a shard folder, or the common prefix of one ``.bin``/``.idx`` pair.

    Raises:
        UserError: nothing there, the preparation is unfinished, or a shard is missing or truncated.
    """
    if not path.is_dir():
        prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
        if not Path(f"{prefix}.idx").exists() and not Path(f"{prefix}.bin").exists():
            raise UserError(f"data.path: no shards at {path}: make them with `monet-data shards ... --out {path}`")
        return _without_manifest(prefix, [prefix])
    if (path / MANIFEST_NAME).exists():
        manifest = Manifest.read(path)
        shards = []
        for record in manifest.shards:
            shard = Shard(path / record.name, read_index_header(path / record.name))
            for suffix, size in (("bin", shard.header.bin_bytes), ("idx", shard.idx.stat().st_size)):
                if record.files[suffix].bytes != size:
                    raise UserError(
                        f"{shard.prefix}.{suffix} has {size} bytes, {MANIFEST_NAME} says "
                        f"{record.files[suffix].bytes}: delete {shard.prefix}.* and {REBUILD}"
                    )
            shards.append(shard)
        return ShardSet(path, tuple(shards), manifest, manifest.fingerprint)
    if any(path.glob("progress*.jsonl")):
        raise UserError(
            f"data.path: {path} is unfinished: run the same `monet-data shards` command again (after the last of "
            f"several tasks `monet-data merge {path}`)"
        )
    prefixes = sorted(file.with_suffix("") for file in path.glob("*.idx"))
    if not prefixes:
        raise UserError(f"data.path: no shards in {path}: make them with `monet-data shards ... --out {path}`")
    return _without_manifest(path, prefixes)


def _without_manifest(path: Path, prefixes: Sequence[Path]) -> ShardSet:
    shards = tuple(Shard(prefix, read_index_header(prefix)) for prefix in prefixes)
    identity: list[str | Path] = []
    for shard in shards:
        identity += [
            f"{shard.header.bin_bytes} {shard.header.sequences} {shard.header.documents}",
            shard.idx,
            shard.bin,
        ]
    return ShardSet(path, shards, None, sha256_samples(identity))


def data_paths(path: Any) -> list[Path]:
    """``data.path`` as a list of paths.

    Raises:
        UserError: it is empty or neither a path nor a list of paths.
    """
    entries = [path] if isinstance(path, str | Path) else path
    try:
        paths = [Path(entry) for entry in entries]
    except TypeError:
        raise UserError(f"data.path={path!r}: give a shard folder, a shard prefix or a list of them") from None
    if not paths or str(path) == "???":
        raise UserError("data.path is not set: give a folder made by `monet-data shards`, data.path=FOLDER")
    for entry in entries:
        if "://" in str(entry):
            raise UserError(
                f"data.path: {entry} is an address, but shards are memory-mapped: copy them to a file system"
            )
    return paths


def check_tokenizer(shard_set: ShardSet) -> None:
    """Refuse a shard folder without the tokenizer that made it: every checkpoint gets a copy of it.

    Raises:
        UserError: the file is missing, or is not the one that the manifest names.
    """
    if shard_set.manifest is None:
        return
    file = shard_set.path / shard_set.manifest.tokenizer.file
    remedy = f"put the tokenizer that made the shards there ({MANIFEST_NAME} has its SHA-256)"
    if not file.is_file():
        raise UserError(f"{file} is missing: {remedy}")
    if sha256_file(file) != shard_set.manifest.tokenizer.sha256:
        raise UserError(f"{file} is not the tokenizer that made the shards: {remedy}")


def check_vocabulary(shard_set: ShardSet, vocab_size: int) -> None:
    """Refuse shards whose tokens do not fit a model of ``vocab_size``.

    With a manifest the tokenizer's vocabulary is compared; without one the head of each shard is searched
    (the rest is checked as it is read).

    Raises:
        UserError: a token is, or may be, outside the model's vocabulary.
    """
    if shard_set.manifest:
        size = shard_set.manifest.tokenizer.vocabulary_size
        if size > vocab_size:
            raise UserError(
                f"{shard_set.path}: its tokenizer has {size} pieces, the model's vocabulary only {vocab_size}: "
                f"set model.vocab_size={size}, or use shards made with the model's tokenizer"
            )
        return
    for shard in shard_set.shards:
        count = min(shard.header.bin_bytes, SCAN_BYTES) // np.dtype(shard.header.dtype).itemsize
        tokens = np.fromfile(shard.bin, dtype=shard.header.dtype, count=count)
        if count and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
            raise UserError(
                f"{shard.bin} has tokens from {tokens.min()} to {tokens.max()}, the model's vocabulary is "
                f"{vocab_size}: set model.vocab_size to the tokenizer's, or use shards made with the model's tokenizer"
            )
