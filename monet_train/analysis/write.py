"""Writing an atlas from the parts of a collection: a block of experts at a time, so that memory stays bounded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from monet_train.analysis.contexts import EMPTY, FIELDS, Contexts, merge
from monet_train.analysis.parts import read_part
from monet_train.analysis.plan import Plan
from monet_train.analysis.sums import DocumentCounts, Scales, Sums
from monet_train.analysis.tables import context_columns, fixed_list, label_columns, ragged
from monet_train.durable import sync
from monet_train.fingerprint import sha256_file
from monet_train.kernels.visits import UNIT_PLACES

UNITS_AT_ONCE = 64  # rows of a row group of units.parquet: a page of an expert reads about 45 of them
DOCUMENTS, UNITS = "documents.parquet", "units.parquet"


def experts_file(group: int) -> str:
    """Name of the table of a routing group's experts: row i * E + j is expert (i, j), row group i those of half i."""
    return f"experts-{group:03d}.parquet"


def halves_file(group: int) -> str:
    """Name of the table of a routing group's half-experts: E of side 1, then E of side 2."""
    return f"halves-{group:03d}.parquet"


def coactive_file(group: int) -> str:
    """Name of the table of sampled tokens with their experts."""
    return f"coactive-{group:03d}.parquet"


def document_label(name: str) -> str:
    """Column of a label in the table of documents, where other columns may have the label's name."""
    return f"label.{name}"


class AtlasWriter:
    """Writes the tables of an atlas.

    Args:
        folder: of the atlas. parts: folders that together have every document of the plan.
        experts: E. heads: H.
    """

    def __init__(self, folder: Path, plan: Plan, parts: Sequence[Path], experts: int, heads: int) -> None:
        self.folder, self.plan, self.experts = folder, plan, experts
        self._parts = [read_part(path) for path in parts]
        self._scales = Scales.of_plan(plan, heads)
        self._counts = DocumentCounts.of_plan(plan)
        self._used = np.zeros(int(plan.first_unit[-1]), bool)  # units that some context is in

    def write(self, groups: Sequence[int], show: bool = False) -> dict[str, str]:
        """Write every table. SHA-256 of each file by its name."""
        names = []
        with tqdm(total=len(groups) * self.experts, desc="writing experts", disable=not show or None) as bar:
            for group in groups:
                names += [
                    self._write(experts_file(group), self._expert_tables(group, bar)),
                    self._write(halves_file(group), self._half_tables(group)),
                    self._write(coactive_file(group), self._coactive_tables(group)),
                ]
        names += [self._write(DOCUMENTS, self._document_tables()), self._write(UNITS, self._unit_tables())]
        return {name: sha256_file(self.folder / name) for name in sorted(names)}

    def _write(self, name: str, tables: Iterator[Any]) -> str:
        """Write tables as row groups of one file, which has its name only when it is whole."""
        import pyarrow.parquet

        temporary = self.folder / f".{name}.tmp"
        with temporary.open("wb") as stream:
            first = next(tables)
            with pyarrow.parquet.ParquetWriter(stream, first.schema, compression="zstd") as writer:
                for table in chain([first], tables):
                    writer.write_table(table, row_group_size=max(1, table.num_rows))
        sync(temporary)
        temporary.replace(self.folder / name)
        sync(self.folder)
        return name

    def _sums(self, group: int, kind: str, experts: slice) -> dict[str, np.ndarray]:
        """The sums of a range of experts over all parts."""
        schema = self.plan.schema
        sums = Sums(experts.stop - experts.start, schema.cells, len(schema.numeric), self._scales)
        prefix = f"{group}.{kind}."
        for part in self._parts:
            sums.add({name: part[prefix + name] for name in sums.arrays()}, experts)
        return sums.values()

    def _expert_tables(self, group: int, bar: Any) -> Iterator[Any]:
        import pyarrow

        for i in range(self.experts):
            experts = slice(i * self.experts, (i + 1) * self.experts)
            columns = label_columns(self._sums(group, "pairs", experts), self._counts, self.plan.schema)
            histogram = sum(np.asarray(part[f"{group}.tally.histogram"][experts]) for part in self._parts)
            columns["histogram"] = fixed_list(np.ascontiguousarray(histogram))
            strong, sample = merge([self._contexts(part, group, experts) for part in self._parts])
            for contexts in (strong, sample):
                self._used[contexts.place[contexts.place != EMPTY] // UNIT_PLACES] = True
            bar.update()
            yield pyarrow.table(columns | context_columns(strong, sample))

    def _contexts(self, part: dict[str, np.ndarray], group: int, experts: slice) -> Contexts:
        return Contexts(*(np.array(part[f"{group}.tally.{name}"][experts]) for name in FIELDS))

    def _half_tables(self, group: int) -> Iterator[Any]:
        import pyarrow

        sums = self._sums(group, "halves", slice(0, 2 * self.experts))
        yield pyarrow.table(label_columns(sums, self._counts, self.plan.schema))

    def _coactive_tables(self, group: int) -> Iterator[Any]:
        """A row per sampled token, in the order of places."""
        import pyarrow

        found = {
            name: np.concatenate([part[f"{group}.coactive.{name}"] for part in self._parts])
            for name in ("place", "expert", "score")
        }
        order = np.argsort(found["place"], kind="stable")  # within a token strongest first, as it was kept
        places, counts = np.unique(found["place"], return_counts=True)
        yield pyarrow.table(
            {
                "unit": pyarrow.array((places // UNIT_PLACES).astype(np.int32)),
                "position": pyarrow.array((places % UNIT_PLACES).astype(np.uint16)),
                "expert": ragged(found["expert"][order], counts),
                "score": ragged(found["score"][order], counts),
            }
        )

    def _document_tables(self) -> Iterator[Any]:
        import pyarrow

        documents, schema = self.plan.documents, self.plan.schema
        columns: dict[str, Any] = {
            "hash": pyarrow.array(documents.hash),
            "shard": pyarrow.array(documents.shard),
            "number": pyarrow.array(documents.number),
            "tokens": pyarrow.array(documents.tokens),
            "first_unit": pyarrow.array(self.plan.first_unit[:-1]),
            "half": pyarrow.array(self.plan.half),
        }
        for place, column in enumerate(schema.columns):
            values = np.array([*column.values, None], dtype=object)
            codes = np.where(
                documents.cell[place] < 0, len(column.values), documents.cell[place] - schema.first_cell(place)
            )
            columns[document_label(column.name)] = pyarrow.array(values[codes], pyarrow.string()).dictionary_encode()
        for place, numeric in enumerate(schema.numeric):
            known = ~np.isnan(documents.value[place])
            columns[document_label(numeric.name)] = pyarrow.array(documents.value[place] * numeric.scale, mask=~known)
        yield pyarrow.table(columns)

    def _unit_tables(self) -> Iterator[Any]:
        """The windows that some context is in, by number, with their tokens."""
        import pyarrow

        used = np.flatnonzero(self._used)
        owner = np.searchsorted(self.plan.first_unit, used, side="right") - 1
        for begin in range(0, max(1, len(used)), UNITS_AT_ONCE):
            rows = slice(begin, begin + UNITS_AT_ONCE)
            numbers, documents = used[rows], owner[rows]
            begins = (numbers - self.plan.first_unit[documents]) * self.plan.window
            tokens = [
                self.plan.read(document)[start : start + self.plan.window]
                for document, start in zip(documents, begins, strict=True)
            ]
            yield pyarrow.table(
                {
                    "unit": pyarrow.array(numbers.astype(np.int32)),
                    "document": pyarrow.array(documents.astype(np.int32)),
                    "begin": pyarrow.array(begins.astype(np.int64)),
                    "tokens": ragged(
                        np.concatenate([*tokens, np.empty(0, np.int64)]).astype(np.int32),
                        np.array([len(window) for window in tokens], int),
                    ),
                }
            )
