"""``monet-data verify``: is every byte of a shard folder what its manifest says?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_prep.folder_refusals import cannot_read
from data_prep.ids import find_duplicates
from data_prep.shard_writer import count_labels, count_numbers
from monet_train.data.index_file import check_index, read_index, read_index_header
from monet_train.data.labels import label_columns, read_labels
from monet_train.data.manifest import MANIFEST_NAME, Manifest, ShardRecord
from monet_train.errors import UserError
from monet_train.fingerprint import sha256_file
from monet_train.tokenizers import TokenizerRecord, load_tokenizer
from monet_train.tokenizers.files import TOKENIZER_CONFIG

SCAN_TOKENS = 1 << 24  # read at a time


def verify(folder: Path) -> tuple[Manifest, list[str]]:
    """Check a whole shard folder.

    Returns:
        The manifest, and one line for each problem that names the shard and how to rebuild just that one.

    Raises:
        UserError: there is no readable manifest.
    """
    manifest = Manifest.read(folder)
    problems = [
        *_readable(_check_tokenizer(folder, manifest.tokenizer), folder / manifest.tokenizer.file),
        *_readable(_check_folder(folder, manifest), folder),
    ]
    total = sum(record.files["bin"].bytes for record in manifest.shards)
    with tqdm(total=total, unit="B", unit_scale=True, desc="verifying", disable=None) as progress:
        for record in manifest.shards:
            found = next(_readable(_check_shard(folder, record, manifest), folder / record.name), None)
            if found:
                problems.append(
                    f"{found}; rebuild it alone: delete {folder / record.name}.* and run the same "
                    "`monet-data shards` command again"
                )
            else:
                problems += _readable(_check_labels(folder, record), folder / record.name)
            progress.update(record.files["bin"].bytes)
    if not problems and (duplicates := find_duplicates(folder, manifest.shards)):
        problems.append(f"{folder}: {duplicates}: remove one from the sources and prepare the corpus again")
    return manifest, problems


def _readable(findings: Iterator[str], path: Path) -> Iterator[str]:
    """The findings of a check. Something that cannot be read is a finding too, and ends it."""
    try:
        yield from findings
    except OSError as error:
        yield f"{cannot_read(path, error)}: restore it or its permissions"


def _check_tokenizer(folder: Path, record: TokenizerRecord) -> Iterator[str]:
    tokenizer = folder / record.file
    if not tokenizer.is_file() or sha256_file(tokenizer) != record.sha256:
        yield f"{tokenizer} is missing or not the one that made the shards: copy it here again"
    elif not _has_special_tokens(tokenizer, record):
        names = folder / TOKENIZER_CONFIG
        yield f"{names} is missing or names other special tokens than the manifest: copy it here again"


def _check_folder(folder: Path, manifest: Manifest) -> Iterator[str]:
    for name in ("documents", "tokens", "text_bytes"):
        if getattr(manifest, name) != sum(getattr(record, name) for record in manifest.shards):
            yield f"{folder / MANIFEST_NAME}: `{name}` is not the sum over its shards: prepare the corpus again"
    for before, after in zip(manifest.shards, manifest.shards[1:], strict=False):
        if after.start < before.end:
            yield f"{folder / MANIFEST_NAME}: {after.name} starts before {before.name} ends: prepare the corpus again"
    known = {MANIFEST_NAME, manifest.tokenizer.file}
    known |= {f"{record.name}.{suffix}" for record in manifest.shards for suffix in record.files}
    for path in sorted(folder.iterdir()):
        if path.name not in known and path.suffix in (".bin", ".idx", ".tmp"):
            yield f"{path} is not in the manifest: remove it"


def _has_special_tokens(tokenizer: Path, record: TokenizerRecord) -> bool:
    """Whether the tokenizer has the manifest's special tokens: a file beside a ``tokenizer.json`` may name them."""
    try:
        return load_tokenizer(tokenizer).record == record
    except UserError:
        return False


def _check_shard(folder: Path, record: ShardRecord, manifest: Manifest) -> Iterator[str]:
    """What is wrong with a shard. Only the first finding matters."""
    prefix = folder / record.name
    for suffix, expected in record.files.items():
        path = Path(f"{prefix}.{suffix}")
        if not path.is_file():
            yield f"{path} is missing"
        elif path.stat().st_size != expected.bytes:
            yield f"{path} has {path.stat().st_size} bytes instead of {expected.bytes}"
        elif sha256_file(path) != expected.sha256:
            yield f"{path} has another checksum than the manifest"
    try:
        header = read_index_header(prefix)
        check_index(prefix)
    except UserError as error:
        yield str(error)
        return
    if np.dtype(header.dtype).name != manifest.dtype or header.sequences != record.documents:
        yield f"{prefix}.idx is not the index that the manifest describes"
    yield from _check_tokens(prefix, header.dtype, record, manifest)


def _check_tokens(prefix: Path, dtype: Any, record: ShardRecord, manifest: Manifest) -> Iterator[str]:
    lengths, _, borders = read_index(prefix)
    ends = np.cumsum(lengths, dtype=np.int64)
    if len(ends) == 0 or lengths.min() < 1 or ends[-1] != record.tokens:
        yield f"{prefix}.idx has lengths that do not fit the tokens"
        return
    if (np.diff(borders) != 1).any():
        yield f"{prefix}.idx has documents of several sequences"
        return
    tokens = np.memmap(f"{prefix}.bin", dtype=dtype, mode="r")
    for begin in range(0, len(tokens), SCAN_TOKENS):
        block = tokens[begin : begin + SCAN_TOKENS]
        if block.min() < 0 or block.max() >= manifest.tokenizer.vocabulary_size:
            yield f"{prefix}.bin has tokens outside the vocabulary of {manifest.tokenizer.vocabulary_size}"
            return
    if (tokens[ends - 1] != manifest.tokenizer.eos_id).any():
        yield f"{prefix}.bin has documents that do not end with the end-of-text token {manifest.tokenizer.eos_id}"


def _check_labels(folder: Path, record: ShardRecord) -> Iterator[str]:
    """Compare what the manifest counts in a sound shard's labels."""
    strings, numbers = label_columns(folder / record.name)
    table = read_labels(folder / record.name, columns=[*strings, *numbers, "bytes"])
    lengths, sizes = read_index(folder / record.name).lengths, table["bytes"].to_numpy()
    labels = {}
    for name in strings:
        column = table[name].chunk(0)
        codes = column.indices.fill_null(-1).to_numpy()
        labels[name] = count_labels(column.dictionary.to_pylist(), codes, lengths, sizes)
    found = {
        "labels": labels,
        "numbers": {name: count_numbers(table[name].to_numpy(), lengths) for name in numbers},
        "text_bytes": sizes.sum(),
    }
    for name, value in found.items():
        if getattr(record, name) != value:
            yield (
                f"{folder / MANIFEST_NAME}: `{name}` of {record.name} is not what its labels.parquet says: "
                "restore the manifest, or prepare the corpus again"
            )
