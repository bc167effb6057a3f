"""The architecture of a Monet, in the field names of the published Hugging Face configurations."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from monet_train.errors import UserError
from monet_train.model.experts import decomposition
from monet_train.typed import above, at_least, check_bounds, field_types, from_json


@dataclass
class MonetConfig:
    """Architecture of a Monet (paper sections 3.2 to 3.4; defaults are the published 850M).

    Names follow the published ``config.json``, so that ``MonetConfig.from_dict(json)`` reads it unchanged.
    A layer has ``moe_experts`` half-experts per side, that is ``moe_experts**2`` experts of ``moe_dim`` units.
    """

    vocab_size: int = at_least(1, default=32000)
    hidden_size: int = at_least(1, default=1536)  # d
    num_hidden_layers: int = at_least(1, default=24)
    num_attention_heads: int = at_least(1, default=12)
    num_key_value_heads: int | None = at_least(1, default=None)  # grouped-query attention; None: one per attention head
    max_position_embeddings: int = at_least(1, default=2048)
    rms_norm_eps: float = above(0, default=1e-6)
    rope_theta: float = above(0, default=10000.0)
    initializer_range: float = above(0, default=0.02)
    moe_dim: int = at_least(1, default=12)  # m, inner units of one expert
    moe_heads: int = at_least(1, default=6)  # H, routing heads
    moe_experts: int = at_least(1, default=512)  # E, half-experts per side
    moe_topk: int = at_least(1, default=8)  # k, half-experts expected to be active per head (sets the threshold)
    moe_groups: int = at_least(1, default=4)  # layers that share one router
    moe_decompose: str = "vertical"
    bos_token_id: int | None = 1  # this and the next: the tokenizer's, where it is known; None: it has no such token
    eos_token_id: int | None = 2

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads after the default is resolved."""
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def has_router(self, layer: int) -> bool:
        """Whether ``layer`` owns a router; the other layers of its group reuse its gates."""
        return layer % self.moe_groups == 0

    @property
    def router_layers(self) -> range:
        """The layers that own a router; the router of ``layer`` is number ``layer // moe_groups`` of them."""
        return range(0, self.num_hidden_layers, self.moe_groups)

    def validate(self) -> None:
        """Refuse impossible sizes. Raises :class:`UserError` naming the key and the remedy."""
        check_bounds(self, "model.")
        if self.hidden_size % self.num_attention_heads or self.head_dim % 2:
            raise UserError(
                f"model.hidden_size={self.hidden_size} must be an even multiple of "
                f"model.num_attention_heads={self.num_attention_heads} (rotary pairs)"
            )
        if self.num_attention_heads % self.kv_heads:
            raise UserError(
                f"model.num_key_value_heads={self.num_key_value_heads} must divide "
                f"model.num_attention_heads={self.num_attention_heads}"
            )
        decomposition(self.moe_decompose).check(self)
        if self.moe_topk >= self.moe_experts:
            raise UserError(f"model.moe_topk={self.moe_topk} must be less than model.moe_experts={self.moe_experts}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain dictionary, for ``config.json``."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MonetConfig:
        """Read a ``config.json`` dictionary; keys of the Hugging Face machinery that we do not use are skipped."""
        kinds = field_types(cls)
        nullable = ("bos_token_id", "eos_token_id")  # elsewhere null means the default
        given = {key: v for key, v in values.items() if key in kinds and (v is not None or key in nullable)}
        try:
            config: MonetConfig = from_json(cls, given, "config")
        except ValueError as error:
            raise UserError(str(error)) from None
        config.validate()
        return config
