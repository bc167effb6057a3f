"""The gates of one router side, as the expert layers and the auxiliary losses see them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

from torch import Tensor


class ActivePairs(NamedTuple):
    """The (token, half-expert) pairs of one side whose gate is not 0 in at least one head, in no particular order."""

    token: Tensor  # int64 [pairs]
    half_expert: Tensor  # int64 [pairs]
    values: Tensor  # [pairs, H], differentiable: the gates of the pair, 0 in heads that leave it out


class Gates(Protocol):
    """Gates [T, H, E] of one side of a router, dense or compact; every method but ``active`` is differentiable."""

    def dense(self) -> Tensor:
        """All gates, [T, H, E]."""
        ...

    def active_pairs(self) -> ActivePairs:
        """The gates that are not 0: about k per token and head, of E."""
        ...

    def total(self) -> Tensor:
        """Sum over the tokens, [H, E]: the numerator of the mean gate of the uniformity loss."""
        ...

    def largest_total(self) -> Tensor:
        """Sum over the tokens of the largest gate of each head, [H]: for the ambiguity loss."""
        ...

    def active(self) -> Tensor:
        """Number of (token, half-expert) pairs that are active in at least one head, an int64 scalar."""
        ...

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same gates with ``function`` applied to the tensor that carries the values and their gradient."""
        ...


@dataclass(frozen=True)
class DenseGates:
    """Gates as one dense tensor: what the plain definition works on."""

    values: Tensor  # [T, H, E]

    def dense(self) -> Tensor:
        return self.values

    def active_pairs(self) -> ActivePairs:
        token, half_expert = (self.values != 0).any(1).nonzero().unbind(1)
        return ActivePairs(token, half_expert, self.values[token, :, half_expert])

    def total(self) -> Tensor:
        return self.values.sum(0)

    def largest_total(self) -> Tensor:
        return self.values.amax(-1).sum(0)

    def active(self) -> Tensor:
        return (self.values != 0).any(1).sum()

    def map(self, function: Callable[[Tensor], Tensor]) -> DenseGates:
        return DenseGates(function(self.values))
