"""Configuration of a Monet (Mixture of Monosemantic Experts for Transformers, arXiv 2412.04139) for transformers."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class MonetConfig(PretrainedConfig):
    """Architecture of a Monet, in the field names of the published ``config.json``.

    A layer has ``moe_experts`` half-experts per side, that is ``moe_experts**2`` experts of ``moe_dim`` inner units,
    chosen by ``moe_heads`` routing heads; about ``moe_topk`` half-experts per head are active for a token.
    ``moe_groups`` consecutive layers share one router. ``output_router_probs``: return the gates of each router.

    ``router_statistics`` says what the routers' running statistics do in training mode. ``"frozen"``: they set the
    thresholds and do not move, so that an adapter on the same base is the model that was trained. ``"update"``: the
    statistics of the batch set the thresholds and move the running ones, as in pretraining.

    Raises:
        ValueError: for a published field whose value no Monet has (another activation, biases in the attention,
            scaled rotary positions, tied embeddings).
    """

    model_type = "monet"
    keys_to_ignore_at_inference = ["past_key_values", "router_probs"]  # noqa: RUF012  (Trainer adds a list to it)

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 1536,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 12,
        num_key_value_heads: int | None = None,
        max_position_embeddings: int = 2048,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 10000.0,
        rope_scaling: dict[str, Any] | None = None,
        attention_bias: bool = False,
        attention_dropout: float = 0.0,
        hidden_act: str = "relu2",
        initializer_range: float = 0.02,
        moe_dim: int = 12,
        moe_heads: int = 6,
        moe_experts: int = 512,
        moe_topk: int = 8,
        moe_groups: int = 4,
        moe_decompose: str = "vertical",
        output_router_probs: bool = False,
        router_statistics: str = "frozen",
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = 1,
        eos_token_id: int | None = 2,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        if moe_decompose not in ("vertical", "horizontal"):
            raise ValueError(f"moe_decompose={moe_decompose!r} is unknown: use 'vertical' or 'horizontal'")
        if hidden_act != "relu2" or attention_bias or rope_scaling or tie_word_embeddings:
            raise ValueError(
                "this modelling file has hidden_act='relu2', attention_bias=False, rope_scaling=None and "
                f"tie_word_embeddings=False only; got {hidden_act!r}, {attention_bias}, {rope_scaling} and "
                f"{tie_word_embeddings}"
            )
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.attention_bias = attention_bias
        self.attention_dropout = attention_dropout
        self.hidden_act = hidden_act
        self.initializer_range = initializer_range
        self.moe_dim = moe_dim
        self.moe_heads = moe_heads
        self.moe_experts = moe_experts
        self.moe_topk = moe_topk
        self.moe_groups = moe_groups
        self.moe_decompose = moe_decompose
        self.output_router_probs = output_router_probs
        self.router_statistics = router_statistics
        self.use_cache = use_cache
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(**kwargs)

    def __setattr__(self, key: str, value: Any) -> None:
        # here, because from_pretrained(..., router_statistics=...) sets it on a ready configuration
        if key == "router_statistics" and value not in ("frozen", "update"):
            raise ValueError(f"router_statistics={value!r} is unknown: use 'frozen' or 'update'")
        super().__setattr__(key, value)
