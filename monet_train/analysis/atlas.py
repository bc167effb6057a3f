"""Reading an atlas: what ``monet-experts collect`` wrote about every expert. docs/atlas.md has the schema."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from monet_train.analysis.contexts import STRONGEST
from monet_train.analysis.manifest import AtlasManifest
from monet_train.analysis.write import DOCUMENTS, UNITS, UNITS_AT_ONCE, document_label, experts_file, halves_file
from monet_train.errors import UserError
from monet_train.kernels.visits import BEFORE

if TYPE_CHECKING:  # it needs scipy, which reading a page does not
    from monet_train.analysis.statistics import LabelSums


@dataclass(frozen=True)
class Context:
    """A token at which an expert fired, and the tokens around it."""

    shard: int  # as in documents.parquet
    document: int  # its number in the shard
    position: int  # of the token in the document
    score: float
    contribution: float  # score times the norm of the expert's output, over the layers of its group
    quantile: int  # -1: among the strongest; 0 to 4: from the sample, weakest fifth to strongest
    labels: dict[str, Any]  # of the document
    tokens: list[int]  # ids of the window
    scores: list[float]  # of the window's tokens near the context; 0 elsewhere
    place: int  # of the token in the window


@dataclass(frozen=True)
class Expert:
    """A page about one expert."""

    group: int
    i: int
    j: int
    firings: int  # tokens with a score above 0
    mean: float  # score per token
    second_moment: float
    histogram: list[int]  # firings by floor(log2 score), from -12 or less to 3 or more
    profile: dict[str, dict[str, float]]  # mean score by label column and value
    correlation: dict[str, float]  # Pearson's r with numeric labels
    contexts: list[Context]

    @property
    def strongest(self) -> list[Context]:
        """The strongest contexts, strongest first."""
        return [context for context in self.contexts if context.quantile == STRONGEST]

    @property
    def top_tokens(self) -> dict[int, float]:
        """Token ids that the expert fires at, with their share of the sampled firings, most frequent first."""
        sample = [context.tokens[context.place] for context in self.contexts if context.quantile != STRONGEST]
        ids, counts = np.unique(np.array(sample, int), return_counts=True)
        order = np.lexsort((ids, -counts))
        return {int(ids[n]): float(counts[n] / counts.sum()) for n in order}


class Atlas:
    """An atlas on disk.

    Examples::

        atlas = Atlas("atlas")
        page = atlas.expert(group=0, i=17, j=402)
        means = atlas.sums(0, "lang").half(0).mean               # [values, experts i * E + j], by half of the documents

    Raises:
        UserError: the folder is not an atlas, or the collection is unfinished.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = AtlasManifest.read(self.folder)
        self.size = self.manifest.model.identity.moe_experts
        self._table = lru_cache(maxsize=8)(self._open_table)
        self._unit_group = lru_cache(maxsize=64)(self._read_unit_group)

    @property
    def groups(self) -> list[int]:
        """The routing groups that were collected."""
        return self.manifest.groups

    def expert(self, group: int, i: int, j: int) -> Expert:
        """The page about expert (i, j) of a routing group. Reads one row group of the table of experts.

        Raises:
            UserError: the group was not collected, or there is no such expert.
        """
        for name, half in (("i", i), ("j", j)):
            if not 0 <= half < self.size:
                raise UserError(f"{name}={half} is not a half-expert; use one of 0 to {self.size - 1}")
        (row,) = self._table(experts_file(self._known(group))).read_row_group(i).slice(j, 1).to_pylist()
        return Expert(
            group=group,
            i=i,
            j=j,
            firings=row["firings"],
            mean=row["mean"],
            second_moment=row["second_moment"],
            histogram=row["histogram"],
            profile={column: self._profile_of(row, column) for column in self.manifest.labels},
            correlation={name: row[f"{name}.r"] for name in self.manifest.numeric},
            contexts=self._contexts(row),
        )

    def column(self, group: int, name: str, halves: bool = False) -> np.ndarray:
        """A column of a table, for every expert i * E + j (``halves``: every half-expert, side 1 first), [N] or [N, k].

        Raises:
            UserError: the group was not collected, or there is no such column.
        """
        file = self._table((halves_file if halves else experts_file)(self._known(group)))
        if name not in file.schema_arrow.names:
            raise UserError(f"{self.folder}: there is no column {name!r}{_nearest(name, file.schema_arrow.names)}")
        values = file.read(columns=[name])[name].combine_chunks()
        if hasattr(values, "flatten") and hasattr(values.type, "list_size"):
            return values.flatten().to_numpy(zero_copy_only=False).reshape(len(values), -1)
        return values.to_numpy(zero_copy_only=False)

    def values(self, column: str) -> tuple[str, ...]:
        """The values of a label column, in the order of all arrays.

        Raises:
            UserError: there is no such label.
        """
        records = self.manifest.labels
        if column not in records:
            raise UserError(f"{self.folder}: there is no label {column!r}{_nearest(column, records)}")
        return tuple(records[column])

    def sums(self, group: int, column: str, halves: bool = False) -> LabelSums:
        """What every expert (``halves``: half-expert) of a routing group does by the values of a label column.

        Raises:
            UserError: the group was not collected, there is no such label, or it has one value alone.
        """
        values = self.values(column)
        if len(values) < 2:
            raise UserError(
                f"{column} has one value alone ({values[0]}): nothing to compare it with; choose another label"
            )
        try:
            from monet_train.analysis.statistics import LabelSums
        except ImportError:
            raise UserError("scipy is not installed: pip install 'monet-train[experts]'") from None
        total, square, product = (
            np.moveaxis(self.column(group, f"{column}.{name}", halves).reshape(-1, 2, len(values)), 0, -1)
            for name in ("total", "document_square", "document_product")
        )
        records = self.manifest.labels[column].values()
        documents, tokens, token_square = (
            np.array([getattr(record, name) for record in records]).T
            for name in ("documents", "tokens", "token_squares")
        )
        firings = self.column(group, f"{column}.firings", halves).T
        return LabelSums(total, square, product, firings, documents, tokens, token_square)

    def _known(self, group: int) -> int:
        if group not in self.groups:
            raise UserError(f"{self.folder}: group={group!r} was not collected; use one of {self.groups}")
        return group

    def _profile_of(self, row: dict[str, Any], column: str) -> dict[str, float]:
        records = self.manifest.labels[column]
        totals = np.array(row[f"{column}.total"]).reshape(2, -1).sum(0)
        tokens = [max(1, sum(record.tokens)) for record in records.values()]
        return {value: float(total / n) for value, total, n in zip(records, totals, tokens, strict=True)}

    def _contexts(self, row: dict[str, Any]) -> list[Context]:
        contexts, active = [], 0
        for number, unit in enumerate(row["context.unit"]):
            place, entries = row["context.position"][number], row["context.active"][number]
            window = self._unit(unit)
            scores = [0.0] * len(window["tokens"])
            for at, score in zip(
                row["active.place"][active : active + entries],
                row["active.score"][active : active + entries],
                strict=True,
            ):
                scores[place - BEFORE + at] = float(score)
            active += entries
            document = self._document(window["document"])
            contexts.append(
                Context(
                    shard=document["shard"],
                    document=document["number"],
                    position=window["begin"] + place,
                    score=row["context.score"][number],
                    contribution=row["context.contribution"][number],
                    quantile=row["context.quantile"][number],
                    labels={
                        name: document[document_label(name)] for name in (*self.manifest.labels, *self.manifest.numeric)
                    },
                    tokens=window["tokens"],
                    scores=scores,
                    place=place,
                )
            )
        return contexts

    def _unit(self, number: int) -> dict[str, Any]:
        row = int(np.searchsorted(self._unit_numbers, number))
        group, inside = divmod(row, UNITS_AT_ONCE)
        (found,) = self._unit_group(group).slice(inside, 1).to_pylist()
        return dict(found)

    @cached_property
    def _unit_numbers(self) -> np.ndarray:
        return self._table(UNITS).read(columns=["unit"])["unit"].to_numpy()

    def _read_unit_group(self, number: int) -> Any:
        return self._table(UNITS).read_row_group(number)

    def _document(self, number: int) -> dict[str, Any]:
        (found,) = self._documents.slice(number, 1).to_pylist()
        return dict(found)

    @cached_property
    def _documents(self) -> Any:
        return self._table(DOCUMENTS).read()

    def _open_table(self, name: str) -> Any:
        import pyarrow
        import pyarrow.parquet

        path = self.folder / name
        try:
            return pyarrow.parquet.ParquetFile(path)
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{path} cannot be read ({error}): make the atlas again, or restore the file") from None


def _nearest(name: str, known: Sequence[str] | dict[str, Any]) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f": did you mean {near[0]}?" if near else f"; choose from {', '.join(known)}"
