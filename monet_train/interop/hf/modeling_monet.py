"""Monet (Mixture of Monosemantic Experts for Transformers, arXiv 2412.04139) for transformers 5.

A Llama decoder whose perceptrons are Monet layers. The formulas of routing, experts, rotary positions and statistics
are in ``monet_plain.py``, ``monet_rotary.py`` and ``monet_statistics.py``. Every projection is called as a module, so
that adapters, quantizers, offloading and hooks work on it. Parameters and buffers have the published names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_monet import MonetConfig
from .monet_plain import (
    activation_threshold,
    expert_bias,
    expert_factors,
    expert_weights,
    gates,
    head_moments,
    horizontal_input,
    split_heads,
    vertical_inputs,
)
from .monet_rotary import rotary_tables, rotate
from .monet_statistics import NORM_EPS, BatchStatistics, FullPrecision, LogitStatistics

RouterProbs = tuple[tuple[Tensor, Tensor] | None, ...]


@dataclass
class MonetModelOutput(BaseModelOutputWithPast):
    """Adds ``router_probs``: a layer, the gates (g1, g2) [B, S, H, E], or None where it has no router of its own."""

    router_probs: RouterProbs | None = None


@dataclass
class MonetCausalLMOutput(CausalLMOutputWithPast):
    """Adds ``router_probs``: a layer, the gates (g1, g2) [B, S, H, E], or None where it has no router of its own."""

    router_probs: RouterProbs | None = None


def mask_for_attention(attention_mask: Tensor | None, past: int, length: int, device: torch.device) -> Tensor | None:
    """The mask for scaled_dot_product_attention, or None where causality alone decides.

    Args:
        attention_mask: None, [B, past + length] with 0 at padding, or a ready one [B, 1, length, keys].
        past: tokens in the cache. length: new tokens.

    Returns:
        bool [B or 1, 1, length, past + length], True = attend; a ready mask unchanged.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask
    if attention_mask is not None and attention_mask.all():
        attention_mask = None
    if attention_mask is None and (past == 0 or length == 1):
        return None
    tokens = torch.arange(past + length, device=device)
    queries = tokens[past:, None]
    causal = tokens <= queries
    if attention_mask is None:
        return causal[None, None]
    # padding attends to itself, as a softmax over nothing would be NaN
    return ((causal & attention_mask[:, None, :].bool()) | (tokens == queries)).unsqueeze(1)


class MonetAttention(nn.Module):
    """Causal self-attention with rotary positions and grouped key/value heads."""

    def __init__(self, config: MonetConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_size = config.hidden_size // config.num_attention_heads
        self.dropout = config.attention_dropout
        kv_width = config.num_key_value_heads * self.head_size
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, past: int, cache: Cache | None
    ) -> Tensor:
        """[B, S, d] -> [B, S, d]; the new keys and values are appended to ``cache``."""
        length = x.shape[1]
        query = rotate(self._heads(self.q_proj(x)), cos, sin)
        key = rotate(self._heads(self.k_proj(x)), cos, sin)
        value = self._heads(self.v_proj(x))
        if cache is not None:
            # static caches of early transformers 5 have to be told the place; later ones ignore it
            place = {"cache_position": torch.arange(past, past + length, device=x.device)}
            key, value = cache.update(key, value, self.layer, place)
        # a static cache returns room for tokens that are still to come
        keys = past + length if mask is None else mask.shape[-1]
        mixed = F.scaled_dot_product_attention(
            query,
            key[:, :, :keys],
            value[:, :, :keys],
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None and length > 1,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_size)).transpose(1, 2)


class RunningStatistics(LogitStatistics):
    """The running statistics as a module that is called, so that what moves or replaces modules sees the call."""

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Running mean and variance [H] of logits like ``z`` [T, H, E]."""
        return self.running_mean, self.running_var


class MonetRouter(nn.Module):
    """Gates of both half-expert sets for each token (paper section 3.4)."""

    def __init__(self, config: MonetConfig) -> None:
        super().__init__()
        self.config = config
        self.heads, self.experts, self.topk = config.moe_heads, config.moe_experts, config.moe_topk
        self.w1 = nn.Linear(config.hidden_size, self.heads * self.experts, bias=False)
        self.w2 = nn.Linear(config.hidden_size, self.heads * self.experts, bias=False)
        self.norm1 = RunningStatistics(self.heads)
        self.norm2 = RunningStatistics(self.heads)

    def forward(self, x: Tensor, unpadded: Tensor | None) -> tuple[Tensor, Tensor, BatchStatistics | None]:
        """Route tokens.

        Args:
            x: [T, d]. unpadded: bool [T], False at padding, which is kept out of the batch statistics.

        Returns:
            gates of side 1 and 2, [T, H, E]; in training with ``config.router_statistics == "update"`` also the
            batch statistics, for :meth:`update_statistics`.
        """
        z1, z2 = split_heads(self.w1(x), self.heads), split_heads(self.w2(x), self.heads)
        batch = None
        if self.training and self.config.router_statistics == "update":
            batch = self._batch_statistics(z1, z2, unpadded)
            mean, var = batch.mean.to(z1.dtype), batch.var.to(z1.dtype)
        else:
            (mean1, var1), (mean2, var2) = self.norm1(z1), self.norm2(z2)
            mean, var = torch.stack([mean1, mean2]), torch.stack([var1, var2])
        threshold = activation_threshold(mean, var, self.topk, self.experts, NORM_EPS)
        return gates(z1, threshold[0]), gates(z2, threshold[1]), batch

    def update_statistics(self, batch: BatchStatistics) -> None:
        """Take batch statistics into the running ones."""
        self.norm1.follow(batch.mean[0], batch.var[0], batch.count)
        self.norm2.follow(batch.mean[1], batch.var[1], batch.count)

    @torch.no_grad()
    def _batch_statistics(self, z1: Tensor, z2: Tensor, unpadded: Tensor | None) -> BatchStatistics:
        if unpadded is not None:
            z1, z2 = z1[unpadded], z2[unpadded]
        moments = torch.stack([head_moments(z1), head_moments(z2)])
        return BatchStatistics.from_moments(moments, moments.new_full((), len(z1) * self.experts))


class ExpertMask(FullPrecision):
    """Factors M of the experts of a layer, [1 or H, E, E]; None where no expert is masked. Not in the state dict."""

    factors: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factors", None, persistent=False)


class VerticalExperts(nn.Module):
    """Experts that are split along their inner dimension (paper section 3.3, vertical)."""

    def __init__(self, config: MonetConfig) -> None:
        super().__init__()
        half, inner = config.hidden_size // 2, config.moe_experts * config.moe_dim // 2
        self.u1 = nn.Linear(config.hidden_size, inner)
        self.u2 = nn.Linear(config.hidden_size, inner)
        self.v11 = nn.Linear(inner, half, bias=False)
        self.v12 = nn.Linear(inner, half, bias=False)
        self.v21 = nn.Linear(inner, half, bias=False)
        self.v22 = nn.Linear(inner, half, bias=False)
        self.b1 = nn.Parameter(torch.zeros(config.moe_experts, half))
        self.b2 = nn.Parameter(torch.zeros(config.moe_experts, half))

    def forward(self, x: Tensor, g1: Tensor, g2: Tensor, factors: Tensor | None) -> Tensor:
        """x [T, d], gates [T, H, E], factors of the experts [1 or H, E, E] or None -> [T, d]."""
        to11, to12, to21, to22 = vertical_inputs(self.u1(x), self.u2(x), g1, g2, factors)
        r1, r2 = expert_weights(g1, g2, factors)
        left = self.v11(to11) + self.v12(to12) + expert_bias(r1, self.b1)
        right = self.v21(to21) + self.v22(to22) + expert_bias(r2, self.b2)
        return torch.cat([left, right], -1)


class HorizontalExperts(nn.Module):
    """Experts whose input and output layers are composed (paper section 3.3, horizontal)."""

    def __init__(self, config: MonetConfig) -> None:
        super().__init__()
        inner = config.moe_experts * config.moe_dim
        self.u = nn.Linear(config.hidden_size, inner)
        self.v = nn.Linear(inner, config.hidden_size, bias=False)
        self.b = nn.Parameter(torch.zeros(config.moe_experts, config.hidden_size))

    def forward(self, x: Tensor, g1: Tensor, g2: Tensor, factors: Tensor | None) -> Tensor:
        """x [T, d], gates [T, H, E], factors of the experts [1 or H, E, E] or None -> [T, d]."""
        _, r2 = expert_weights(g1, g2, factors)
        return self.v(horizontal_input(self.u(x), g1, g2, factors)) + expert_bias(r2, self.b)


class MonetDecoderLayer(GradientCheckpointingLayer):
    """Attention and experts. Every ``moe_groups``-th layer routes; the others reuse its gates."""

    def __init__(self, config: MonetConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = MonetAttention(config, layer)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.router = MonetRouter(config) if layer % config.moe_groups == 0 else None
        self.expert_mask = ExpertMask()
        self.moe = {"vertical": VerticalExperts, "horizontal": HorizontalExperts}[config.moe_decompose](config)

    def forward(
        self,
        hidden: Tensor,
        g1: Tensor,
        g2: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        unpadded: Tensor | None,
        factors: Tensor | None,
        past: int,
        past_key_values: Cache | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, BatchStatistics | None]:
        """One layer.

        Args:
            hidden: [B, S, d]. g1, g2: gates of the group [B*S, H, E]; not read by a layer that routes.
            cos, sin: rotary tables. mask: see :func:`mask_for_attention`. unpadded: bool [B*S], False at padding.
            factors: of this layer's experts, [1 or H, E, E]; an argument, so that a recomputation has the same.

        Returns:
            hidden, g1, g2, and the batch statistics of this layer's router in training.
        """
        x = self.input_layernorm(hidden)
        hidden = hidden + self.self_attn(x, cos, sin, mask, past, past_key_values)
        x = self.post_attention_layernorm(hidden)
        tokens = x.flatten(0, 1)
        statistics = None
        if self.router is not None:
            g1, g2, statistics = self.router(tokens, unpadded)
        if factors is not None:
            factors = factors.to(tokens.device)
        hidden = hidden + self.moe(tokens, g1, g2, factors).view_as(x)
        return hidden, g1, g2, statistics


class MonetPreTrainedModel(PreTrainedModel):
    """Initialisation and what transformers has to know of the architecture."""

    config_class = MonetConfig
    config: MonetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MonetDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["norm1", "norm2"]  # noqa: RUF012
    _supports_sdpa = True

    def set_expert_mask(self, group: int, mask: Tensor, layer: int | None = None) -> None:
        """Switch experts of a routing group off, or scale them, in training and evaluation.

        The output of a layer becomes Σ_h Σ_ij M_hij g1_hi g2_hj E_ij(x): gates are not renormalised, a layer whose
        experts are all off outputs 0, and ``router_probs`` are those of the unmasked gates. A mask is not saved, gets
        no gradient, and replaces the earlier one of the layers that take it.

        Args:
            group: routing group, that is layer // moe_groups.
            mask: M as bool (False = off) or finite factors; whatever broadcasts to [H, E, E], (head, half-expert i of
                side 1, half-expert j of side 2).
            layer: the only layer of the group that takes the mask, by its number in the model; None: all of them.

        Raises:
            ValueError: there is no such group or layer, or the mask is not such a tensor.
        """
        numbers = self._group(group)
        if layer is not None:
            if isinstance(layer, bool) or not isinstance(layer, int) or layer not in numbers:
                raise ValueError(
                    f"layer={layer!r} is not in routing group {group}; use one of {numbers[0]} to {numbers[-1]}"
                )
            numbers = range(layer, layer + 1)
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        factors = expert_factors(mask, self.config.moe_heads, self.config.moe_experts, dtype)
        for chosen in self._layers(numbers):
            device = next(chosen.parameters()).device  # meta where accelerate has offloaded the layer
            chosen.expert_mask.factors = factors if device.type == "meta" else factors.to(device)

    def clear_expert_mask(self, group: int | None = None) -> None:
        """Remove the masks of a routing group, or those of all groups."""
        numbers = range(self.config.num_hidden_layers) if group is None else self._group(group)
        for chosen in self._layers(numbers):
            chosen.expert_mask.factors = None

    def _layers(self, numbers: range) -> list[MonetDecoderLayer]:
        layers = cast(MonetModel, self.base_model).layers
        return [cast(MonetDecoderLayer, layers[number]) for number in numbers]

    def _group(self, group: int) -> range:
        """The numbers of the layers of a routing group."""
        layers, size = self.config.num_hidden_layers, self.config.moe_groups
        last = (layers - 1) // size
        if isinstance(group, bool) or not isinstance(group, int) or not 0 <= group <= last:
            raise ValueError(f"group={group!r} is not a routing group; use one of 0 to {last}")
        return range(group * size, min((group + 1) * size, layers))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, VerticalExperts):
            init.zeros_(module.b1)
            init.zeros_(module.b2)
        elif isinstance(module, HorizontalExperts):
            init.zeros_(module.b)
        elif isinstance(module, LogitStatistics):
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
            init.zeros_(module.num_batches_tracked)


class MonetModel(MonetPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: MonetConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MonetDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_probs: bool | None = None,
        **kwargs: Any,
    ) -> MonetModelOutput:
        """input_ids [B, S] or inputs_embeds [B, S, d] -> hidden states [B, S, d] after the final norm."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        config = self.config
        if use_cache is None:
            use_cache = config.use_cache and not self.training
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if output_router_probs is None:
            output_router_probs = config.output_router_probs

        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length = hidden.shape[:2]
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=hidden.device)[None]
        cos, sin = rotary_tables(position_ids, hidden.shape[-1] // config.num_attention_heads, config.rope_theta)
        mask = mask_for_attention(attention_mask, past, length, hidden.device)
        unpadded = None
        if mask is not None and attention_mask is not None and attention_mask.dim() == 2:
            unpadded = attention_mask[:, -length:].bool().flatten()

        g1 = g2 = hidden.new_empty(0)  # the first layer routes
        states: list[Tensor] = []
        router_probs: list[tuple[Tensor, Tensor] | None] = []
        for layer in cast(list[MonetDecoderLayer], list(self.layers)):
            if output_hidden_states:
                states.append(hidden)
            hidden, g1, g2, statistics = layer(
                hidden,
                g1,
                g2,
                cos,
                sin,
                mask,
                unpadded,
                layer.expert_mask.factors,
                past,
                past_key_values=past_key_values,
            )
            if statistics is not None and layer.router is not None:
                # here, because a layer under gradient checkpointing runs twice
                layer.router.update_statistics(statistics)
            if output_router_probs:
                own = tuple(gate.unflatten(0, (batch, length)) for gate in (g1, g2))
                router_probs.append(None if layer.router is None else own)
        hidden = self.norm(hidden)
        return MonetModelOutput(
            last_hidden_state=hidden,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*states, hidden) if output_hidden_states else None,
            router_probs=tuple(router_probs) if output_router_probs else None,
        )


class MonetForCausalLM(MonetPreTrainedModel, GenerationMixin):
    """A Monet language model."""

    def __init__(self, config: MonetConfig) -> None:
        super().__init__(config)
        self.model = MonetModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_probs: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MonetCausalLMOutput:
        """Next-token logits and loss.

        Args:
            input_ids: [B, S], or inputs_embeds [B, S, d]. attention_mask: [B, cached + S], 0 at padding.
            labels: [B, S], usually ``input_ids``: shifted here by one; -100 is ignored.
            logits_to_keep: logits of the last that many positions only (0: all), or of these positions.

        Returns:
            loss (mean cross-entropy, without the auxiliary losses of pretraining), logits [B, S, V], and what was
            asked for of past_key_values, hidden_states (embeddings, then after each layer, the last one after the
            final norm) and router_probs.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_router_probs=output_router_probs,
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MonetCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            router_probs=outputs.router_probs,
        )
