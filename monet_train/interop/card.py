"""The README of an exported folder."""

from __future__ import annotations

import torch

from monet_train.model.config import MonetConfig

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [monet, mixture-of-experts]
---
# {name}

A [Monet](https://arxiv.org/abs/2412.04139) (Mixture of Monosemantic Experts for Transformers), made with monet_train.

| | |
|---|---|
| parameters | {parameters:,} |
| layers, width | {c.num_hidden_layers}, {c.hidden_size} |
| attention heads (key/value) | {c.num_attention_heads} ({c.kv_heads}) |
| experts per layer | {c.moe_experts}² = {experts:,} of {c.moe_dim} units, {c.moe_decompose} decomposition |
| routing | {c.moe_heads} heads, about {c.moe_topk} half-experts each; one router for {c.moe_groups} layers |
| vocabulary, context | {c.vocab_size}, {c.max_position_embeddings} |
| stored as | {dtype} |

With transformers 5.0 or newer:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
{tokenizer}
output = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=50)
print(tokenizer.decode(output[0]))
```

`model(input_ids, output_router_probs=True).router_probs` has for each layer the gates of its two half-expert sets
([batch, tokens, heads, {c.moe_experts}]), or None for a layer that shares the router of an earlier one.
"""
OWN_TOKENIZER = 'tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)'
NO_TOKENIZER = "tokenizer = AutoTokenizer.from_pretrained(...)  # the one it was trained with: it is not in this folder"


def model_card(name: str, config: MonetConfig, parameters: int, dtype: torch.dtype, has_tokenizer: bool) -> str:
    """What the model is, how large, and how to load it."""
    return CARD.format(
        name=name,
        c=config,
        parameters=parameters,
        experts=config.moe_experts**2,
        dtype=str(dtype).removeprefix("torch."),
        tokenizer=OWN_TOKENIZER.format(name=name) if has_tokenizer else NO_TOKENIZER,
    )
