"""Tables of experts: what a file of an expert set holds, and the factors by routing group that follow from it.

A table has one row per expert: group, layer, head, half-expert i of side 1, half-expert j of side 2. Layers are
numbered in the whole model. :data:`ALL` means every layer of the group, every head, or every half-expert.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from monet_train.errors import UserError
from monet_train.model.identity import ModelIdentity

ALL = -1
COLUMNS = ("group", "layer", "head", "i", "j")


def refuse_non_finite(factors: Tensor) -> None:
    """Raises :class:`UserError` for factors that would make an output NaN."""
    if not factors.isfinite().all():
        raise UserError("factor has values that are not finite; use 0 for an expert that is off")


def read_table(identity: ModelIdentity, table: Tensor, factors: Tensor) -> dict[int, Tensor]:
    """Factors by routing group.

    Args:
        table: int64 [n, 5]. factors: fp32 [n], of each row. Both on the CPU.

    Returns:
        by group: fp32 [layers of the group or 1, H or 1, E, E], NaN where not chosen.

    Raises:
        UserError: a row is not in the model, or an expert has two factors.
    """
    refuse_non_finite(factors)
    sizes = (
        len(identity.groups),
        identity.num_hidden_layers,
        identity.moe_heads,
        identity.moe_experts,
        identity.moe_experts,
    )
    for column, size in enumerate(sizes):
        wrong = table[:, column][(table[:, column] >= size) | (table[:, column] < (0 if column == 0 else ALL))]
        if len(wrong):
            raise UserError(f"{COLUMNS[column]}={wrong[0].item()} is not in the model; use one of 0 to {size - 1}")
    by_group = {}
    for group in table[:, 0].unique().tolist():
        rows = table[:, 0] == group
        layers = identity.layers(group)
        place, values = table[rows, 1:], factors[rows]
        outside = place[(place[:, 0] != ALL) & ((place[:, 0] < layers[0]) | (place[:, 0] > layers[-1])), 0]
        if len(outside):
            raise UserError(
                f"layer={outside[0].item()} is not in routing group {group}; use one of {layers[0]} to {layers[-1]}"
            )
        place[place[:, 0] != ALL, 0] -= layers[0]
        shape = [len(layers), *sizes[2:]]
        for column in range(4):
            every = place[:, column] == ALL
            if column < 2 and every.all():  # layers and heads are kept apart only where they differ
                shape[column] = 1
            place, values = _every(place, values, column, shape[column])
        found = values.new_full(shape, math.nan)
        found[tuple(place.t())] = values
        if not torch.equal(found[tuple(place.t())], values):
            raise UserError(f"an expert of group {group} is chosen twice, with different factors; choose it once")
        by_group[group] = found
    return by_group


def write_table(identity: ModelIdentity, by_group: Mapping[int, Tensor]) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`read_table`: table and factors, one row for each expert that is chosen."""
    tables = [torch.empty(0, len(COLUMNS), dtype=torch.long, device="cpu")]
    values = [torch.empty(0, dtype=torch.float32, device="cpu")]
    for group, factors in by_group.items():
        place = (~factors.isnan()).nonzero()
        values.append(factors[tuple(place.t())])
        place[:, 0] = ALL if factors.shape[0] == 1 else place[:, 0] + identity.layers(group)[0]
        place[:, 1] = ALL if factors.shape[1] == 1 else place[:, 1]
        tables.append(torch.cat([place.new_full((len(place), 1), group), place], 1))
    return torch.cat(tables), torch.cat(values)


def _every(place: Tensor, values: Tensor, column: int, size: int) -> tuple[Tensor, Tensor]:
    """Replace every row that has :data:`ALL` in ``column`` by ``size`` rows."""
    every = place[:, column] == ALL
    repeated = place[every].repeat_interleave(size, 0)
    repeated[:, column] = torch.arange(size, device=place.device).repeat(int(every.sum()))
    return torch.cat([place[~every], repeated]), torch.cat([values[~every], values[every].repeat_interleave(size)])
