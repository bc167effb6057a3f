"""The documents of a shard, read one by one without Megatron, whose import takes seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from monet_train.data.index_file import read_index, read_index_header


class ShardDocuments:
    """Tokens of single documents of a ``.bin``/``.idx`` pair, mapped into memory.

    Args:
        prefix: the shard, without suffix.

    Raises:
        UserError: a file of the pair is missing or damaged.
    """

    def __init__(self, prefix: Path) -> None:
        header, index = read_index_header(prefix), read_index(prefix)
        size = np.dtype(header.dtype).itemsize
        ends = np.concatenate([index.pointers // size, [header.bin_bytes // size]])
        self._borders = ends[index.borders]
        self._tokens = np.memmap(f"{prefix}.bin", dtype=header.dtype, mode="r") if header.bin_bytes else np.empty(0)

    def __len__(self) -> int:
        return len(self._borders) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int64 [documents]."""
        return np.diff(self._borders)

    def read(self, number: int) -> np.ndarray:
        """The tokens of one document, int64."""
        return self._tokens[self._borders[number] : self._borders[number + 1]].astype(np.int64)
