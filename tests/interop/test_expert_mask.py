"""Experts switched off and scaled in transformers, compared with the same masks in our own model."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from monet_train.checkpoints.load import load_pretrained
from monet_train.model.mask import ExpertSet
from tests.interop.test_huggingface import TOLERANCE, deviation, load

H, E = 3, 64


def random_factors(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3)) * 2


def logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize(
    "mask", [random_factors(E, E) > 1, random_factors(H, E, E), random_factors(E), random_factors(H, 1, 1)]
)
@pytest.mark.parametrize("group, layer", [(0, None), (1, None), (1, 3)])
def test_masks_are_those_of_our_model(
    export: Path, answers: dict[str, Tensor], mask: Tensor, group: int, layer: int | None
) -> None:
    ids = answers["input_ids"]
    theirs, ours = load(export), load_pretrained(export)
    unmasked = logits(theirs, ids)
    for model in (theirs, ours):
        model.set_expert_mask(group, mask, layer=layer)
    masked = logits(theirs, ids)
    assert deviation(masked, unmasked) > 100 * TOLERANCE
    assert deviation(masked, logits(ours, ids)) < TOLERANCE
    theirs.clear_expert_mask(group)
    assert torch.equal(logits(theirs, ids), unmasked)


def test_every_expert_off_silences_the_layers_of_the_group(export: Path, answers: dict[str, Tensor]) -> None:
    model = load(export)
    outputs: list[Tensor] = []
    for layer in model.model.layers:
        layer.moe.register_forward_hook(lambda *of: outputs.append(of[2]))
    model.set_expert_mask(1, torch.zeros(E, E, dtype=torch.bool))
    logits(model, answers["input_ids"])
    assert [(output == 0).all().item() for output in outputs] == [False, False, True, True]
    model.clear_expert_mask()
    outputs.clear()
    logits(model, answers["input_ids"])
    assert not any((output == 0).all() for output in outputs)


def test_an_expert_set_applies(export: Path, answers: dict[str, Tensor], tmp_path: Path) -> None:
    ids = answers["input_ids"]
    theirs, ours = load(export), load_pretrained(export)
    chosen = ExpertSet.choose(ours, group=0, experts=[(3, None), (None, 5)])
    chosen = chosen.union(ExpertSet.choose(ours, group=1, experts=[(7, None)], factor=3.0, layers=[2], heads=[1]))
    ExpertSet.load(chosen.save(tmp_path / "set.safetensors")).apply(theirs)
    chosen.apply(ours)
    assert deviation(logits(theirs, ids), logits(ours, ids)) < TOLERANCE
    assert deviation(logits(theirs, ids), logits(load(export), ids)) > TOLERANCE


def test_a_mask_stays_in_training_under_recomputation_and_casts(export: Path, answers: dict[str, Tensor]) -> None:
    ids = answers["input_ids"]
    gradients = []
    for recompute in (False, True):
        model = load(export).train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.set_expert_mask(0, random_factors(H, E, E))
        output = model(ids, labels=ids)
        model.clear_expert_mask()  # a recomputation has the mask of its forward pass
        output.loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    model.set_expert_mask(0, random_factors(E, E))
    assert "factors" not in " ".join(model.state_dict())
    assert model.to(torch.bfloat16).model.layers[1].expert_mask.factors.dtype == torch.float32


@pytest.mark.parametrize(
    "group, layer, mask, message",
    [
        (2, None, torch.ones(E), r"group=2 is not a routing group; use one of 0 to 1"),
        (True, None, torch.ones(E), r"group=True"),
        (1, 1, torch.ones(E), r"layer=1 is not in routing group 1; use one of 2 to 3"),
        (0, None, torch.ones(E + 1), r"does not broadcast to \[H, E, E\] = \[3, 64, 64\]"),
        (0, None, torch.full((E,), torch.nan), r"not finite"),
    ],
)
def test_what_is_no_mask_is_refused(
    exports: dict[str, Path], group: int, layer: int | None, mask: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(exports["tiny_vertical"]).set_expert_mask(group, mask, layer=layer)
