"""The language-model loss: which targets are counted, their sum, their mean and their gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from monet_train.model.config import MonetConfig
from monet_train.model.transformer import IGNORED, MonetForCausalLM
from tests.model.conftest import tokens

Build = Callable[[MonetConfig], MonetForCausalLM]
BATCH, LENGTH = 3, 12


def masked_targets(counted: int) -> Tensor:
    """Targets [B, S]; ``counted`` of them, at random places, are not ignored."""
    targets = tokens(BATCH, LENGTH).flatten()
    places = torch.randperm(len(targets), generator=torch.Generator().manual_seed(3))
    targets[places[counted:]] = IGNORED
    return targets.view(BATCH, LENGTH)


def reference(model: MonetForCausalLM, ids: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """torch's own cross-entropy over the model's logits."""
    return F.cross_entropy(
        model(ids).logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction=reduction
    )


def gradients(model: MonetForCausalLM, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("counted", [1, 7, BATCH * LENGTH])
def test_sum_mean_and_gradients_are_those_of_the_counted_targets(
    counted: int, config: MonetConfig, build: Build
) -> None:
    model, ids, targets = build(config), tokens(BATCH, LENGTH).flip(0), masked_targets(counted)
    out = model(ids, targets=targets)
    assert out.targets.item() == counted
    for ours, reduction in ((out.loss, "mean"), (out.loss_sum, "sum")):
        expected = reference(model, ids, targets, reduction)
        torch.testing.assert_close(ours, expected)
        found = gradients(model, model(ids, targets=targets).loss if reduction == "mean" else ours)
        for gradient, wanted in zip(found, gradients(model, expected), strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


def test_labels_are_shifted_and_the_last_position_is_not_counted(config: MonetConfig, build: Build) -> None:
    model, labels = build(config), masked_targets(20)
    out = model(tokens(BATCH, LENGTH), labels=labels)
    assert out.targets.item() == (labels[:, 1:] != IGNORED).sum().item()
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    torch.testing.assert_close(out.loss, reference(model, tokens(BATCH, LENGTH), shifted, "mean"))


def test_without_a_counted_target_loss_and_gradients_are_zero(config: MonetConfig, build: Build) -> None:
    model = build(config).train()
    out = model(tokens(BATCH, LENGTH), targets=masked_targets(0))
    assert out.targets.item() == 0
    assert out.loss.item() == out.loss_sum.item() == 0
    assert all((gradient == 0).all() for gradient in gradients(model, out.loss))


def test_without_targets_there_is_no_loss(config: MonetConfig, build: Build) -> None:
    out = build(config)(tokens(BATCH, LENGTH))
    assert out.loss is out.loss_sum is out.targets is None
