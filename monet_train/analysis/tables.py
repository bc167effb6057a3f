"""The tables of an atlas as Arrow columns: names, types, and how they are made of sums and contexts.

docs/atlas.md describes every column.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from monet_train.analysis.contexts import EMPTY, STRONGEST, Contexts, quantiles
from monet_train.analysis.labels import LabelSchema
from monet_train.analysis.sums import DocumentCounts
from monet_train.kernels.visits import UNIT_PLACES


def label_columns(sums: dict[str, np.ndarray], counts: DocumentCounts, schema: LabelSchema) -> dict[str, Any]:
    """What is told of N experts by label, from their sums (:meth:`Sums.values`)."""
    usage = sums["total"] / counts.tokens
    columns: dict[str, Any] = {
        "firings": sums["firings"].astype(np.int64),
        "mean": usage,
        "second_moment": sums["square"] / counts.tokens,
    }
    tokens = np.maximum(counts.cell_tokens.sum(0), 1)[:, None]
    for column in schema.columns:
        cells = schema.cells_of(column.name)
        columns |= {
            f"{column.name}.total": _by_expert(sums["cell_total"][:, cells]),
            f"{column.name}.document_square": _by_expert(sums["cell_document_square"][:, cells]),
            f"{column.name}.document_product": _by_expert(sums["cell_document_product"][:, cells]),
            f"{column.name}.second_moment": (sums["cell_square"] / tokens)[cells].T.astype(np.float32),
            f"{column.name}.firings": sums["cell_firings"][cells].T.astype(np.int64),
        }
    for number, numeric in enumerate(schema.numeric):
        columns[f"{numeric.name}.r"] = correlation(sums, counts, number)
    return {name: fixed_list(np.ascontiguousarray(values)) for name, values in columns.items()}


def correlation(sums: dict[str, np.ndarray], counts: DocumentCounts, number: int) -> np.ndarray:
    """Pearson's r of score and a numeric label over tokens, [N]; NaN where one of them does not vary."""
    n = max(1, counts.numeric_tokens[number])
    mean_y, mean_s = counts.numeric_total[number] / n, sums["numeric_total"][number] / n
    variance_y = counts.numeric_square[number] / n - mean_y**2
    variance_s = sums["numeric_square"][number] / n - mean_s**2
    covariance = sums["numeric_product"][number] / n - mean_y * mean_s
    spread = variance_y * variance_s
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((variance_y > 0) & (variance_s > 0), covariance / np.sqrt(np.maximum(spread, 0)), np.nan)


def context_columns(strong: Contexts, sample: Contexts) -> dict[str, Any]:
    """The contexts of N experts, a list per expert: the strongest first, then the sample by quantile."""
    both = Contexts.join([strong, sample])
    quantile = np.concatenate([np.full(strong.place.shape, STRONGEST, np.int8), quantiles(sample)], 1)
    filled = both.place != EMPTY
    counts = filled.sum(1)
    near, at = np.nonzero(both.scores[filled])
    return {
        "context.quantile": ragged(quantile[filled], counts),
        "context.unit": ragged((both.place[filled] // UNIT_PLACES).astype(np.int32), counts),
        "context.position": ragged((both.place[filled] % UNIT_PLACES).astype(np.uint16), counts),
        "context.score": ragged(both.score[filled], counts),
        "context.contribution": ragged(both.contribution[filled], counts),
        "context.active": ragged(np.bincount(near, minlength=int(filled.sum())).astype(np.uint8), counts),
        "active.place": ragged(at.astype(np.uint8), _per_expert(near, filled)),
        "active.score": ragged(both.scores[filled][near, at], _per_expert(near, filled)),
    }


def _per_expert(context: np.ndarray, filled: np.ndarray) -> np.ndarray:
    """Number of entries of each expert, from the number of the context of every entry."""
    expert = np.repeat(np.arange(len(filled)), filled.sum(1))
    return np.bincount(expert[context], minlength=len(filled))


def fixed_list(values: np.ndarray) -> Any:
    """[N] as a plain column, [N, k] or [N, a, b] as lists of one length."""
    import pyarrow

    flat = pyarrow.array(values.reshape(-1))
    return flat if values.ndim == 1 else pyarrow.FixedSizeListArray.from_arrays(flat, int(np.prod(values.shape[1:])))


def ragged(values: np.ndarray, counts: np.ndarray) -> Any:
    """Lists of ``counts`` values, one after another."""
    import pyarrow

    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(values))


def _by_expert(values: np.ndarray) -> np.ndarray:
    """[2, V, N] -> [N, 2, V]."""
    return np.moveaxis(values, -1, 0)
