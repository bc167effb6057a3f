"""The labels by which experts are described: which columns there are, and the cell of every document.

A *cell* is a value of a string column (lang=de); a document is in one cell of each column, or in none. Numeric
columns (toxicity) give every document a number.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MOST_VALUES = 64  # of a column; memory grows with them. Columns with more say little by their values


@dataclass(frozen=True)
class LabelColumn:
    """A string column and its values, sorted."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class NumericColumn:
    """A numeric column; ``scale`` is the greatest absolute value."""

    name: str
    scale: float


@dataclass(frozen=True)
class LabelSchema:
    """All columns of an atlas. Cells are numbered column by column."""

    columns: tuple[LabelColumn, ...]
    numeric: tuple[NumericColumn, ...]

    @property
    def cells(self) -> int:
        """How many cells there are."""
        return sum(len(column.values) for column in self.columns)

    def first_cell(self, column: int) -> int:
        """Number of the first cell of a column."""
        return sum(len(before.values) for before in self.columns[:column])

    def cells_of(self, name: str) -> slice:
        """The cells of a column, by its name."""
        (number,) = (number for number, column in enumerate(self.columns) if column.name == name)
        first = self.first_cell(number)
        return slice(first, first + len(self.columns[number].values))


@dataclass(frozen=True)
class Documents:
    """The documents of a collection, ordered by content hash; an array each.

    The order, and all that follows from it, is the same for any order of shards.
    """

    shard: np.ndarray  # int32 [D], number of the shard in the plan
    number: np.ndarray  # int64 [D], in the shard
    hash: np.ndarray  # uint64 [D], of the tokens
    tokens: np.ndarray  # int64 [D]
    cell: np.ndarray  # int32 [columns, D], -1 where unknown
    value: np.ndarray  # fp64 [numeric columns, D], divided by the column's scale; NaN where unknown

    def __len__(self) -> int:
        return len(self.hash)

    def take(self, rows: np.ndarray) -> Documents:
        """Some of them."""
        return Documents(
            self.shard[rows], self.number[rows], self.hash[rows], self.tokens[rows], self.cell[:, rows],
            self.value[:, rows],
        )  # fmt: skip
