"""Does a document id occur twice? Asked before the manifest, in memory that does not grow with the corpus."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.folder_refusals import cannot_read
from monet_train.data.index_file import REBUILD
from monet_train.data.manifest import ShardRecord
from monet_train.errors import UserError

AT_ONCE = 1 << 24
LOOKED_UP = 1000  # repeated hashes of a pass whose ids are then compared as text
SHOWN = 80  # characters of an id in the error


class Duplicates(NamedTuple):
    """How many documents repeat an id, and the first repetition that was found."""

    repeats: int
    id: str
    places: tuple[str, str]  # "shard-00000 document 12"

    def __str__(self) -> str:
        """Half a line for an error."""
        more = f" ({self.repeats:,} documents repeat an id)" if self.repeats > 1 else ""
        name = self.id if len(self.id) <= SHOWN else self.id[:SHOWN] + "..."
        return f"document id {name!r} occurs twice, in {' and '.join(self.places)}{more}"


def find_duplicates(folder: Path, shards: list[ShardRecord], at_once: int = AT_ONCE) -> Duplicates | None:
    """Compare the ids of all documents of some shards; shards that were prepared without ids are skipped.

    Args:
        at_once: hashes held in memory at a time; more documents take more passes over the labels.

    Raises:
        UserError: the labels of a shard cannot be read.
    """
    passes = 1 + sum(shard.documents for shard in shards) // at_once
    repeats, first = 0, None
    for number in range(passes):
        mine = [named.hashes[named.hashes % passes == number] for named in _ids_by_shard(folder, shards)]
        hashes = np.sort(np.concatenate([np.zeros(0, np.uint64), *mine]))
        repeated = hashes[1:][hashes[1:] == hashes[:-1]]
        if len(repeated):
            first = first or _look_up(folder, shards, repeated[:LOOKED_UP])
            repeats += len(repeated)
    return first and first._replace(repeats=repeats)


def _look_up(folder: Path, shards: list[ShardRecord], hashes: np.ndarray) -> Duplicates | None:
    """The first id among those with these hashes that does occur twice: two ids can have one hash."""
    seen: dict[str, str] = {}
    for named in _ids_by_shard(folder, shards):
        for number in np.flatnonzero(np.isin(named.hashes, hashes)).tolist():
            name, place = named.ids[number], f"{named.shard} document {named.documents[number]}"
            if name in seen:
                return Duplicates(1, name, (seen[name], place))
            seen[name] = place
    return None


class _ShardIds(NamedTuple):
    """The documents of a shard that have an id."""

    shard: str
    documents: list[int]
    ids: list[str]
    hashes: np.ndarray  # uint64, of this process only


def _ids_by_shard(folder: Path, shards: list[ShardRecord]) -> Iterator[_ShardIds]:
    import pyarrow
    import pyarrow.parquet

    for shard in shards:
        path = folder / f"{shard.name}.labels.parquet"
        try:
            with path.open("rb") as stream:  # a name with a colon is not an address
                file = pyarrow.parquet.ParquetFile(stream)
                if "id" not in file.schema_arrow.names:
                    continue
                column = file.read(columns=["id"], use_threads=False)["id"].to_pylist()
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise UserError(
                f"{cannot_read(path, error)}: delete {folder / shard.name}.* and {REBUILD} (for the shard of a task, "
                "that task's; then merge)"
            ) from None
        documents = [number for number, name in enumerate(column) if name is not None]
        ids = [column[number] for number in documents]
        yield _ShardIds(shard.name, documents, ids, np.fromiter(map(hash, ids), np.int64, len(ids)).view(np.uint64))
