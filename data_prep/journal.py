"""The state of an output folder: who may write to it, what is finished, where to resume."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import filelock

from data_prep.folder_refusals import damaged_journal, other_corpus
from monet_train.data.manifest import ShardRecord, check_recipe
from monet_train.durable import sync, write_atomically
from monet_train.errors import UserError
from monet_train.typed import from_json

LOCK_NAME = ".lock"


@dataclass
class Totals:
    """What has been left out so far, and how long the rejects file is."""

    rejected: dict[str, int] = field(default_factory=dict)
    filtered: dict[str, int] = field(default_factory=dict)
    rejects_bytes: int = 0


@dataclass(frozen=True)
class _Begun:
    """The first line of a journal."""

    recipe: dict[str, Any]


@dataclass(frozen=True)
class _Done:
    """A further line: a shard that is finished, or none at the end."""

    totals: Totals
    shard: ShardRecord | None = None


class Journal:
    """``progress.jsonl``: the recipe, one line per finished shard, a last one at the end. Removed with the manifest."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe: dict[str, Any] = {}
        self.shards: list[ShardRecord] = []
        self.totals = Totals()
        self.done = False  # all shards are there

    def open(self, recipe: dict[str, Any] | None) -> None:
        """Start the journal, or read the one that a stopped run of the same recipe left.

        Without a recipe, the journal of any is read and nothing is repaired: the task that owns it may be writing it.

        Raises:
            UserError: another recipe is at work in the folder, or the journal is damaged.
        """
        if not self.path.exists():
            self.recipe = recipe or {}
            write_atomically(self.path, (json.dumps({"recipe": recipe}) + "\n").encode())
            return
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise damaged_journal(self.path, str(error.strerror or error)) from None
        whole = data[: data.rfind(b"\n") + 1]  # a line that was cut short by a kill does not count
        self.recipe = _recipe_in(self.path, whole)
        for line in _lines(self.path, whole, _Done, first=2):
            self.totals, self.done = line.totals, line.shard is None
            if line.shard:
                self.shards.append(line.shard)
        if recipe is None:
            return
        if recipe != self.recipe:
            if not self._is_repaired(recipe):
                raise other_corpus(self.path.parent, self.recipe, recipe)
            whole = b"".join([json.dumps({"recipe": recipe}).encode() + b"\n", *whole.splitlines(keepends=True)[1:]])
            self.recipe = recipe
        if whole != data:
            write_atomically(self.path, whole)

    def _is_repaired(self, recipe: dict[str, Any]) -> bool:
        """Whether ``recipe`` differs only in source files that no shard has read yet: they were repaired.

        With several tasks their sizes also decide what each task does.
        """
        files, there = recipe["files"], self.recipe.get("files", [])
        if {**recipe, "files": there} != self.recipe or len(files) != len(there) or recipe["tasks"] > 1 or self.done:
            return False
        read = self.shards[-1].end.part + 1 if self.shards else 0
        return files[:read] == there[:read] and all(a[0] == b[0] for a, b in zip(files, there, strict=True))

    def add(self, shard: ShardRecord, totals: Totals) -> None:
        """Record a finished shard durably, with what had been left out up to its end."""
        self.shards.append(shard)
        self.totals = totals
        self._append({"shard": shard.to_json(), "totals": asdict(totals)})

    def finish(self, totals: Totals) -> None:
        """Record that there are no more shards."""
        self.done, self.totals = True, totals
        self._append({"totals": asdict(totals)})

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("ab") as stream:
            stream.write((json.dumps(line) + "\n").encode())
        sync(self.path)


def recipe_of(path: Path) -> dict[str, Any]:
    """The recipe of a journal that another task may be writing at this moment: nothing is repaired."""
    try:
        with path.open("rb") as stream:
            return _recipe_in(path, stream.readline())
    except OSError as error:
        raise damaged_journal(path, str(error.strerror or error)) from None


def _recipe_in(path: Path, data: bytes) -> dict[str, Any]:
    begun = next(_lines(path, data[: data.find(b"\n") + 1], _Begun), None)
    if begun is None:
        raise damaged_journal(path, "it is empty")
    try:
        check_recipe(begun.recipe)
    except ValueError as error:
        raise damaged_journal(path, str(error)) from None
    return begun.recipe


def _lines(path: Path, data: bytes, kind: type, first: int = 1) -> Iterator[Any]:
    """The lines of a journal from ``first`` on, each of ``kind``.

    Raises:
        UserError: one is damaged.
    """
    for number, line in enumerate(data.splitlines()[first - 1 :], start=first):
        try:
            yield from_json(kind, json.loads(line), "line")
        except ValueError as error:
            raise damaged_journal(path, f"line {number}: {error}") from None


@contextlib.contextmanager
def exclusive(folder: Path, name: str = LOCK_NAME, wait_seconds: float = 0) -> Iterator[None]:
    """Lock the folder against a second run, or wait for one that will soon be done.

    Raises:
        UserError: another run holds the lock, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / name)
        lock.acquire(timeout=wait_seconds)
    except filelock.Timeout:
        raise UserError(f"{folder} is being written by another run: wait for it, or choose another --out") from None
    except OSError as error:
        raise UserError(f"{folder} cannot be made or locked ({error.strerror}): choose another --out") from None
    try:
        yield
    finally:
        (folder / name).unlink(missing_ok=True)
        lock.release()
