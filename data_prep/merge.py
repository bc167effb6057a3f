"""``monet-data merge``: from the journals of all tasks to the manifest."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_prep.folder_refusals import (
    no_document,
    other_corpus,
    refuse_lost_shards,
    refuse_unfinished_tasks,
)
from data_prep.ids import find_duplicates
from data_prep.journal import Journal, exclusive
from monet_train.data.index_file import token_dtype
from monet_train.data.manifest import MANIFEST_NAME, Manifest, ShardRecord
from monet_train.durable import write_atomically
from monet_train.errors import UserError
from monet_train.tokenizers import Tokenizer, load_tokenizer
from monet_train.tokenizers.files import remove_tokenizer


def merge(folder: Path) -> Manifest:
    """Write the manifest over the shards of all tasks. Nothing else is written, and no shard is read.

    Raises:
        UserError: a task is missing or unfinished, the tasks were not given the same command, a shard is gone, or the
            folder cannot be read or written.
    """
    try:
        if (folder / MANIFEST_NAME).exists():
            manifest = Manifest.read(folder)
            remove_journals(folder)
            _refuse_lost(folder, manifest.shards, manifest.recipe["tasks"])
            return manifest
        with exclusive(folder):
            return _merge(folder)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder} cannot be read or written ({error.strerror or error}): make it so and run "
            f"`monet-data merge {folder}` again"
        ) from None


def _merge(folder: Path) -> Manifest:
    journals: list[Journal] = []
    paths = [path for path in folder.glob("progress-*.jsonl") if path.stem.removeprefix("progress-").isdecimal()]
    for path in sorted(paths, key=_task_of):
        journal = Journal(path)
        journal.open(None)
        if journals and journal.recipe != journals[0].recipe:
            raise other_corpus(folder, journals[0].recipe, journal.recipe)
        journals.append(journal)
    if not journals:
        raise UserError(f"{folder} holds no finished tasks: run `monet-data shards ... --task I --tasks N` first")
    tasks = journals[0].recipe["tasks"]
    finished = {_task_of(journal.path) for journal in journals if journal.done}
    refuse_unfinished_tasks(folder, tasks, finished)
    _refuse_lost(folder, [shard for journal in journals for shard in journal.shards], tasks)
    return write_manifest(folder, journals, load_tokenizer(folder))


def write_manifest(folder: Path, journals: list[Journal], tokenizer: Tokenizer) -> Manifest:
    """Write the manifest over all shards of some journals, which are then removed.

    Raises:
        UserError: there is no document, an id occurs twice, or a journal lacks a shard.
    """
    shards = [shard for journal in journals for shard in journal.shards]
    totals = [journal.totals for journal in journals]
    rejected, filtered = (_sum(counts) for counts in ([t.rejected for t in totals], [t.filtered for t in totals]))
    for journal in journals:
        numbers = [shard.name.rsplit("-", 1)[-1] for shard in journal.shards]
        if numbers != [f"{number:05d}" for number in range(len(numbers))]:
            raise UserError(f"{journal.path} does not record every shard: delete {folder} and prepare it again")
    if not shards:
        remove_journals(folder)
        remove_tokenizer(folder)  # nothing is in the way of another attempt
        raise no_document(rejected, filtered)
    if duplicates := find_duplicates(folder, shards):
        raise UserError(
            f"{duplicates}: remove the repeated ones from the sources, delete {folder} and prepare it again (or leave "
            "out --id-field)"
        )
    manifest = Manifest(
        tokenizer=tokenizer.record,
        dtype=np.dtype(token_dtype(tokenizer.record.vocabulary_size)).name,
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        text_bytes=sum(shard.text_bytes for shard in shards),
        filtered=filtered,
        rejected=rejected,
        recipe=journals[0].recipe,
        shards=shards,
    )
    write_atomically(folder / MANIFEST_NAME, manifest.to_json().encode())
    remove_journals(folder)
    return manifest


def remove_journals(folder: Path) -> None:
    """The manifest has all that they say. One may be left over from a run that was killed in between."""
    for path in folder.glob("progress*.jsonl"):
        path.unlink()


def is_complete(folder: Path, shard: ShardRecord) -> bool:
    """Whether all files of a shard are there in full length; what is in them is for ``verify`` to check."""
    files = {folder / f"{shard.name}.{suffix}": record.bytes for suffix, record in shard.files.items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in files.items())


def _refuse_lost(folder: Path, shards: list[ShardRecord], tasks: int) -> None:
    refuse_lost_shards(folder, [shard.name for shard in shards if not is_complete(folder, shard)], tasks)


def _sum(counts: list[dict[str, int]]) -> dict[str, int]:
    return {key: sum(count.get(key, 0) for count in counts) for key in sorted({k for c in counts for k in c})}


def _task_of(journal: Path) -> int:
    return int(journal.stem.removeprefix("progress-"))
