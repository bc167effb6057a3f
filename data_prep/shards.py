"""``monet-data shards``: an output folder from its first shard to its manifest."""

from __future__ import annotations

import copy
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from data_prep.encode import Encoder
from data_prep.folder_refusals import (
    cannot_write,
    other_corpus,
    rebuilt_differently,
    refuse_bad_documents,
    refuse_occupied,
)
from data_prep.journal import LOCK_NAME, Journal, exclusive, recipe_of
from data_prep.merge import is_complete, remove_journals, write_manifest
from data_prep.pipeline import Plan, RejectsLog, ShardOptions, StartPoint, make_shards
from data_prep.recipe import Recipe
from data_prep.shard_writer import SUFFIXES
from data_prep.sources import list_parts
from monet_train.data.manifest import MANIFEST_NAME, Manifest, Position, ShardRecord
from monet_train.durable import sync
from monet_train.errors import UserError
from monet_train.tokenizers import Tokenizer

TASKS_START_SECONDS = 60  # within this time the tasks of an array start, one after the other
ENOUGH_TO_JUDGE = 10_000  # documents seen before too many bad ones stop a run


def prepare(
    recipe: Recipe,
    tokenizer: Tokenizer,
    folder: Path,
    options: ShardOptions,
    wait_seconds: float = TASKS_START_SECONDS,
) -> Manifest | None:
    """Make the shards that are not there yet; with one task the manifest too (None with several: see ``merge``).

    Args:
        wait_seconds: how long a task waits for its turn while others start in the same folder.

    Raises:
        UserError: the folder belongs to another corpus, a source cannot be read, too many documents are bad,
            there is no document, or the disk is full.
    """
    if options.tasks > 1 and (recipe.max_documents or recipe.max_bytes):
        raise UserError("--max-documents and --max-bytes bound the whole corpus and cannot be used with --tasks")
    if not 0 <= options.task < options.tasks:
        raise UserError(f"--task {options.task}: with --tasks {options.tasks} give 0 to {options.tasks - 1}")
    with Encoder(tokenizer, options.workers, options.slot_bytes) as encoder:
        plan = Plan(recipe, list_parts(recipe, outside=folder), tokenizer, options)
        with ExitStack() as locks:
            try:
                if options.tasks > 1:
                    locks.enter_context(exclusive(folder, f"{LOCK_NAME}{_task_suffix(options)}"))
                    with exclusive(folder, wait_seconds=wait_seconds):  # not beside a run of all tasks
                        journal = _begin(plan, folder)
                else:
                    locks.enter_context(exclusive(folder))
                    journal = _begin(plan, folder)
                return _prepare(plan, encoder, folder, journal)
            except OSError as error:
                raise cannot_write(folder, error) from None


def _begin(plan: Plan, folder: Path) -> Journal | None:
    """The journal of this work; None if its manifest is there.

    Raises:
        UserError: the folder belongs to another corpus.
    """
    asked, path = plan.describe(), folder / f"progress{_task_suffix(plan.options)}.jsonl"
    if (folder / MANIFEST_NAME).exists():
        recipe = Manifest.read(folder).recipe
        if recipe != asked:
            raise other_corpus(folder, recipe, asked)
        return None
    journal = Journal(path)
    if not path.exists():
        _refuse_foreign(folder, asked)
    journal.open(asked)
    return journal


def _prepare(plan: Plan, encoder: Encoder, folder: Path, journal: Journal | None) -> Manifest | None:
    suffix = _task_suffix(plan.options)
    if journal is None:
        manifest = Manifest.read(folder)
        remove_journals(folder)
        _restore_missing(plan, encoder, folder, manifest.shards)
        return manifest
    for leftover in folder.glob(f".shard{suffix}-*.tmp"):
        leftover.unlink()
    if not journal.done:
        parts = plan.range_of(plan.options.task)
        start = StartPoint.after(journal.shards, Position(parts.start, 0, 0))
        log = RejectsLog(folder / f"rejects{suffix}.jsonl", copy.deepcopy(journal.totals))
        kept = start.documents
        for shard, totals in make_shards(plan, encoder, folder, start, parts.stop, log):
            if totals.rejects_bytes:
                sync(log.path)  # the journal counts on it
            journal.add(shard, totals)
            kept += shard.documents
            _check_bad_share(log, kept, plan, ENOUGH_TO_JUDGE)
        _check_bad_share(log, kept, plan)
        plan.tokenizer.copy_to(folder, suffix)
        journal.finish(log.totals)
    _restore_missing(plan, encoder, folder, journal.shards)
    return write_manifest(folder, [journal], plan.tokenizer) if plan.options.tasks == 1 else None


def _restore_missing(plan: Plan, encoder: Encoder, folder: Path, shards: list[ShardRecord]) -> None:
    """Make again what was finished and has gone missing since."""
    if not plan.tokenizer.is_in(folder):
        plan.tokenizer.copy_to(folder, _task_suffix(plan.options))
    _rebuild(plan, encoder, folder, shards)


def _rebuild(plan: Plan, encoder: Encoder, folder: Path, shards: list[ShardRecord]) -> None:
    """Make those of this task's shards again whose files are missing or truncated; they must equal the record."""
    mine = plan.range_of(plan.options.task)
    shards = [shard for shard in shards if shard.start.part in mine]
    scratch = folder / f".rebuild{_task_suffix(plan.options)}.tmp"  # the old files stay until the new ones are right
    for number, shard in enumerate(shards):
        if is_complete(folder, shard):
            continue
        start = StartPoint.after(shards[:number], shard.start)._replace(position=shard.start)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            made = next(make_shards(plan, encoder, scratch, start, mine.stop, None, shard.end), None)
            if made is None or made.shard != shard:
                raise rebuilt_differently(folder, shard.name)
            for suffix in SUFFIXES:
                (scratch / f"{shard.name}.{suffix}").replace(folder / f"{shard.name}.{suffix}")
            sync(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _refuse_foreign(folder: Path, asked: dict[str, Any]) -> None:
    """Refuse a folder that holds anything but other tasks of the same work."""
    if asked["tasks"] > 1 and (others := sorted(folder.glob("progress-*.jsonl"))):
        there = recipe_of(others[0])
        if there != asked:
            raise other_corpus(folder, there, asked)
        return
    refuse_occupied(folder, allowed=(LOCK_NAME, ".progress", "rejects"))


def _check_bad_share(log: RejectsLog, kept: int, plan: Plan, enough: int = 1) -> None:
    """Refuse too many bad documents, once ``enough`` have been seen."""
    seen = kept + sum(log.totals.rejected.values()) + sum(log.totals.filtered.values())
    if seen >= enough:
        refuse_bad_documents(log.totals.rejected, seen, plan.options.max_bad_share, log.path)


def _task_suffix(options: ShardOptions) -> str:
    return f"-{options.task:04d}" if options.tasks > 1 else ""
