"""The Monet decoder: a Llama whose perceptrons are Monet layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from monet_train.errors import UserError
from monet_train.kernels import AUTO, Gates, Kernels
from monet_train.model.attention import Attention, AttentionContext, KVCache, attention_mask
from monet_train.model.auxiliary import GateSums, RouterMetrics, router_metrics
from monet_train.model.config import MonetConfig
from monet_train.model.experts import Experts, decomposition
from monet_train.model.rotary import rotary_tables
from monet_train.model.router import Router
from monet_train.model.statistics import BatchStatistics
from monet_train.parallel.collectives import ALONE, Collectives

IGNORED = -100  # target of a position that has no next token


@dataclass
class MonetOutput:
    """What a forward pass returns.

    ``gates`` are for reading experts at any size: :meth:`Gates.active_pairs` gives the few (token, half-expert) pairs
    that are active, with their gates; :meth:`Gates.dense` the same numbers as ``router_probs``, [T, H, E]. Token t is
    position t % S of sequence t // S. The score of expert (i, j) for a token is Σ_h g1_hi g2_hj. Both are those of
    the router, before any mask, and the same on every tensor-parallel rank. For the scores of the experts that one
    token uses::

        g1, g2 = model(ids, output_gates=True).gates[0]    # of the first routing group
        one, two = g1.active_pairs(), g2.active_pairs()
        of1, of2 = one.token == t, two.token == t
        scores = one.values[of1] @ two.values[of2].T       # of experts (one.half_expert[of1], two.half_expert[of2])
    """

    logits: Tensor | None  # [B, S, V]; None when keep_logits=False
    loss: Tensor | None  # loss_sum / targets; 0 where there is no counted target
    loss_sum: Tensor | None  # next-token cross-entropy, summed over the counted targets; a differentiable scalar
    targets: Tensor | None  # how many targets are counted, an int64 scalar; those of -100 are not
    router_probs: list[tuple[Tensor, Tensor] | None] | None  # by layer: (g1, g2) [B, S, H, E], None without router
    gates: list[tuple[Gates, Gates]] | None  # by routing group: the same as (g1, g2) over T = B * S tokens, compact
    hidden_states: list[Tensor] | None  # the embeddings, then each layer's output; the last one is normalised
    routers: list[RouterMetrics]  # by routing group, in training mode

    @property
    def uniformity(self) -> Tensor:
        """Uniformity loss, averaged over the routers (training mode only)."""
        return torch.stack([router.uniformity for router in self.routers]).mean()

    @property
    def ambiguity(self) -> Tensor:
        """Ambiguity loss, averaged over the routers (training mode only)."""
        return torch.stack([router.ambiguity for router in self.routers]).mean()


class MonetLayer(nn.Module):
    """One decoder layer. The first layer of a routing group owns the router whose gates the group shares."""

    def __init__(self, config: MonetConfig, index: int, collectives: Collectives, kernels: Kernels) -> None:
        super().__init__()
        self.self_attn = Attention(config, index, collectives)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.router = Router(config, collectives, kernels) if config.has_router(index) else None
        self.moe = decomposition(config.moe_decompose)(config, collectives)


class MonetModel(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: MonetConfig, collectives: Collectives, kernels: Kernels) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = collectives.embedding(config.vocab_size, config.hidden_size)
        layers = [MonetLayer(config, index, collectives, kernels) for index in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def routers(self) -> Iterator[Router]:
        """The routers, first layer to last."""
        for layers in self.groups():
            assert layers[0].router is not None
            yield layers[0].router

    def groups(self) -> list[list[MonetLayer]]:
        """The layers by routing group: one router and the layers that share its gates."""
        size = self.config.moe_groups
        layers = cast(list[MonetLayer], list(self.layers))
        return [layers[start : start + size] for start in range(0, len(layers), size)]


class RoutingGroup:
    """One forward pass through the layers that share a router."""

    def __init__(
        self, layers: list[MonetLayer], context: AttentionContext, keep_gates: bool, keep_states: bool
    ) -> None:
        self.layers = layers
        router = layers[0].router
        assert router is not None
        self.masks = router.mask.factors  # by layer; a recomputation takes them too, whatever was set meanwhile
        self.context = context
        self.keep_gates, self.keep_states = keep_gates, keep_states
        self.statistics: BatchStatistics | None = None  # of the first pass; a recomputation reuses them
        self.gates: list[tuple[Gates, Gates]] = []  # one entry if they are kept
        self.states: list[Tensor] = []

    def __call__(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """hidden [B, S, d] -> hidden and, in training, the fields of :class:`GateSums`, all as bare tensors."""
        states = []
        routing = None
        for layer, mask in zip(self.layers, self.masks, strict=False):
            hidden = hidden + layer.self_attn(layer.input_layernorm(hidden), self.context)
            x = layer.post_attention_layernorm(hidden)
            tokens = x.flatten(0, 1)
            if layer.router is not None:
                g1, g2, self.statistics = layer.router.route(tokens, self.statistics)
            if routing is None or mask is not routing.mask:
                routing = layer.moe.routing(g1, g2, mask)
            hidden = hidden + layer.moe(tokens, routing).view_as(x)
            states.append(hidden)
        if self.keep_gates:
            self.gates = [(g1, g2)]
        if self.keep_states:
            self.states = states
        if self.statistics is None:
            return (hidden,)
        sums = GateSums.from_gates(g1, g2)
        return hidden, sums.total1, sums.total2, sums.largest1, sums.largest2, sums.active


class MonetForCausalLM(nn.Module):
    """A Monet language model. Parameter and buffer names are those of the published state dict.

    Args:
        config: the architecture.
        collectives: what other processes take part in; :func:`monet_train.model.sharding.build_model` makes them.
        kernels: which implementation runs the routing and expert operations.
        recompute: recompute the activations of each routing group in the backward pass instead of keeping them.

    Raises:
        UserError: sizes that make no model, naming the key.
    """

    def __init__(
        self,
        config: MonetConfig,
        collectives: Collectives = ALONE,
        kernels: Kernels = AUTO,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        config.validate()
        self.config = config
        self.collectives = collectives
        self.recompute = recompute
        self.model = MonetModel(config, collectives, kernels)
        self.lm_head = collectives.column(config.hidden_size, config.vocab_size)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        targets: Tensor | None = None,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        cache: KVCache | None = None,
        output_router_probs: bool = False,
        output_gates: bool = False,
        output_hidden_states: bool = False,
        keep_logits: bool = True,
    ) -> MonetOutput:
        """Run the model.

        In training every position enters the routers' statistics and the auxiliary losses, whether or not its target is
        counted.

        Args:
            input_ids: [B, S].
            labels: [B, S] as in Hugging Face, usually ``input_ids``: shifted here by one; -100 is ignored.
            targets: [B, S], the token that follows each position, or -100; instead of ``labels``, for windows of S + 1.
            positions: [B, S], default 0, 1, ... after the cached tokens.
            segments: [B, S] document numbers; a token attends only within its own.
            cache: keys and values of earlier tokens; the new ones are appended.
            output_router_probs, output_gates, output_hidden_states: fill these fields of the output.
            keep_logits: False saves their memory when only the loss is wanted, and the head's work when neither is.
        """
        config = self.config
        cached = cache.length if cache else 0
        if labels is not None:
            targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        if positions is None:
            positions = torch.arange(cached, cached + input_ids.shape[1], device=input_ids.device)[None]
        cos, sin = rotary_tables(positions, config.head_dim, config.rope_theta)
        mask = attention_mask(segments, cached, input_ids.shape[1], input_ids.device)
        context = AttentionContext(cos, sin, mask, cache)

        hidden = self.model.embed_tokens(input_ids)
        states = [hidden]
        gates: list[tuple[Gates, Gates]] = []
        metrics = []
        for layers, router in zip(self.model.groups(), self.model.routers(), strict=True):
            group = RoutingGroup(layers, context, output_gates or output_router_probs, output_hidden_states)
            if self.recompute and torch.is_grad_enabled():
                hidden, *sums = checkpoint(group, hidden, use_reentrant=False)
            else:
                hidden, *sums = group(hidden)
            if group.statistics is not None:
                router.update_statistics(group.statistics)
                metrics.append(router_metrics(GateSums(*sums), input_ids.numel(), self.collectives.sum_over_batch))
            states += group.states
            gates += group.gates
        hidden = self.model.norm(hidden)
        states[-1] = hidden

        logits = loss = loss_sum = counted = None
        if keep_logits or targets is not None:  # who wants only gates or states is spared the head
            partial = self.lm_head(hidden)  # of this rank's part of the vocabulary
            if targets is not None:
                loss_sum, counted = self._sum_losses(partial, targets)
                loss = loss_sum / counted.clamp_min(1)
            logits = self.collectives.gather_logits(partial) if keep_logits else None
        return MonetOutput(
            logits=logits,
            loss=loss,
            loss_sum=loss_sum,
            targets=counted,
            router_probs=self._router_probs(gates, input_ids.shape) if output_router_probs else None,
            gates=gates if output_gates else None,
            hidden_states=states if output_hidden_states else None,
            routers=metrics,
        )

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.model.norm.weight.device

    def store_for_decoding(self) -> None:
        """Lay the output weights of all experts out for one token at a time: same shapes and values, much faster."""
        for module in self.modules():
            if isinstance(module, Experts):
                module.store_for_decoding()

    def set_expert_mask(self, group: int, mask: Tensor, layer: int | None = None) -> None:
        """Switch experts of a routing group off, or scale them, in training and evaluation.

        The output of a layer becomes Σ_h Σ_ij M_hij g1_hi g2_hj E_ij(x): gates are not renormalised, and a layer
        whose experts are all off outputs 0. The auxiliary losses, ``gates`` and ``router_probs`` are those of the
        unmasked gates. A mask is not part of the state dict, gets no gradient, and replaces the earlier one of the
        layers that take it. With tensor parallelism every rank sets the same. :class:`~monet_train.ExpertSet` has
        masks in a file.

        Args:
            group: routing group, that is layer // moe_groups.
            mask: M as bool (False = off) or factors; whatever broadcasts to [H, E, E], (head, half-expert i of side
                1, half-expert j of side 2).
            layer: the only layer of the group that takes the mask, by its number in the model; None: all of them.

        Examples::

            keep = torch.ones(E, E, dtype=torch.bool)
            keep[17, 402] = False               # expert (17, 402)
            keep[17] = False                    # every expert with half-expert 17 of side 1
            model.set_expert_mask(0, keep)
            factors = torch.ones(E)
            factors[402] = 0.5                  # half-expert 402 of side 2 at half its strength
            model.set_expert_mask(1, factors)
            heads = torch.tensor([1.0, 0.0, 2.0])[:, None, None]  # of H = 3
            model.set_expert_mask(2, heads)     # head 1 off, head 2 doubled
            model.set_expert_mask(0, keep, layer=1)  # in layer 1 alone
        """
        router = self._router(group)
        place = None if layer is None else self._place_in_group(group, layer)
        router.mask.set(mask, like=router.w1.weight, layer=place)

    def clear_expert_mask(self, group: int | None = None) -> None:
        """Remove the masks of a routing group, or those of all groups."""
        for router in self.model.routers() if group is None else (self._router(group),):
            router.mask.clear()

    def _router(self, group: int) -> Router:
        routers = list(self.model.routers())
        if isinstance(group, bool) or not isinstance(group, int) or not 0 <= group < len(routers):
            raise UserError(f"group={group!r} is not a routing group; use one of 0 to {len(routers) - 1}")
        return routers[group]

    def _place_in_group(self, group: int, layer: int) -> int:
        first = group * self.config.moe_groups
        layers = range(first, min(first + self.config.moe_groups, self.config.num_hidden_layers))
        if isinstance(layer, bool) or not isinstance(layer, int) or layer not in layers:
            raise UserError(f"layer={layer!r} is not in routing group {group}; use one of {layers[0]} to {layers[-1]}")
        return layer - first

    def _router_probs(self, gates: list[tuple[Gates, Gates]], batch: torch.Size) -> list[tuple[Tensor, Tensor] | None]:
        by_layer: list[tuple[Tensor, Tensor] | None] = [None] * self.config.num_hidden_layers
        for layer, (g1, g2) in zip(self.config.router_layers, gates, strict=True):
            by_layer[layer] = g1.dense().unflatten(0, batch), g2.dense().unflatten(0, batch)
        return by_layer

    def _sum_losses(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy summed over the counted targets, and their number."""
        counted = targets != IGNORED
        losses = self.collectives.cross_entropy(logits, targets.masked_fill(~counted, 0))
        return losses.masked_fill(~counted, 0).sum(), counted.sum()
