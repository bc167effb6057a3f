"""Masks: factors of single experts, 0 for those that are off; in a model (:class:`ExpertMask`) and in a file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from operator import index
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from monet_train.durable import write_atomically
from monet_train.errors import UserError
from monet_train.kernels.plain import expert_factors
from monet_train.model.expert_table import ALL, COLUMNS, read_table, refuse_non_finite, write_table
from monet_train.model.identity import ModelIdentity, identify
from monet_train.model.statistics import FullPrecision
from monet_train.model.wrapped import unwrap
from monet_train.typed import from_json

FORMAT = "monet_train.ExpertSet"
VERSION = 1
REPLACE = "save it again, or give another file"


class ExpertMask(FullPrecision):
    """Factors M of the experts of a routing group. Not part of the state dict.

    Each layer of the group has its own; layers that were given the same factors share one tensor.
    """

    def __init__(self, heads: int, experts: int, layers: int) -> None:
        super().__init__()
        self.heads, self.experts = heads, experts
        self.names = [f"layer_{number}" for number in range(layers)]
        for name in self.names:
            self.register_buffer(name, None, persistent=False)

    @property
    def factors(self) -> list[Tensor | None]:
        """Of each layer of the group: [1 or H, E, E], or None where every expert is as it is."""
        return [self._buffers[name] for name in self.names]

    def set(self, mask: Tensor, like: Tensor, layer: int | None = None) -> None:
        """Take a mask that broadcasts to [H, E, E], to the device of ``like``; fp64 where that is fp64, else fp32.

        Args:
            layer: place in the group of the only layer that takes it; None: all of them.
        """
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        try:
            factors = expert_factors(mask, self.heads, self.experts, dtype).to(like.device)
        except ValueError as error:
            raise UserError(str(error)) from None
        for name in self.names if layer is None else [self.names[layer]]:
            setattr(self, name, factors)

    def clear(self) -> None:
        """Every expert as it is."""
        for name in self.names:
            setattr(self, name, None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        moved: dict[int, tuple[Tensor, Tensor]] = {}  # what layers share, they share afterwards

        def once(tensor: Tensor) -> Tensor:
            if id(tensor) not in moved:
                moved[id(tensor)] = tensor, fn(tensor)
            return moved[id(tensor)][1]

        return super()._apply(once, recurse)


@dataclass(frozen=True, eq=False)
class ExpertSet:
    """Chosen experts, a factor for each (0: off), and which model they are for.

    A set is made by :meth:`choose`, combined by :meth:`union`, :meth:`intersection` and :meth:`inverted`, given other
    factors by :meth:`with_factor` and :meth:`scaled`, kept in a file by :meth:`save` and :meth:`load`, and put into
    effect by :meth:`apply`. No method changes the set.

    Examples::

        german = ExpertSet.choose(model, group=0, experts=[(17, 402), (3, None), (None, 9)])
        german = german.union(ExpertSet.choose(model, group=1, experts=table, layers=[5], heads=[0]))
        german.save("german.experts.safetensors")
        german.apply(model)                             # off
        german.with_factor(2.0).apply(model)            # twice as strong
        german.inverted().apply(model)                  # all the others off
    """

    identity: ModelIdentity  # of the model that they were chosen in
    factors: dict[int, Tensor]  # by routing group: fp32 [layers or 1, H or 1, E, E], NaN where not chosen
    name: str = "this expert set"  # for messages: the file, if any
    description: str = ""  # how they were chosen, for readers of the file

    @classmethod
    def choose(
        cls,
        model: nn.Module | ModelIdentity,
        group: int,
        experts: Tensor | Sequence[tuple[int | None, int | None]],
        factor: float | Tensor = 0.0,
        *,
        layers: Iterable[int] | None = None,
        heads: Iterable[int] | None = None,
        description: str = "",
    ) -> ExpertSet:
        """Experts of one routing group.

        Args:
            model: that they are experts of, which may be wrapped, or its identity.
            experts: pairs (i, j) of a half-expert of side 1 and one of side 2, where None is every half-expert of that
                side; or the same as an integer tensor [n, 2], with -1 for None.
            factor: of all of them, or a tensor [n] with that of each.
            layers: the only layers of the group in which they are chosen, by their numbers in the model; None: all.
            heads: the only routing heads in which they are chosen; None: all.

        Raises:
            UserError: there is no such group, layer, head or expert, or an expert has two factors.
        """
        identity = model if isinstance(model, ModelIdentity) else identify(model)
        if group not in identity.groups:
            raise UserError(f"group={group!r} is not a routing group; use one of 0 to {identity.groups[-1]}")
        if not isinstance(experts, Tensor):
            pairs = [[ALL if half is None else index(half) for half in pair] for pair in experts]
            experts = torch.tensor(pairs, dtype=torch.long, device="cpu").view(-1, 2)
        if experts.is_floating_point() or experts.dtype == torch.bool or experts.dim() != 2 or experts.shape[1] != 2:
            raise UserError(
                f"experts of shape {list(experts.shape)} in {experts.dtype} must be pairs (i, j): integers [n, 2]"
            )
        where = [[group, layer, head] for layer in _listed(layers) for head in _listed(heads)]
        places = torch.tensor(where, dtype=torch.long, device="cpu").view(-1, 3)
        table = torch.cat(
            [places.repeat_interleave(len(experts), 0), experts.long().cpu().repeat(len(where), 1)], dim=1
        )
        values = torch.as_tensor(factor, dtype=torch.float32, device="cpu")
        if values.shape not in ((), (len(experts),)):
            raise UserError(f"factor of shape {list(values.shape)} must be a number, or one for each of the experts")
        chosen = read_table(identity, table, values.expand(len(experts)).repeat(len(where)))
        return cls(identity, chosen, description=description)

    def __len__(self) -> int:
        """Experts that are chosen in at least one layer and head of their group."""
        return sum(len(self.pairs(group)) for group in self.factors)

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(self.pairs(group)):,} of group {group}" for group in self.factors)
        return f"ExpertSet({counts or 'empty'})"

    def pairs(self, group: int) -> Tensor:
        """The experts (i, j) of a group that are chosen in at least one layer and head, int64 [n, 2] in order."""
        if group not in self.factors:
            return torch.empty(0, 2, dtype=torch.long)
        return (~self.factors[group].isnan()).any(0).any(0).nonzero()

    def union(self, other: ExpertSet) -> ExpertSet:
        """The experts of either set. What both choose keeps the factor that it has here."""
        other.identity.check(self.identity, other.name)
        together = dict(self.factors)
        for group, theirs in other.factors.items():
            ours = together.get(group)
            together[group] = theirs if ours is None else torch.where(ours.isnan(), theirs, ours)
        return replace(self, factors=dict(sorted(together.items())))

    def intersection(self, other: ExpertSet) -> ExpertSet:
        """The experts that are in both sets, with the factors that they have here."""
        other.identity.check(self.identity, other.name)
        return replace(
            self,
            factors={
                group: torch.where(other.factors[group].isnan(), math.nan, ours)
                for group, ours in self.factors.items()
                if group in other.factors
            },
        )

    def inverted(self, factor: float = 0.0) -> ExpertSet:
        """All experts of the model that are not in the set, also those of the groups that it does not name."""
        experts = self.identity.moe_experts
        nothing = torch.full((1, 1, experts, experts), math.nan, dtype=torch.float32, device="cpu")
        inverted = {}
        for group in self.identity.groups:
            ours = self.factors.get(group, nothing)
            inverted[group] = torch.where(ours.isnan(), torch.zeros_like(ours), math.nan)
        return replace(self, factors=inverted).with_factor(factor)

    def with_factor(self, factor: float) -> ExpertSet:
        """The same experts with one factor."""
        return self._map(lambda factors: torch.full_like(factors, factor))

    def scaled(self, by: float) -> ExpertSet:
        """The same experts with their factors multiplied."""
        return self._map(lambda factors: factors * by)

    def apply(self, model: nn.Module) -> None:
        """Make these the masks of ``model``, instead of all that it has. With tensor parallelism every rank does.

        Args:
            model: of this project or of transformers; it may be wrapped, by peft, torch.compile, DeepSpeed, ...

        Raises:
            UserError: the set is for another model; its masks are as before then. A relative gets a warning.
        """
        self.identity.check(identify(model), self.name)
        monet = unwrap(model)
        monet.clear_expert_mask()
        for group, factors in self.factors.items():
            masks = torch.where(factors.isnan(), 1.0, factors)
            if len(masks) == 1:
                monet.set_expert_mask(group, masks[0])
                continue
            for layer, mask in zip(self.identity.layers(group), masks, strict=True):
                monet.set_expert_mask(group, mask, layer=layer)

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file: ``experts`` int32 [n, 5] and ``factors`` fp32 [n].

        The columns are group, layer, head, i and j; -1 is every layer of the group, or every head.

        Raises:
            UserError: the file cannot be written.
        """
        table, factors = write_table(self.identity, self.factors)
        metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "model": json.dumps(asdict(self.identity)),
            "description": self.description,
        }
        data = save({"experts": table.int(), "factors": factors}, metadata)
        path = Path(path)
        try:
            write_atomically(path, data)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}); give another file") from None
        return path

    @classmethod
    def load(cls, path: str | Path) -> ExpertSet:
        """Read a file of :meth:`save`.

        Raises:
            UserError: one line that names the file: it is missing, truncated, or not an expert set.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path} is not a file; give one that ExpertSet.save wrote")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise UserError(f"{path} is not an expert set; give a file that ExpertSet.save wrote")
                if metadata.get("version") != str(VERSION):
                    raise UserError(
                        f"{path} has version {metadata.get('version')} of the format, this is version {VERSION}; "
                        "use the monet_train that wrote it, or a newer one"
                    )
                table, factors = file.get_tensor("experts"), file.get_tensor("factors")
        except (SafetensorError, OSError) as error:
            first_line = str(error).partition("\n")[0]
            raise UserError(f"{path} cannot be read (truncated?): {first_line}: {REPLACE}") from None
        try:
            identity = from_json(ModelIdentity, json.loads(metadata["model"]), "model")
            bytes.fromhex(identity.lineage)
            if table.shape != (len(factors), len(COLUMNS)) or table.dtype != torch.int32:
                raise ValueError(f"experts are {table.dtype} {list(table.shape)}, factors {list(factors.shape)}")
            chosen = read_table(identity, table.long(), factors.float())
        except (KeyError, ValueError, UserError) as error:
            raise UserError(f"{path} is damaged ({error}): {REPLACE}") from None
        return cls(identity, chosen, name=str(path), description=metadata.get("description", ""))

    def _map(self, function: Callable[[Tensor], Tensor]) -> ExpertSet:
        mapped = {}
        for group, factors in self.factors.items():
            values = function(factors)
            refuse_non_finite(values[~factors.isnan()])
            mapped[group] = torch.where(factors.isnan(), factors, values)
        return replace(self, factors=mapped)


def _listed(chosen: Iterable[int] | None) -> list[int]:
    return [ALL] if chosen is None else [index(number) for number in chosen]
