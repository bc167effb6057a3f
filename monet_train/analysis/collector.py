"""One pass of the model over documents, for all experts of the chosen routing groups."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from monet_train.analysis.plan import Plan
from monet_train.analysis.sums import Scales, Sums
from monet_train.kernels.gates import ActivePairs, Gates
from monet_train.kernels.visits import UNIT_PLACES, ExpertReader, Tally, visit
from monet_train.model.transformer import MonetForCausalLM, MonetLayer

COACTIVE_TOKENS = 4096  # about so many tokens are kept with all their experts
COACTIVE_EXPERTS = 64  # of a token, the strongest


@dataclass
class Coactive:
    """The experts of sampled tokens, one entry per expert."""

    place: list[np.ndarray] = field(default_factory=list)  # int64
    expert: list[np.ndarray] = field(default_factory=list)  # int32, flat
    score: list[np.ndarray] = field(default_factory=list)  # fp32

    def arrays(self) -> dict[str, np.ndarray]:
        """Joined."""
        kinds = {"place": np.int64, "expert": np.int32, "score": np.float32}
        return {name: np.concatenate([*getattr(self, name), np.empty(0, kind)]) for name, kind in kinds.items()}


class GroupCollector:
    """What is collected of one routing group."""

    def __init__(self, model: MonetForCausalLM, group: int, plan: Plan) -> None:
        self.experts, heads = model.config.moe_experts, model.config.moe_heads
        self.layers = model.model.groups()[group]
        cells, numeric = plan.schema.cells, len(plan.schema.numeric)
        scales = Scales.of_plan(plan, heads)
        self.tally = Tally.empty(self.experts)
        self.readers = _readers(self.layers)
        self.pairs = Sums(self.experts**2, cells, numeric, scales)
        self.halves = Sums(2 * self.experts, cells, numeric, scales)
        self.coactive = Coactive()
        # of the document, by half-expert: scores, their squares, firings
        self._half_sums = torch.zeros(3, 2 * self.experts, dtype=torch.float64)

    def visit(self, g1: Gates, g2: Gates, hashes: np.ndarray, unit: int, inputs: list[Tensor], sampled: Tensor) -> None:
        """Add a unit of the current document. ``sampled``: tokens that are kept with all their experts."""
        tokens = len(hashes)
        visit(self.tally, g1, g2, tokens, torch.from_numpy(hashes.view(np.int64)), unit, inputs, self.readers)
        sides = [ActivePairs(*(part.cpu() for part in gates.active_pairs())) for gates in (g1, g2)]
        for side, pairs in enumerate(sides):
            score = pairs.values.double().sum(1)
            index = pairs.half_expert + side * self.experts
            for row, values in zip(self._half_sums, (score, score * score, (score > 0).double()), strict=True):
                row.index_add_(0, index, values)
        for token in sampled.tolist():
            self._keep_coactive(sides, token, unit * UNIT_PLACES + token)

    def _keep_coactive(self, sides: list[ActivePairs], token: int, place: int) -> None:
        (values1, half1), (values2, half2) = (
            (pairs.values[pairs.token == token], pairs.half_expert[pairs.token == token]) for pairs in sides
        )
        score = (values1.double() @ values2.double().T).flatten().numpy()
        flat = (half1[:, None] * self.experts + half2).flatten().numpy()
        order = np.lexsort((flat, -score))[:COACTIVE_EXPERTS]
        order = order[score[order] > 0]
        self.coactive.place.append(np.full(len(order), place, np.int64))
        self.coactive.expert.append(flat[order].astype(np.int32))
        self.coactive.score.append(score[order].astype(np.float32))

    def end_document(self, tokens: int, half: int, cells: list[int], values: np.ndarray) -> None:
        """Add the sums of the current document and begin another."""
        t = self.tally
        self.pairs.add_document(t.total, t.square, t.count, tokens, half, cells, values)
        total, square, count = self._half_sums
        self.halves.add_document(total, square, count.int(), tokens, half, cells, values)
        for used in (t.total, t.square, t.count, self._half_sums):
            used.zero_()

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything that was collected so far, by name."""
        found = {f"pairs.{name}": a.numpy() for name, a in self.pairs.arrays().items()}
        found |= {f"halves.{name}": a.numpy() for name, a in self.halves.arrays().items()}
        found |= {f"coactive.{name}": a for name, a in self.coactive.arrays().items()}
        names = ("histogram", "score", "hash", "place", "contribution", "scores")
        return found | {f"tally.{name}": getattr(self.tally, name).numpy() for name in names}


class Collector:
    """Runs the model over documents and adds up what its experts do.

    Args:
        model: in evaluation mode, on its device.
        groups: routing groups that are collected.
    """

    def __init__(self, model: MonetForCausalLM, plan: Plan, groups: list[int]) -> None:
        self.model, self.plan = model, plan
        self.groups = {group: GroupCollector(model, group, plan) for group in groups}
        self._threshold = np.uint64(min(1.0, COACTIVE_TOKENS / max(1, plan.tokens)) * (2**64 - 1))
        self._inputs: dict[int, list[Tensor]] = {}

    @torch.inference_mode()
    def add(self, document: int) -> None:
        """Read one document of the plan."""
        plan = self.plan
        tokens = plan.read(document)
        with self._recorded():
            for unit, begin, end in plan.units(document):
                self._add_unit(tokens[begin:end], plan.token_hashes(document, begin, end), unit)
        cells = [int(cell) for cell in plan.documents.cell[:, document] if cell >= 0]
        for group in self.groups.values():
            group.end_document(len(tokens), int(plan.half[document]), cells, plan.documents.value[:, document])

    def _add_unit(self, tokens: np.ndarray, hashes: np.ndarray, unit: int) -> None:
        ids = torch.from_numpy(tokens)[None].to(self.model.device)
        for inputs in self._inputs.values():
            inputs.clear()
        gates = self.model(ids, output_gates=True, keep_logits=False).gates
        sampled = torch.from_numpy(np.flatnonzero(hashes < self._threshold))
        for number, group in self.groups.items():
            g1, g2 = gates[number]
            group.visit(g1, g2, hashes, unit, self._inputs[number], sampled)

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """The tokens that go into the expert layers of the groups that have readers."""

        def keep(into: list[Tensor], module: Any, arguments: tuple[Tensor, ...]) -> None:
            into.append(arguments[0])

        with ExitStack() as hooks:
            for number, group in self.groups.items():
                inputs = self._inputs.setdefault(number, [])
                for layer in group.layers if group.readers else ():
                    hooks.callback(layer.moe.register_forward_pre_hook(partial(keep, inputs)).remove)
            yield


def _readers(layers: list[MonetLayer]) -> list[ExpertReader]:
    """Of every layer of a routing group; none where the decomposition has no reader."""
    readers = [layer.moe.reader() for layer in layers]
    return [reader for reader in readers if reader is not None]
