"""Sums over tokens and documents that do not depend on the order in which they are formed.

Every number is rounded once, to a multiple of a power of two that the whole collection fixes beforehand, and then
added as an integer. So any number of workers, in any order, arrives at the same bytes; and since 62 binary digits are
used, the rounding (2^-38 of a token's score, say) is far below that of fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from monet_train.analysis.plan import Plan

DIGITS = 62
FINE = 38  # further digits of sums of squares of whole documents, which differ by many orders of magnitude


@dataclass(frozen=True)
class Scales:
    """Binary digits behind the point of each kind of sum, from bounds that hold for every expert."""

    total: int  # of scores; a score is at most the number of heads
    square: int  # of squared scores
    document_square: int  # of squared sums of documents, coarse part
    document_product: int  # of sums of documents times their lengths

    @classmethod
    def of_plan(cls, plan: Plan, heads: int) -> Scales:
        """The scales of a collection."""
        lengths = plan.documents.tokens.astype(float)
        tokens, squares = float(lengths.sum()), float((lengths**2).sum())
        return cls(
            _digits(heads * tokens), _digits(heads**2 * tokens), _digits(heads**2 * squares), _digits(heads * squares)
        )


def _digits(bound: float) -> int:
    return DIGITS - max(0, math.ceil(math.log2(bound)))


class Sums:
    """All sums of one routing group over its experts (or half-experts), int64.

    ``cells`` C are those of the label schema, ``halves`` the two halves of the documents; N experts.
    """

    def __init__(self, experts: int, cells: int, numeric: int, scales: Scales) -> None:
        self.scales = scales
        self.firings = _zeros(experts)
        self.total = _zeros(experts)
        self.square = _zeros(experts)
        self.cell_firings = _zeros(cells, experts)
        self.cell_square = _zeros(cells, experts)
        self.cell_total = _zeros(2, cells, experts)  # by half of the documents, as the following
        self.cell_document_square = _zeros(2, cells, experts)
        self.cell_document_square_fine = _zeros(2, cells, experts)
        self.cell_document_product = _zeros(2, cells, experts)
        self.numeric_product = _zeros(numeric, experts)  # of the number and the score
        self.numeric_total = _zeros(numeric, experts)  # of the score, where the number is known; as the following
        self.numeric_square = _zeros(numeric, experts)

    def arrays(self) -> dict[str, Tensor]:
        """Every sum by its name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def add_document(
        self, total: Tensor, square: Tensor, count: Tensor, tokens: int, half: int, cells: list[int], values: np.ndarray
    ) -> None:
        """Add a document.

        Args:
            total, square: fp64 [N], sums of its scores and of their squares. count: int32 [N], its firings.
            cells: that it is in. values: fp64 [numeric], NaN where unknown.
        """
        of = self.scales
        rounded, rounded_square = _round(total, of.total), _round(square, of.square)
        self.firings += count
        self.total += rounded
        self.square += rounded_square
        if cells:
            of_document = total * total
            coarse = _round(of_document, of.document_square)
            rest = of_document - coarse.double() * 2.0**-of.document_square
            fine = _round(rest, of.document_square + FINE)
            product = _round(total * tokens, of.document_product)
        for cell in cells:
            self.cell_firings[cell] += count
            self.cell_square[cell] += rounded_square
            self.cell_total[half, cell] += rounded
            self.cell_document_square[half, cell] += coarse
            self.cell_document_square_fine[half, cell] += fine
            self.cell_document_product[half, cell] += product
        for number in np.flatnonzero(~np.isnan(values)):
            self.numeric_product[number] += _round(total * float(values[number]), of.total)
            self.numeric_total[number] += rounded
            self.numeric_square[number] += rounded_square

    def add(self, others: dict[str, np.ndarray], experts: slice) -> None:
        """Add the same sums of another worker, for a range of its experts: these are that range."""
        for name, mine in self.arrays().items():
            mine += torch.from_numpy(np.array(others[name][..., experts]))

    def values(self) -> dict[str, np.ndarray]:
        """Every sum as fp64, by its name; the coarse and the fine part joined."""
        digits = {
            "total": self.scales.total, "square": self.scales.square, "cell_square": self.scales.square,
            "cell_total": self.scales.total, "cell_document_product": self.scales.document_product,
            "numeric_product": self.scales.total, "numeric_total": self.scales.total,
            "numeric_square": self.scales.square, "cell_document_square": self.scales.document_square,
            "cell_document_square_fine": self.scales.document_square + FINE,
        }  # fmt: skip
        found = {name: np.ldexp(a.numpy().astype(float), -digits.get(name, 0)) for name, a in self.arrays().items()}
        found["cell_document_square"] += found.pop("cell_document_square_fine")
        return found


@dataclass(frozen=True)
class DocumentCounts:
    """What is the same for all experts: how many tokens and documents are in each cell. From the plan alone."""

    tokens: int
    cell_documents: np.ndarray  # int64 [2, C]
    cell_tokens: np.ndarray  # int64 [2, C]
    cell_token_squares: np.ndarray  # fp64 [2, C], of the tokens of documents
    numeric_tokens: np.ndarray  # int64 [numeric], where the number is known, as the following
    numeric_total: np.ndarray  # fp64 [numeric], of the number over tokens
    numeric_square: np.ndarray  # fp64 [numeric]

    @classmethod
    def of_plan(cls, plan: Plan) -> DocumentCounts:
        """Counted from the documents."""
        documents, cells = plan.documents, plan.schema.cells
        counts = np.zeros((3, 2, cells))
        for column in documents.cell:
            for half in (0, 1):
                rows = (column >= 0) & (plan.half == half)
                for number, weights in enumerate((None, documents.tokens, documents.tokens.astype(float) ** 2)):
                    kept = None if weights is None else weights[rows]
                    counts[number, half] += np.bincount(column[rows], kept, minlength=cells)[:cells]
        known = ~np.isnan(documents.value)
        y, n = np.nan_to_num(documents.value), documents.tokens
        return cls(
            tokens=plan.tokens,
            cell_documents=counts[0].astype(np.int64),
            cell_tokens=counts[1].astype(np.int64),
            cell_token_squares=counts[2],
            numeric_tokens=(known * n).sum(1),
            numeric_total=(y * n).sum(1),
            numeric_square=(y * y * n).sum(1),
        )


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def _round(values: Tensor, digits: int) -> Tensor:
    """Multiples of 2^-digits as integers."""
    return torch.round(values * 2.0**digits).long()
