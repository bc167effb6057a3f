"""Attention: the cache, documents in one sequence, grouped heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from monet_train.model.attention import KVCache
from monet_train.model.config import MonetConfig
from monet_train.model.transformer import MonetForCausalLM
from tests.model.conftest import tokens

Build = Callable[[MonetConfig], MonetForCausalLM]


@pytest.mark.parametrize("kv_heads", [None, 2, 1])
@pytest.mark.parametrize("pieces", [[12], [5, 7], [4, 1, 1, 6], [1] * 12])
def test_cache_equals_full_forward(kv_heads: int | None, pieces: list[int], config: MonetConfig, build: Build) -> None:
    model = build(replace(config, num_key_value_heads=kv_heads))
    ids, cache = tokens(2, 12), KVCache()
    with torch.no_grad():
        logits = torch.cat([model(piece, cache=cache).logits for piece in ids.split(pieces, 1)], 1)
        torch.testing.assert_close(logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert cache.length == 12


def test_the_future_changes_nothing(config: MonetConfig, build: Build) -> None:
    model, ids = build(config), tokens(1, 12)
    changed = ids.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % config.vocab_size
    with torch.no_grad():
        before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(after[:, :7], before[:, :7])
    assert not torch.allclose(after[:, 7:], before[:, 7:], atol=1e-2)


def test_documents_in_one_sequence_equal_documents_alone(config: MonetConfig, build: Build) -> None:
    model, ids = build(config), tokens(1, 12)
    lengths = [4, 1, 7]
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        together = model(ids, segments=segments, positions=positions).logits
        alone = torch.cat([model(document).logits for document in ids.split(lengths, 1)], 1)
        mixed = model(ids).logits
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together[:, 4:], mixed[:, 4:], atol=1e-2)  # the mask matters
    torch.testing.assert_close(together[:, :4], mixed[:, :4])


def test_rotation_depends_on_distance_alone(config: MonetConfig, build: Build) -> None:
    model, ids = build(config), tokens(1, 8)
    with torch.no_grad():
        near = model(ids, positions=torch.arange(8)[None]).logits
        far = model(ids, positions=torch.arange(8)[None] + 17).logits
        stretched = model(ids, positions=torch.arange(8)[None] * 2).logits
    torch.testing.assert_close(far, near, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(stretched, near, atol=1e-2)


def test_grouped_heads_equal_repeated_heads(config: MonetConfig, build: Build) -> None:
    """A model with two key/value heads equals one with four heads that are equal in pairs."""
    grouped = build(replace(config, num_key_value_heads=2))
    whole = build(config)
    state = grouped.state_dict()
    for name, value in state.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            state[name] = value.unflatten(0, (2, config.head_dim)).repeat_interleave(2, 0).flatten(0, 1)
    whole.load_state_dict(state)
    ids = tokens(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(grouped(ids).logits, whole(ids).logits, rtol=1e-5, atol=1e-5)
