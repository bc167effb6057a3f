"""Monet's expert layers: E x E experts composed from two sets of E half-experts (paper section 3.3).

Expert (i, j) is a two-layer perceptron whose halves are half-expert i of the first set and j of the second. The
output of a layer is Σ_h Σ_ij M_hij g1_hi g2_hj E_ij(x), M = 1 unless experts are masked. It is rearranged so that no
tensor has E x E entries per token: the rearranged sums are the functions of :mod:`monet_train.kernels.plain`.

How experts are composed from their halves is a decomposition: a subclass of :class:`Experts`, named in
:data:`DECOMPOSITIONS`. All other code asks the class and does not distinguish decompositions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from monet_train import kernels
from monet_train.errors import UserError
from monet_train.kernels import Gates
from monet_train.kernels.visits import ExpertReader
from monet_train.parallel.collectives import Collectives
from monet_train.parallel.splits import Split

if TYPE_CHECKING:  # the configuration asks these classes whether its sizes fit
    from monet_train.model.config import MonetConfig

UNITS = Split(0, by_expert=True)  # rows of u, by hidden unit
OUTPUTS = Split(1, by_expert=True)  # columns of v, by hidden unit


@dataclass(frozen=True)
class Routing:
    """What the layers of a routing group share: which experts take part for each token, and with which weight."""

    g1: Gates  # gates where they meet the inner dimension
    g2: Gates
    mask: Tensor | None  # factors M of the experts, [1 or H, E, E]
    r1: Gates  # weights of the output biases, r1_i = Σ_hj M_hij g1_hi g2_hj
    r2: Gates


@dataclass(frozen=True)
class ExpertFlops:
    """Dense forward FLOPs of an expert layer for one token. A multiply-add counts 2.

    Every part is a pair: what is done for the half-experts of side 1 and of side 2. A kernel that visits active
    half-experts only does their share of it.
    """

    up: tuple[float, float]  # x to the hidden units
    mixing: tuple[float, float]  # hidden units with gates
    down: tuple[float, float]  # and back
    bias: tuple[float, float]  # of the output: gates with a row for each half-expert


class Experts(nn.Module, ABC):
    """An expert layer in one decomposition, and all that other code has to know about it.

    Gates mix over half-experts at a fixed inner unit, so a slice of the inner units gives an exact partial sum. Each
    tensor-parallel rank has a slice; ``collectives.leave`` adds the partial sums. The output biases do not pass
    through the inner units and are added once, outside.
    """

    biases: ClassVar[tuple[str, ...]]  # names of the output biases, [E, width]: whole on every rank
    splits: ClassVar[Mapping[str, Split]]  # of every parameter that tensor-parallel ranks share, by its name
    units_key: ClassVar[str]  # the units of a half-expert in terms of the configuration, for messages: "moe_dim/2"

    def __init__(self, config: MonetConfig, collectives: Collectives) -> None:
        super().__init__()
        self.enter, self.leave = collectives.enter, collectives.leave
        self.inner = config.moe_experts * collectives.share(self.units(config))  # units of one side that are here

    @classmethod
    @abstractmethod
    def units(cls, config: MonetConfig) -> int:
        """Inner units of a half-expert: what a tensor-parallel size must divide."""

    @classmethod
    @abstractmethod
    def flops(cls, config: MonetConfig) -> ExpertFlops:
        """The work of a layer."""

    @classmethod
    def check(cls, config: MonetConfig) -> None:
        """Refuse sizes that this decomposition cannot have. Raises :class:`UserError` naming the key."""

    @abstractmethod
    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """[T, d] -> [T, d]."""

    def routing(self, g1: Gates, g2: Gates, mask: Tensor | None) -> Routing:
        """Gates and mask as the layers of a routing group take them. Made once: the group's layers enter alike."""
        r1, r2 = kernels.expert_weights(g1, g2, mask)
        return Routing(g1.map(self.enter), g2.map(self.enter), mask, r1, r2)

    def reader(self) -> ExpertReader | None:
        """What tells the norm of single experts' outputs, on the CPU: a copy, for a layer with all its inner units.

        None where the norm is not a sum of a part of half-expert i and one of half-expert j.
        """
        return None

    def store_for_decoding(self) -> None:
        """Lay the output weights out by half-expert: same shapes and values, much faster for one token at a time."""
        for name, split in self.splits.items():
            if split == OUTPUTS:
                weight = self.get_parameter(name)
                weight.data = kernels.store_by_columns(weight.data)


class VerticalExperts(Experts):
    """Vertical decomposition: a half-expert owns half of an expert's inner units and half of its output.

    E_ij(x) = [v11_i a_i + v12_i c_j + b1_i,  v21_j a_i + v22_j c_j + b2_j],  a_i = relu²(u1_i x), c_j = relu²(u2_j x).
    """

    biases = ("b1", "b2")
    splits: ClassVar = {
        **dict.fromkeys(("u1.weight", "u1.bias", "u2.weight", "u2.bias"), UNITS),
        **dict.fromkeys(("v11.weight", "v12.weight", "v21.weight", "v22.weight"), OUTPUTS),
    }
    units_key = "moe_dim/2"

    def __init__(self, config: MonetConfig, collectives: Collectives) -> None:
        super().__init__(config, collectives)
        d, inner = config.hidden_size, self.inner
        self.u1 = nn.Linear(d, inner)
        self.u2 = nn.Linear(d, inner)
        self.v11 = nn.Linear(inner, d // 2, bias=False)
        self.v12 = nn.Linear(inner, d // 2, bias=False)
        self.v21 = nn.Linear(inner, d // 2, bias=False)
        self.v22 = nn.Linear(inner, d // 2, bias=False)
        self.b1 = nn.Parameter(torch.zeros(config.moe_experts, d // 2))
        self.b2 = nn.Parameter(torch.zeros(config.moe_experts, d // 2))

    @classmethod
    def units(cls, config: MonetConfig) -> int:
        return config.moe_dim // 2

    @classmethod
    def flops(cls, config: MonetConfig) -> ExpertFlops:
        d, inner = config.hidden_size, config.moe_experts * config.moe_dim // 2  # of one side
        mixing = 2 * 2 * config.moe_heads * inner  # the units of one side into the heads, and from them to the other
        return ExpertFlops(
            up=(2 * d * inner, 2 * d * inner),
            mixing=(mixing, mixing),
            down=(2 * d * inner, 2 * d * inner),
            bias=(d * config.moe_experts, d * config.moe_experts),
        )

    @classmethod
    def check(cls, config: MonetConfig) -> None:
        if config.moe_dim % 2 or config.hidden_size % 2:
            raise UserError(
                f"model.moe_dim={config.moe_dim} and model.hidden_size={config.hidden_size} must be even "
                "for model.moe_decompose=vertical; make them even or choose horizontal"
            )

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        mixed = kernels.vertical_experts(
            self.enter(x), routing.g1, routing.g2, routing.mask,
            self.u1.weight, self.u1.bias, self.u2.weight, self.u2.bias,
            self.v11.weight, self.v12.weight, self.v21.weight, self.v22.weight,
        )  # fmt: skip
        bias = torch.cat([kernels.expert_bias(routing.r1, self.b1), kernels.expert_bias(routing.r2, self.b2)], -1)
        return self.leave(mixed) + bias

    def reader(self) -> ExpertReader:
        experts = len(self.b1)
        left = [*(_columns(v, experts) for v in (self.v11, self.v12)), _wide(self.b1).unsqueeze(-1)]
        right = [*(_columns(v, experts) for v in (self.v21, self.v22)), _wide(self.b2).unsqueeze(-1)]
        return ExpertReader(*_units(self.u1, experts), *_units(self.u2, experts), _gram(left), _gram(right))


class HorizontalExperts(Experts):
    """Horizontal decomposition: the first set holds the input layers, the second the output layers.

    E_ij(x) = v_j a_i + b_j,  a_i = relu²(u_i x).
    """

    biases = ("b",)
    splits: ClassVar = {"u.weight": UNITS, "u.bias": UNITS, "v.weight": OUTPUTS}
    units_key = "moe_dim"

    def __init__(self, config: MonetConfig, collectives: Collectives) -> None:
        super().__init__(config, collectives)
        d, inner = config.hidden_size, self.inner
        self.u = nn.Linear(d, inner)
        self.v = nn.Linear(inner, d, bias=False)
        self.b = nn.Parameter(torch.zeros(config.moe_experts, d))

    @classmethod
    def units(cls, config: MonetConfig) -> int:
        return config.moe_dim

    @classmethod
    def flops(cls, config: MonetConfig) -> ExpertFlops:
        d, inner = config.hidden_size, config.moe_experts * config.moe_dim
        mixing = 2 * config.moe_heads * inner  # side 1 into the heads, and from them to side 2
        return ExpertFlops(
            up=(2 * d * inner, 0),
            mixing=(mixing, mixing),
            down=(0, 2 * d * inner),
            bias=(0, 2 * d * config.moe_experts),
        )

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        mixed = kernels.horizontal_experts(
            self.enter(x), routing.g1, routing.g2, routing.mask, self.u.weight, self.u.bias, self.v.weight
        )
        return self.leave(mixed) + kernels.expert_bias(routing.r2, self.b)

    def reader(self) -> ExpertReader:
        experts, d = self.b.shape
        u1, c1 = _units(self.u, experts)
        u2, c2 = u1.new_empty((experts, 0, d)), c1.new_empty((experts, 0))  # side 2 has no inner units
        gram2 = _gram([_columns(self.v, experts), _wide(self.b).unsqueeze(-1)])
        return ExpertReader(u1, c1, u2, c2, torch.zeros_like(gram2), gram2)


def _wide(weight: Tensor) -> Tensor:
    """A copy on the CPU in fp64."""
    return weight.detach().to("cpu", torch.float64)


def _units(u: nn.Linear, experts: int) -> tuple[Tensor, Tensor]:
    """Input weights and biases by half-expert, fp32: [E, n, d], [E, n]."""
    weight, bias = _wide(u.weight).float(), _wide(u.bias).float()
    return weight.unflatten(0, (experts, -1)), bias.unflatten(0, (experts, -1))


def _columns(v: nn.Linear, experts: int) -> Tensor:
    """Output weights by half-expert, [E, width, n]."""
    return _wide(v.weight).unflatten(1, (experts, -1)).transpose(0, 1)


def _gram(columns: list[Tensor]) -> Tensor:
    """The products of the columns with each other, by half-expert, fp32 [E, n, n]."""
    stacked = torch.cat(columns, -1)
    return (stacked.mT @ stacked).float().contiguous()


DECOMPOSITIONS: dict[str, type[Experts]] = {"vertical": VerticalExperts, "horizontal": HorizontalExperts}


def decomposition(name: str) -> type[Experts]:
    """The class of a decomposition. Raises :class:`UserError` naming the existing ones."""
    if name not in DECOMPOSITIONS:
        raise UserError(f"model.moe_decompose={name!r} is unknown; use one of {', '.join(DECOMPOSITIONS)}")
    return DECOMPOSITIONS[name]
