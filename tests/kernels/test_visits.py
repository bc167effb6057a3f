"""Visits of active experts: the native operation against the definition, the definition against dense scores."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from monet_train.kernels import DenseGates, Gates, Kernels, compact, extension
from monet_train.kernels.visits import BEFORE, CONTEXT, SLOTS, SLOTS_STRONG, ExpertReader, Tally, visit
from monet_train.model.config import MonetConfig
from monet_train.model.experts import DECOMPOSITIONS, Experts
from monet_train.parallel.collectives import ALONE
from tests.kernels.conftest import normal_threshold

WIDTH, EXPERTS, HEADS, ACTIVE, LENGTH = 8, 6, 2, 2, 40
PLAIN = Kernels("plain")


def layers(decomposition: str) -> list[Experts]:
    """Two layers that share a router."""
    config = MonetConfig(
        vocab_size=16, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, moe_experts=EXPERTS,
        moe_heads=HEADS, moe_dim=4, moe_topk=ACTIVE, moe_groups=2, moe_decompose=decomposition,
    )  # fmt: skip
    made = [DECOMPOSITIONS[decomposition](config, ALONE) for _ in range(2)]
    for layer in made:
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, 0, 0.5)
    return made


class Unit:
    """Gates of a unit, what its layers read, and a hash per token; hashes and scores have ties."""

    def __init__(self, seed: int, number: int, experts: int = EXPERTS, length: int = LENGTH) -> None:
        torch.manual_seed(seed)
        threshold = normal_threshold(HEADS, experts, ACTIVE).float()
        logits = torch.randint(-4, 5, (2, length, HEADS, experts)) / 3.0
        self.gates = [DenseGates(Kernels("plain").route(z, threshold).dense()) for z in logits]
        self.logits, self.threshold, self.number, self.length = logits, threshold, number, length
        self.inputs = [torch.randn(length, WIDTH) for _ in range(2)]
        self.hashes = torch.randint(-5, 5, (length,))

    def compact(self) -> list[compact.CompactGates]:
        return [compact.route(z, self.threshold) for z in self.logits]

    def visit(
        self, tally: Tally, kernels: Kernels, readers: list[ExpertReader], gates: list[Gates] | None = None,
        tokens: int | None = None,
    ) -> None:  # fmt: skip
        g1, g2 = gates or self.gates
        inputs = self.inputs if readers else []
        visit(tally, g1, g2, tokens or self.length, self.hashes, self.number, inputs, readers, kernels)

    def scores(self) -> Tensor:
        """[T, E, E]."""
        return torch.einsum("thi,thj->tij", *(g.dense().double() for g in self.gates))


@pytest.fixture(params=["plain", "native"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "native" and (reason := extension.missing()):
        pytest.skip(f"native kernels: {reason}")
    return Kernels(request.param)


@pytest.fixture(params=list(DECOMPOSITIONS))
def decomposition(request: pytest.FixtureRequest) -> str:
    return request.param


def contexts(tally: Tally, part: slice) -> list[list[tuple[float, ...]]]:
    """The contexts of each expert as a sorted list, whatever slots they are in."""
    columns = [tally.place, tally.hash, tally.score, tally.contribution, tally.scores.double().sum(-1)]
    rows = torch.stack([column[:, part].double() for column in columns], -1).tolist()
    return [sorted(tuple(context) for context in expert if context[0] >= 0) for expert in rows]


def assert_same(found: Tally, expected: Tally) -> None:
    for exact in ("count", "histogram"):
        assert torch.equal(getattr(found, exact), getattr(expected, exact)), exact
    torch.testing.assert_close(found.total, expected.total, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(found.square, expected.square, rtol=1e-7, atol=1e-12)
    for part in (slice(0, SLOTS_STRONG), slice(SLOTS_STRONG, SLOTS)):
        for ours, theirs in zip(contexts(found, part), contexts(expected, part), strict=True):
            assert [context[:2] for context in ours] == [context[:2] for context in theirs]
            torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dense", [False, True], ids=["compact", "dense"])
def test_native_is_plain(decomposition: str, dense: bool) -> None:
    readers = [layer.reader() for layer in layers(decomposition)]
    found, expected = Tally.empty(EXPERTS), Tally.empty(EXPERTS)
    for number in range(6):
        unit = Unit(number, number)
        unit.visit(found, Kernels("native"), readers, None if dense else list(unit.compact()))
        unit.visit(expected, PLAIN, readers)
    assert (expected.place >= 0).all(1).any(), "no expert has filled its slots: nothing was displaced"
    assert_same(found, expected)


@pytest.mark.usefixtures("native")
def test_blocks_of_tokens() -> None:
    """A unit of more than one block of the layout, 512 tokens."""
    unit, found, expected = Unit(0, 2, length=600), Tally.empty(EXPERTS), Tally.empty(EXPERTS)
    for gates in (list(unit.compact()), None):
        found = Tally.empty(EXPERTS)
        unit.visit(found, Kernels("native"), [], gates)
        if gates:
            unit.visit(expected, PLAIN, [])
        assert_same(found, expected)


def test_sums_are_those_of_dense_scores(kernels: Kernels) -> None:
    unit, tally = Unit(3, 0), Tally.empty(EXPERTS, contexts=False)
    unit.visit(tally, kernels, [])
    scores = unit.scores().flatten(1)
    torch.testing.assert_close(tally.total, scores.sum(0), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(tally.square, scores.square().sum(0), rtol=1e-6, atol=1e-9)
    assert torch.equal(tally.count, (scores > 0).sum(0).int())
    for expert, bins in enumerate(tally.histogram):
        fired = scores[:, expert][scores[:, expert] > 0].log2().floor().clamp(-12, 3).long() + 12
        assert torch.equal(bins, fired.bincount(minlength=16))


def test_contexts_are_the_best_of_all_firings(kernels: Kernels) -> None:
    """Against a sort of everything, with neighbours out of the dense scores."""
    tally, firings = Tally.empty(EXPERTS), [[] for _ in range(EXPERTS**2)]
    for number in range(4):
        unit = Unit(number, number)
        unit.visit(tally, kernels, [])
        g1, g2 = (g.dense() for g in unit.gates)
        score = sum(g1[:, h, :, None] * g2[:, h, None, :] for h in range(HEADS)).flatten(1)
        padded = torch.nn.functional.pad(score, (0, 0, BEFORE, CONTEXT))
        for t, expert in score.nonzero().tolist():
            place, token_hash = number * 65536 + t, int(unit.hashes[t]) % 2**64
            firings[expert].append((-float(score[t, expert]), token_hash, place, padded[t : t + CONTEXT, expert]))
    for expert, offered in enumerate(firings):
        strong = sorted(offered, key=lambda firing: firing[:3])[:SLOTS_STRONG]
        sample = sorted(offered, key=lambda firing: firing[1:3])[: SLOTS - SLOTS_STRONG]
        for part, wanted in ((slice(0, SLOTS_STRONG), strong), (slice(SLOTS_STRONG, SLOTS), sample)):
            kept = {
                place: neighbours
                for place, neighbours in zip(
                    tally.place[expert, part].tolist(), tally.scores[expert, part], strict=True
                )
                if place >= 0
            }
            assert kept.keys() == {firing[2] for firing in wanted}
            for _, _, place, neighbours in wanted:
                assert torch.equal(kept[place], neighbours.half())


def test_contribution_is_the_output_of_the_expert_alone(decomposition: str, kernels: Kernels) -> None:
    """The layers' own output with all experts but one masked is score times the expert's output."""
    made, unit, tally = layers(decomposition), Unit(5, 1), Tally.empty(EXPERTS)
    unit.visit(tally, kernels, [layer.reader() for layer in made])
    for expert, slot in (tally.place >= 0).nonzero().tolist():
        mask = torch.zeros(1, EXPERTS, EXPERTS)
        mask.view(-1)[expert] = 1
        t = int(tally.place[expert, slot]) % 65536
        g1, g2 = (DenseGates(g.dense()[t : t + 1]) for g in unit.gates)
        with torch.no_grad():
            outputs = [
                layer(x[t : t + 1], layer.routing(g1, g2, mask)) for layer, x in zip(made, unit.inputs, strict=True)
            ]
        expected = torch.cat(outputs).norm()
        torch.testing.assert_close(tally.contribution[expert, slot], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("native")
def test_threads_change_no_bit(decomposition: str, with_threads: Callable[[int], None]) -> None:
    readers, tallies = [layer.reader() for layer in layers(decomposition)], []
    for threads in (1, 2, 5):
        with_threads(threads)
        tallies.append(Tally.empty(EXPERTS))
        for number in range(4):
            Unit(number, number).visit(tallies[-1], Kernels("native"), readers)
    for other in tallies[1:]:
        assert all(map(torch.equal, tallies[0].tensors(), other.tensors()))


def test_order_of_units_changes_no_context(decomposition: str, kernels: Kernels) -> None:
    readers, kept = [layer.reader() for layer in layers(decomposition)], []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        tally = Tally.empty(EXPERTS)
        for number in order:
            Unit(number % 2, number).visit(tally, kernels, readers)  # every unit twice: ties that the place decides
        kept.append([contexts(tally, part) for part in (slice(0, SLOTS_STRONG), slice(SLOTS_STRONG, SLOTS))])
    assert kept[0] == kept[1]


def test_padding_is_not_visited(kernels: Kernels) -> None:
    unit, found, expected = Unit(1, 0), Tally.empty(EXPERTS), Tally.empty(EXPERTS)
    unit.visit(found, kernels, [], tokens=17)
    unit.gates = [DenseGates(g.dense()[:17]) for g in unit.gates]
    unit.length = 17
    unit.visit(expected, kernels, [])
    assert_same(found, expected)


def test_sides_without_pairs(kernels: Kernels) -> None:
    tally = Tally.empty(EXPERTS)
    for length in (0, 3):
        nothing = DenseGates(torch.zeros(length, HEADS, EXPERTS))
        visit(tally, nothing, nothing, length, torch.zeros(length, dtype=torch.int64), 0, [], [], kernels)
    assert all(map(torch.equal, tally.tensors(), Tally.empty(EXPERTS).tensors()))
