"""``monet-data shards`` and ``merge``: an output folder from its first shard to its manifest."""

from __future__ import annotations

import copy
import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.encode import Encoder
from data_prep.ids import find_duplicates
from data_prep.journal import LOCK_NAME, Journal, exclusive, other_recipe, recipe_of
from data_prep.pipeline import Begin, Plan, RejectsLog, ShardOptions, make_shards
from data_prep.recipe import Recipe
from data_prep.shard_writer import SUFFIXES, disk_error
from data_prep.sources import list_parts
from monet_train.data.index_file import token_dtype
from monet_train.data.manifest import MANIFEST_NAME, Manifest, Position, ShardRecord
from monet_train.durable import sync, write_atomically
from monet_train.errors import UserError
from monet_train.tokenizers import Tokenizer, load_tokenizer
from monet_train.tokenizers.files import remove_tokenizer

TASKS_START_SECONDS = 60  # in which the tasks of an array have started, one after the other
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
                raise disk_error(folder, error) from None


def _begin(plan: Plan, folder: Path) -> Journal | None:
    """The journal of this work; None if its manifest is there.

    Raises:
        UserError: the folder belongs to another corpus.
    """
    asked, path = plan.describe(), folder / f"progress{_task_suffix(plan.options)}.jsonl"
    if (folder / MANIFEST_NAME).exists():
        recipe = Manifest.read(folder).recipe
        if recipe != asked:
            raise other_recipe(folder, recipe, asked)
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
        _remove_journals(folder)
        _put_back(plan, encoder, folder, manifest.shards)
        return manifest
    for leftover in folder.glob(f".shard{suffix}-*.tmp"):
        leftover.unlink()
    if not journal.done:
        parts = plan.range_of(plan.options.task)
        begin = Begin.after(journal.shards, Position(parts.start, 0, 0))
        log = RejectsLog(folder / f"rejects{suffix}.jsonl", copy.deepcopy(journal.totals))
        kept = begin.documents
        for shard, totals in make_shards(plan, encoder, folder, begin, parts.stop, log):
            if totals.rejects_bytes:
                sync(log.path)  # the journal counts on it
            journal.add(shard, totals)
            kept += shard.documents
            _judge(log, kept, ENOUGH_TO_JUDGE, plan.options.max_bad_share)
        _judge(log, kept, 1, plan.options.max_bad_share)
        plan.tokenizer.copy_to(folder, suffix)
        journal.finish(log.totals)
    _put_back(plan, encoder, folder, journal.shards)
    return _write_manifest(folder, [journal], plan.tokenizer) if plan.options.tasks == 1 else None


def merge(folder: Path) -> Manifest:
    """Write the manifest over the shards of all tasks; nothing else is written, no shard is read.

    Raises:
        UserError: a task is missing or unfinished, the tasks were not given the same command, a shard is gone, or the
            folder cannot be read or written.
    """
    try:
        if (folder / MANIFEST_NAME).exists():
            manifest = Manifest.read(folder)
            _remove_journals(folder)
            _refuse_gone(folder, manifest.shards, manifest.recipe["tasks"])
            return manifest
        with exclusive(folder):
            return _merge(folder)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder} cannot be read or written ({error.strerror or error}): repair that and run "
            f"`monet-data merge {folder}` again"
        ) from None


def _merge(folder: Path) -> Manifest:
    journals: list[Journal] = []
    paths = [path for path in folder.glob("progress-*.jsonl") if path.stem.removeprefix("progress-").isdecimal()]
    for path in sorted(paths, key=_task_of):
        journal = Journal(path)
        journal.open(None)
        if journals and journal.recipe != journals[0].recipe:
            raise other_recipe(folder, journals[0].recipe, journal.recipe)
        journals.append(journal)
    if not journals:
        raise UserError(f"{folder} holds no finished tasks: run `monet-data shards ... --task I --tasks N` first")
    tasks = journals[0].recipe["tasks"]
    finished = {_task_of(journal.path) for journal in journals if journal.done}
    if missing := sorted(set(range(tasks)) - finished):
        raise UserError(
            f"{folder}: {len(missing)} of {tasks} tasks are not finished (first: {missing[0]}): run "
            f"`monet-data shards ... --task {missing[0]} --tasks {tasks}` again"
        )
    _refuse_gone(folder, [shard for journal in journals for shard in journal.shards], tasks)
    return _write_manifest(folder, journals, load_tokenizer(folder))


def _write_manifest(folder: Path, journals: list[Journal], tokenizer: Tokenizer) -> Manifest:
    shards = [shard for journal in journals for shard in journal.shards]
    totals = [journal.totals for journal in journals]
    rejected, filtered = (_sum(counts) for counts in ([t.rejected for t in totals], [t.filtered for t in totals]))
    for journal in journals:
        numbers = [shard.name.rsplit("-", 1)[-1] for shard in journal.shards]
        if numbers != [f"{number:05d}" for number in range(len(numbers))]:
            raise UserError(f"{journal.path} does not record every shard: delete {folder} and prepare it again")
    if not shards:
        _remove_journals(folder)
        remove_tokenizer(folder)  # nothing is in the way of another attempt
        raise UserError(
            f"the sources hold no document ({sum(rejected.values())} bad, {sum(filtered.values())} filtered): check "
            "the paths, --text-field, the filters and --max-documents or --max-bytes"
        )
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
    _remove_journals(folder)
    return manifest


def _remove_journals(folder: Path) -> None:
    """What the manifest says, a journal need not say; a run that was killed in between may have left one."""
    for path in folder.glob("progress*.jsonl"):
        path.unlink()


def _refuse_gone(folder: Path, shards: list[ShardRecord], tasks: int) -> None:
    if gone := [shard.name for shard in shards if not _stands(folder, shard)]:
        named = re.fullmatch(r"shard-(\d+)-\d+", gone[0])
        task = f" --task {int(named[1])} --tasks {tasks}" if named else ""
        raise UserError(
            f"{folder} has lost {', '.join(gone)}: run `monet-data shards ...{task}` again, which makes "
            "what is missing and nothing else"
        )


def _put_back(plan: Plan, encoder: Encoder, folder: Path, shards: list[ShardRecord]) -> None:
    """What was finished and is gone since."""
    if not plan.tokenizer.is_in(folder):
        plan.tokenizer.copy_to(folder, _task_suffix(plan.options))
    _rebuild(plan, encoder, folder, shards)


def _rebuild(plan: Plan, encoder: Encoder, folder: Path, shards: list[ShardRecord]) -> None:
    """Make this task's shards again whose files are gone or cut short; they must come out as they were recorded."""
    mine = plan.range_of(plan.options.task)
    shards = [shard for shard in shards if shard.start.part in mine]
    scratch = folder / f".rebuild{_task_suffix(plan.options)}.tmp"  # what is there stays until the new one is right
    for number, shard in enumerate(shards):
        if _stands(folder, shard):
            continue
        begin = Begin.after(shards[:number], shard.start)._replace(position=shard.start)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            made = next(make_shards(plan, encoder, scratch, begin, mine.stop, None, shard.end), None)
            if made is None or made.shard != shard:
                raise UserError(
                    f"{folder / shard.name}.bin came out differently from what {MANIFEST_NAME} says and was left as it "
                    "is: the source has changed; prepare the whole corpus again into another --out"
                )
            for suffix in SUFFIXES:
                (scratch / f"{shard.name}.{suffix}").replace(folder / f"{shard.name}.{suffix}")
            sync(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _stands(folder: Path, shard: ShardRecord) -> bool:
    """Whether all files of a shard are there in full length; ``verify`` checks what is in them."""
    files = {folder / f"{shard.name}.{suffix}": record.bytes for suffix, record in shard.files.items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in files.items())


def _refuse_foreign(folder: Path, asked: dict[str, Any]) -> None:
    """A folder that holds anything but other tasks of the same work is left alone."""
    if asked["tasks"] > 1 and (others := sorted(folder.glob("progress-*.jsonl"))):
        there = recipe_of(others[0])
        if there != asked:
            raise other_recipe(folder, there, asked)
        return
    for path in sorted(folder.iterdir()):
        if not path.name.startswith((LOCK_NAME, ".progress", "rejects")):
            raise UserError(f"{folder} is not empty ({path.name}): choose another --out, or empty the folder")


def _judge(log: RejectsLog, kept: int, enough: int, max_bad_share: float) -> None:
    bad = sum(log.totals.rejected.values())
    seen = bad + kept + sum(log.totals.filtered.values())
    if seen >= enough and bad > max_bad_share * seen:
        raise UserError(
            f"{bad} of {seen} documents are bad ({', '.join(log.totals.rejected)}), more than the share of "
            f"{max_bad_share} that is allowed: see {log.path}, then raise --max-bad-share, or repair the source and "
            "begin in an empty --out"
        )


def _sum(counts: list[dict[str, int]]) -> dict[str, int]:
    return {key: sum(count.get(key, 0) for count in counts) for key in sorted({k for c in counts for k in c})}


def _task_of(journal: Path) -> int:
    return int(journal.stem.removeprefix("progress-"))


def _task_suffix(options: ShardOptions) -> str:
    return f"-{options.task:04d}" if options.tasks > 1 else ""
