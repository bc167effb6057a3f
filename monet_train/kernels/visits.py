"""Visiting the active experts of a unit: sums over their scores, and the contexts in which they fire.

A unit is a window of one document. The score of expert (i, j) for a token is s = Σ_h g1_hi g2_hj; it fires where
s > 0. :func:`visit` adds the scores of a unit to a :class:`Tally`, over the pairs of half-experts that are both active
for a token: about 900 of 65,536 experts in ``nano``. It runs on the CPU, wherever the gates come from.

:func:`visit_plain` is the definition; ``csrc/cpu/visits.cpp`` is held against it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from monet_train.kernels.backend import AUTO, Kernels
from monet_train.kernels.compact import CompactGates, Layout
from monet_train.kernels.fake import BLOCK_TOKENS
from monet_train.kernels.gates import Gates

SLOTS_STRONG, SLOTS_SAMPLE = 20, 25  # contexts per expert: the strongest, and a sample by hash
SLOTS = SLOTS_STRONG + SLOTS_SAMPLE
CONTEXT, BEFORE = 32, 24  # scores kept around a firing, and how many of them lie before it
HISTOGRAM_BINS, LOWEST_POWER = 16, -12  # bin floor(log2 s) + 12; the first and the last also take what lies beyond
UNIT_PLACES = 65536  # a place is unit * 65536 + position


@dataclass(frozen=True)
class Tally:
    """What visits have found out about the experts of one routing group; CPU tensors, changed in place.

    E2 = experts**2 rows, by i * experts + j. Slots 0..19 hold the strongest firings, 20..44 those of the smallest
    token hash; neither are in any order. The caller takes the sums out and zeroes them where a document ends.

    The bars only save time: a firing that does not reach them is not compared with the slots. Who changes slots
    otherwise than by a visit resets them to -1.
    """

    total: Tensor  # fp64 [E2]: sum of scores
    square: Tensor  # fp64 [E2]: sum of their squares
    count: Tensor  # int32 [E2]: firings
    histogram: Tensor  # int64 [E2, 16]: firings by floor(log2 s), from -12 to 3
    score: Tensor  # fp32 [E2, 45], or [E2, 0] without contexts
    hash: Tensor  # int64 [E2, 45]: bits of a uint64
    place: Tensor  # int64 [E2, 45]: unit * 65536 + position; -1: the slot is empty
    contribution: Tensor  # fp32 [E2, 45]: score times the norm of the expert's output, over the layers of the group
    scores: Tensor  # fp16 [E2, 45, 32]: at position-24 .. position+7; 0 outside the unit
    strong_bar: Tensor  # fp32 [E2]: no more than the least score in the strong slots; -1 while one is empty
    sample_bar: Tensor  # int64 [E2], bits of a uint64: no less than the greatest hash in the sample

    @classmethod
    def empty(cls, experts: int, contexts: bool = True) -> Tally:
        """Nothing visited yet. Without contexts there are no slots, and visits add sums alone."""
        rows, slots = experts**2, SLOTS if contexts else 0
        return cls(
            total=torch.zeros(rows, dtype=torch.float64),
            square=torch.zeros(rows, dtype=torch.float64),
            count=torch.zeros(rows, dtype=torch.int32),
            histogram=torch.zeros(rows, HISTOGRAM_BINS, dtype=torch.int64),
            score=torch.zeros(rows, slots),
            hash=torch.zeros(rows, slots, dtype=torch.int64),
            place=torch.full((rows, slots), -1, dtype=torch.int64),
            contribution=torch.zeros(rows, slots),
            scores=torch.zeros(rows, slots, CONTEXT, dtype=torch.float16),
            strong_bar=torch.full((rows,), -1.0),
            sample_bar=torch.full((rows,), -1, dtype=torch.int64),
        )

    def tensors(self) -> list[Tensor]:
        """The fields, in the order that the native operation expects."""
        return list(vars(self).values())


@dataclass(frozen=True)
class ExpertReader:
    """What tells the norm of an expert's output in one layer, of any decomposition; fp32, contiguous, on the CPU.

    With a = relu²(u1_i x + c1_i), c = relu²(u2_j x + c2_j) and z = (a, c, 1), the squared norm of the output of expert
    (i, j) is zᵀ gram1_i z + zᵀ gram2_j z. Made by ``Experts.reader``.
    """

    u1: Tensor  # [E, n1, d]
    c1: Tensor  # [E, n1]
    u2: Tensor  # [E, n2, d]; n2 is 0 where side 2 has no inner units
    c2: Tensor  # [E, n2]
    gram1: Tensor  # [E, n1+n2+1, n1+n2+1]
    gram2: Tensor  # [E, n1+n2+1, n1+n2+1]

    def tensors(self) -> list[Tensor]:
        """The fields, in the order that the native operation expects."""
        return list(vars(self).values())


def visit(
    tally: Tally, g1: Gates, g2: Gates, tokens: int, hashes: Tensor, unit: int,
    inputs: list[Tensor], readers: list[ExpertReader], kernels: Kernels = AUTO,
) -> None:  # fmt: skip
    """Add the first ``tokens`` tokens of a unit to ``tally``.

    Every firing is offered to the strong slots, which keep the greatest scores (ties: the smaller hash as uint64, then
    the smaller place), and to the sample slots, which keep the smallest hashes (ties: the smaller place). Sums are
    those of the unit in the order of its tokens, and the contexts kept do not depend on the order of units.

    Args:
        g1, g2: gates of the unit, [T, H, E]; what lies behind ``tokens`` is padding.
        hashes: int64 [tokens], bits of a uint64 for each token. unit: the number of the unit, each visited once.
        inputs, readers: of each layer of the routing group, what its experts read (fp32 [T, d]) and its reader.
            Without them contributions are 0.
        kernels: the choice between the native operation and :func:`visit_plain`.
    """
    side1, side2 = _compact(g1), _compact(g2)
    inputs = [x.detach().to("cpu", torch.float32).contiguous() for x in inputs]
    if kernels.is_native(torch.device("cpu")):
        torch.ops.monet.visit_experts(
            side1.values, side1.layout.tensors(), side2.values, side2.layout.tensors(), side1.layout.experts,
            tokens, hashes, unit, inputs, [part for reader in readers for part in reader.tensors()], tally.tensors(),
        )  # fmt: skip
    else:
        visit_plain(tally, side1, side2, tokens, hashes, unit, inputs, readers)


def visit_plain(
    tally: Tally, g1: CompactGates, g2: CompactGates, tokens: int, hashes: Tensor, unit: int,
    inputs: list[Tensor], readers: list[ExpertReader],
) -> None:  # fmt: skip
    """The definition of :func:`visit`: token by token for the sums, firing by firing for the contexts."""
    rows1, rows2 = _rows(g1, tokens), _rows(g2, tokens)
    scores = [_scores(*rows1[t], *rows2[t], g1.layout.experts) for t in range(tokens)]
    for firing in scores:
        _add_sums(tally, firing)
    if not tally.score.shape[1]:
        return
    for position, firing in enumerate(scores):
        for expert in firing:
            context = _Context(scores, expert, position, unit, int(hashes[position]))
            for first, end, is_strong in ((0, SLOTS_STRONG, True), (SLOTS_STRONG, SLOTS, False)):
                slot = _worst(tally, expert, first, end, is_strong)
                if _is_better(context.key(is_strong), _key(tally, expert, slot, is_strong)):
                    context.write(tally, slot, _output_norm(expert, g1.layout.experts, position, inputs, readers))


Firing = dict[int, np.float32]  # the scores of a token that are not 0, by expert


def _rows(gates: CompactGates, tokens: int) -> list[tuple[list[int], NDArray[np.float32]]]:
    """The active half-experts of each token, and their gates [half-experts, H]."""
    layout = gates.layout
    half_expert, values = layout.half_expert(), gates.values.numpy()
    entries = [layout.row_pair[layout.row_start[t] : layout.row_start[t + 1]].long() for t in range(tokens)]
    return [(half_expert[pairs].tolist(), values[pairs.numpy()]) for pairs in entries]


def _scores(
    half1: list[int], gates1: NDArray[np.float32], half2: list[int], gates2: NDArray[np.float32], experts: int
) -> Firing:
    """Σ_h g1_hi g2_hj of a token: fp32, added in the order of the heads."""
    score = np.zeros((len(half1), len(half2)), np.float32)
    for h in range(gates1.shape[1]):
        score += gates1[:, None, h] * gates2[None, :, h]
    return {
        i * experts + j: s
        for i, row in zip(half1, score, strict=True)
        for j, s in zip(half2, row, strict=True)
        if s > 0
    }


def _add_sums(tally: Tally, firing: Firing) -> None:
    expert = torch.tensor(list(firing), dtype=torch.int64)
    score = torch.tensor(np.array(list(firing.values())), dtype=torch.float64)
    power = torch.frexp(score).exponent.long() - 1
    tally.total[expert] += score
    tally.square[expert] += score.square()
    tally.count[expert] += 1
    tally.histogram[expert, (power - LOWEST_POWER).clamp(0, HISTOGRAM_BINS - 1)] += 1


# What a context is compared by, the better one first: (-score, hash, place), or (hash, place) for the sample.
Key = tuple[float, ...]
_EMPTY: Key = (float("inf"),)  # worse than every firing


def _unsigned(bits: int) -> int:
    return bits % 2**64


def _key(tally: Tally, expert: int, slot: int, is_strong: bool) -> Key:
    place = int(tally.place[expert, slot])
    if place < 0:
        return _EMPTY
    by_hash = (_unsigned(int(tally.hash[expert, slot])), place)
    return (-float(tally.score[expert, slot]), *by_hash) if is_strong else by_hash


def _worst(tally: Tally, expert: int, first: int, end: int, is_strong: bool) -> int:
    return max(range(first, end), key=lambda slot: _key(tally, expert, slot, is_strong))


def _is_better(key: Key, than: Key) -> bool:
    return key < than


@dataclass(frozen=True)
class _Context:
    """A firing of an expert and what surrounds it."""

    firings: list[Firing]  # of the unit
    expert: int
    position: int
    unit: int
    hash: int

    @property
    def score(self) -> float:
        return float(self.firings[self.position][self.expert])

    @property
    def place(self) -> int:
        return self.unit * UNIT_PLACES + self.position

    def key(self, is_strong: bool) -> Key:
        by_hash = (_unsigned(self.hash), self.place)
        return (-self.score, *by_hash) if is_strong else by_hash

    def neighbours(self) -> list[float]:
        around = range(self.position - BEFORE, self.position - BEFORE + CONTEXT)
        inside = range(len(self.firings))
        return [float(self.firings[t].get(self.expert, 0.0)) if t in inside else 0.0 for t in around]

    def write(self, tally: Tally, slot: int, output_norm: float) -> None:
        at = self.expert, slot
        tally.score[at] = self.score
        tally.hash[at] = self.hash
        tally.place[at] = self.place
        tally.contribution[at] = self.score * output_norm
        tally.scores[at] = torch.tensor(self.neighbours()).half()


def _output_norm(expert: int, experts: int, position: int, inputs: list[Tensor], readers: list[ExpertReader]) -> float:
    """The norm of an expert's output for a token, over the layers of the group."""
    i, j = divmod(expert, experts)
    square = 0.0
    for x, reader in zip(inputs, readers, strict=True):
        a = (reader.u1[i] @ x[position] + reader.c1[i]).relu().square()
        c = (reader.u2[j] @ x[position] + reader.c2[j]).relu().square()
        z = torch.cat([a, c, torch.ones(1)]).double()
        square += float(z @ (reader.gram1[i].double() + reader.gram2[j].double()) @ z)
    return max(square, 0.0) ** 0.5  # rounding can leave a square just below 0


def _compact(gates: Gates) -> CompactGates:
    """The gates on the CPU, in fp32, over a layout."""
    if isinstance(gates, CompactGates):
        layout = gates.layout
        token, group_start, row_start, row_pair = (index.cpu() for index in layout.tensors())
        on_cpu = Layout(token, group_start, row_start, row_pair, layout.experts)
        return CompactGates(gates.values.detach().to("cpu", torch.float32).contiguous(), on_cpu)
    tokens, _, experts = gates.dense().shape
    token, half_expert, values = gates.active_pairs()
    blocks = (tokens + BLOCK_TOKENS - 1) // BLOCK_TOKENS
    group = token // BLOCK_TOKENS * experts + half_expert
    order = torch.argsort(group * tokens + token)
    group, token, half_expert = group[order].cpu(), token[order].cpu(), half_expert[order].cpu()
    layout = Layout(
        token=token.int(),
        group_start=_starts(group, blocks * experts),
        row_start=_starts(token, tokens),
        row_pair=torch.argsort(token * experts + half_expert).int(),
        experts=experts,
    )
    return CompactGates(values[order].detach().to("cpu", torch.float32).contiguous(), layout)


def _starts(index: Tensor, count: int) -> Tensor:
    """Where the entries of each of 0..count-1 begin, once they are sorted by ``index``; int32 [count + 1]."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), index.bincount(minlength=count).cumsum(0)]).int()
