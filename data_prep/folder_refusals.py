"""Output folders that a run must leave alone or cannot write, in one line each: what is wrong, and the remedy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from monet_train.data.manifest import MANIFEST_NAME
from monet_train.errors import UserError


def cannot_read(path: Path, error: Exception) -> str:
    """Half a line for a file of an output folder that exists but cannot be read."""
    name, reason = (error.filename, error.strerror) if isinstance(error, OSError) else (None, None)
    return f"{name or path} cannot be read ({reason or ' '.join(str(error).split()) or type(error).__name__})"


def cannot_write(folder: Path, error: OSError) -> UserError:
    """The line for a folder that cannot be written."""
    return UserError(
        f"{folder} cannot be written ({error.strerror or error}): make room or choose another --out, and run the "
        "same command again, which resumes where it stopped"
    )


def damaged_journal(path: Path, reason: str) -> UserError:
    """The line for a journal that cannot be read."""
    task = path.stem.removeprefix("progress")
    remedy = (
        f"delete it and run `monet-data shards ... --task {int(task[1:])}` with the same --tasks again"
        if task
        else f"delete {path.parent} (rm -r {path.parent}) and run the command again"
    )
    return UserError(f"{path} cannot be read ({reason}): restore it, or {remedy}")


def other_corpus(folder: Path, there: dict[str, Any], asked: dict[str, Any]) -> UserError:
    """The line for a folder that belongs to another corpus; names what differs.

    Args:
        there: the recipe that the folder was begun with.
        asked: the recipe of this command.
    """
    differing = [key for key in {**there, **asked} if there.get(key) != asked.get(key)]
    changed = ", because source files were added, removed or changed since" * ("files" in differing)
    before, now = _hub_versions(there), _hub_versions(asked)
    for name, version in before.items():
        if now.get(name, version) != version and version.startswith("commit "):
            commit = version.removeprefix("commit ")
            return UserError(
                f"{folder} was begun with {version} of {name}, which is now at {now[name]}: give `revision: {commit}` "
                "in the recipe to resume, or choose another --out for the new one"
            )
    return UserError(
        f"{folder} belongs to another corpus (differs in: {', '.join(differing)}{changed}): "
        f"choose another --out, or delete it (rm -r {folder}) and run the command again"
    )


def _hub_versions(recipe: dict[str, Any]) -> dict[str, str]:
    """The version of each hub dataset."""
    return {identity[0]: identity[-1] for identity in recipe.get("files", []) if identity[0].startswith("hf:")}


def refuse_occupied(folder: Path, allowed: tuple[str, ...]) -> None:
    """Refuse a folder that holds anything but files whose names begin with one of ``allowed``."""
    for path in sorted(folder.iterdir()):
        if not path.name.startswith(allowed):
            raise UserError(f"{folder} is not empty ({path.name}): choose another --out, or empty the folder")


def refuse_unfinished_tasks(folder: Path, tasks: int, finished: set[int]) -> None:
    """Refuse to merge before every task is done."""
    if missing := sorted(set(range(tasks)) - finished):
        raise UserError(
            f"{folder}: {len(missing)} of {tasks} tasks are not finished (first: {missing[0]}): run "
            f"`monet-data shards ... --task {missing[0]} --tasks {tasks}` again"
        )


def refuse_lost_shards(folder: Path, lost: list[str], tasks: int) -> None:
    """Refuse to merge where files of finished shards are gone."""
    if lost:
        named = re.fullmatch(r"shard-(\d+)-\d+", lost[0])
        task = f" --task {int(named[1])} --tasks {tasks}" if named else ""
        raise UserError(
            f"{folder} has lost {', '.join(lost)}: run `monet-data shards ...{task}` again, which makes what is "
            "missing and nothing else"
        )


def refuse_bad_documents(counts: dict[str, int], seen: int, max_share: float, listed: Path) -> None:
    """Refuse a corpus with too many bad documents.

    Args:
        counts: bad documents by reason.
        seen: documents, bad ones included.
        listed: the file that lists them.
    """
    bad = sum(counts.values())
    if bad > max_share * seen:
        raise UserError(
            f"{bad} of {seen} documents are bad ({', '.join(counts)}), more than the share of {max_share} that is "
            f"allowed: see {listed}, then raise --max-bad-share, or repair the source and start again in an empty --out"
        )


def no_document(rejected: dict[str, int], filtered: dict[str, int]) -> UserError:
    """The line for sources without any document to keep."""
    return UserError(
        f"the sources hold no document ({sum(rejected.values())} bad, {sum(filtered.values())} filtered): check the "
        "paths, --text-field, the filters and --max-documents or --max-bytes"
    )


def rebuilt_differently(folder: Path, shard: str) -> UserError:
    """The line for a shard that does not come out as it was recorded."""
    return UserError(
        f"{folder / shard}.bin came out differently from what {MANIFEST_NAME} says and was left as it is: the source "
        "has changed; prepare the whole corpus again into another --out"
    )
