"""Language, domain and source of documents: what lies beside the shards for the analysis of experts."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from monet_train.errors import UserError

OPEN_FILES = 64  # labels held in memory at once; those of 250M tokens take a few MB


def document_labels(prefix: Path, document: int) -> dict[str, str | int | None]:
    """The labels of one document of a shard: ``lang``, ``domain``, ``source``, ``bytes`` and, if there are any, ``id``.

    Args:
        prefix: the shard, without suffix; ``PackedSequences.pieces`` gives it for a training sequence.
        document: number of the document in the shard.

    Raises:
        UserError: the shard has no labels (Megatron's own tools write none), or no such document.
    """
    table = _labels(prefix)
    if not 0 <= document < table.num_rows:
        raise UserError(f"{prefix}: there is no document {document}: the shard has {table.num_rows}")
    return {name: table[name][document].as_py() for name in table.column_names}


@lru_cache(maxsize=OPEN_FILES)
def _labels(prefix: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    path = Path(f"{prefix}.labels.parquet")
    try:
        with path.open("rb") as stream:  # a name with a colon would be taken for an address
            return pyarrow.parquet.read_table(stream)
    except (OSError, pyarrow.ArrowException) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise UserError(f"labels {path}: the file {reason}: make the shards with `monet-data shards`") from None
