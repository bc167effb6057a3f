"""Experts switched off and scaled in a whole model; the layers' arithmetic is in tests/kernels/test_masks.py."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from monet_train.checkpoints.load import load_pretrained
from monet_train.errors import UserError
from monet_train.interop.generate import Sampling, generate_tokens
from monet_train.kernels import Kernels, extension
from monet_train.model.config import MonetConfig
from monet_train.model.transformer import MonetForCausalLM
from tests.model.conftest import tokens
from tests.support import GOLDEN

H, E, GROUPS, LAYERS = 3, 16, 2, 4
IDS = tokens(2, 12)


@pytest.fixture(params=["plain", "native"])
def make(
    request: pytest.FixtureRequest, config: MonetConfig, build: Callable[..., MonetForCausalLM]
) -> Callable[[bool], MonetForCausalLM]:
    """Builds models with output biases that matter, and each implementation of the expert operations."""
    if request.param == "native" and (reason := extension.missing()):
        pytest.skip(f"native kernels: {reason}")

    def make_model(recompute: bool) -> MonetForCausalLM:
        built = build(config, kernels=Kernels(request.param), recompute=recompute)
        generator = torch.Generator().manual_seed(1)
        for layer in built.model.layers:
            for name, parameter in layer.moe.named_parameters():
                if name in ("b", "b1", "b2"):
                    parameter.data.normal_(generator=generator)
        return built

    return make_model


@pytest.fixture
def model(make: Callable[[bool], MonetForCausalLM]) -> MonetForCausalLM:
    return make(False)


def random_mask(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(2)) > 0.3


def logits(model: MonetForCausalLM) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def layer_outputs(model: MonetForCausalLM) -> list[Tensor]:
    """What each expert layer puts out."""
    found: list[Tensor] = []
    hooks = [layer.moe.register_forward_hook(lambda *of: found.append(of[2])) for layer in model.model.layers]
    logits(model)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("group", range(GROUPS))
def test_a_mask_is_for_every_layer_of_its_group_alone(model: MonetForCausalLM, group: int) -> None:
    unmasked = logits(model)
    model.set_expert_mask(group, torch.zeros(E, E, dtype=torch.bool))
    off = [(output == 0).all().item() for output in layer_outputs(model)]
    assert off == [layer // 2 == group for layer in range(LAYERS)]
    model.clear_expert_mask(group)
    assert torch.equal(logits(model), unmasked)


def test_a_mask_replaces_the_last_and_clear_takes_all(model: MonetForCausalLM) -> None:
    unmasked = logits(model)
    first, second = random_mask(E, E), random_mask(H, E, E)
    model.set_expert_mask(0, second)
    expected = logits(model)
    assert not torch.equal(expected, unmasked)
    model.set_expert_mask(0, first)
    model.set_expert_mask(1, first)
    assert not torch.equal(logits(model), expected)
    model.set_expert_mask(0, second)
    model.clear_expert_mask(1)
    assert torch.equal(logits(model), expected)
    model.clear_expert_mask()
    assert torch.equal(logits(model), unmasked)


@pytest.mark.parametrize(
    "shape", [(), (E,), (1, E), (E, 1), (E, E), (1, E, E), (H, 1, 1), (H, 1, E), (H, E, 1)], ids=str
)
def test_what_broadcasts(model: MonetForCausalLM, shape: tuple[int, ...]) -> None:
    mask = random_mask(*shape)
    model.set_expert_mask(0, mask)
    by_shape = logits(model)
    stored = next(model.model.routers()).mask.factors
    assert [len(factors) for factors in stored] == [H if len(shape) == 3 and shape[0] == H else 1] * 2
    model.set_expert_mask(0, mask.expand(H, E, E).double())
    torch.testing.assert_close(logits(model), by_shape, rtol=0, atol=0)


def test_a_mask_is_copied(model: MonetForCausalLM) -> None:
    mask = torch.ones(H, E, E)
    model.set_expert_mask(0, mask)
    before = logits(model)
    mask.zero_()
    assert torch.equal(logits(model), before)


def test_ones_and_scales(model: MonetForCausalLM) -> None:
    """Factors of s scale a layer's output by s, gates not being renormalised."""
    unmasked, first = logits(model), layer_outputs(model)[0]
    model.set_expert_mask(0, torch.ones(E, E))
    torch.testing.assert_close(logits(model), unmasked, rtol=0, atol=1e-5)
    model.set_expert_mask(0, torch.tensor(-2.5))
    torch.testing.assert_close(layer_outputs(model)[0], -2.5 * first, rtol=1e-5, atol=1e-5)


def test_gates_and_auxiliary_losses_are_those_without_a_mask(model: MonetForCausalLM) -> None:
    def report() -> list[Tensor]:
        out = copy.deepcopy(model).train()(IDS, output_router_probs=True)
        gates = out.router_probs[0]
        return [*gates, out.routers[0].uniformity, out.routers[0].ambiguity]

    unmasked = report()
    model.set_expert_mask(0, random_mask(E, E))
    assert all(torch.equal(a, b) for a, b in zip(report(), unmasked, strict=True))


@pytest.mark.parametrize("heads", [1, H])
def test_recomputation(make: Callable[[bool], MonetForCausalLM], heads: int) -> None:
    """The mask of the forward pass is that of its backward pass, even where another was set between them."""

    def gradients(recompute: bool) -> list[Tensor]:
        model = make(recompute).train()
        model.set_expert_mask(0, random_mask(heads, E, E))
        loss = model(IDS, labels=IDS).loss
        model.clear_expert_mask()
        loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(gradients(False), gradients(True), strict=True))


def test_training_goes_around_an_expert_that_is_off(model: MonetForCausalLM) -> None:
    """Half-expert 5 of side 2 gets no gradient in the layers of the group where it is off, and one elsewhere."""
    keep = torch.ones(E, dtype=torch.bool)
    keep[5] = False
    model.train()
    model.set_expert_mask(0, keep)
    model(IDS, labels=IDS).loss.backward()
    name = "b2" if model.config.moe_decompose == "vertical" else "b"
    gradients = [layer.moe.get_parameter(name).grad[5] for layer in model.model.layers]
    assert [(gradient != 0).any().item() for gradient in gradients] == [False, False, True, True]


def test_generation_with_a_cache() -> None:
    model = load_pretrained(GOLDEN / "tiny_vertical")
    greedy = Sampling(temperature=0)
    unmasked = list(generate_tokens(model, [5, 6, 7], 20, greedy))
    experts = model.config.moe_experts
    model.set_expert_mask(0, random_mask(experts, experts))
    masked = list(generate_tokens(model, [5, 6, 7], 20, greedy))
    assert masked != unmasked
    assert masked == list(generate_tokens(model, [5, 6, 7], 20, greedy, use_cache=False))


def test_precision_and_state_dict(model: MonetForCausalLM) -> None:
    names = model.state_dict().keys()
    model.set_expert_mask(0, torch.full((E, E), 0.1))
    assert model.state_dict().keys() == names
    router = next(model.model.routers())
    model.bfloat16()
    for factors in router.mask.factors:
        assert factors.dtype == torch.float32
        assert (factors == torch.tensor(0.1)).all()
    assert logits(model).isfinite().all()
    model.set_expert_mask(0, torch.full((E, E), 0.1))
    assert all(factors.dtype == torch.float32 for factors in router.mask.factors)
    model.double()
    assert all(factors.dtype == torch.float64 for factors in router.mask.factors)
    assert router.mask.factors[0] is router.mask.factors[1]  # one tensor for the layers that share it
    assert logits(model).dtype == torch.float64
    model.to("meta")
    assert all(factors.device.type == "meta" for factors in router.mask.factors)


@pytest.mark.parametrize("recompute", [False, True], ids=["stored", "recomputed"])
def test_layers_of_a_group_may_have_masks_of_their_own(
    make: Callable[[bool], MonetForCausalLM], recompute: bool
) -> None:
    """Each layer against the same layer in a group that has its mask throughout, given the same tokens and gates."""
    masks = [random_mask(E, E), random_mask(H, E, E)]

    def layers_and_gradients(assign: Callable[[MonetForCausalLM], None]) -> tuple[list[Tensor], list[Tensor]]:
        model = make(recompute).train()
        assign(model)
        outputs: list[Tensor] = []
        for layer in list(model.model.layers)[:2]:
            layer.moe.register_forward_hook(lambda *of: outputs.append(of[2].detach()))
        # attention of the second layer sees nothing of the first expert layer: both expert layers get the same tokens
        model.model.layers[0].moe.register_forward_hook(lambda *of: of[2].detach() * 0)
        loss = model(IDS, labels=IDS).loss
        model.clear_expert_mask()
        loss.backward()
        return outputs[:2], [p.grad for p in model.model.layers[1].moe.parameters()]

    def own_masks(model: MonetForCausalLM) -> None:
        for layer, mask in enumerate(masks):
            model.set_expert_mask(0, mask, layer=layer)

    outputs, gradients = layers_and_gradients(own_masks)
    for layer, mask in enumerate(masks):
        throughout = layers_and_gradients(lambda model, mask=mask: model.set_expert_mask(0, mask))
        assert torch.equal(outputs[layer], throughout[0][layer])
    assert all(torch.equal(a, b) for a, b in zip(gradients, throughout[1], strict=True))


def test_a_mask_for_the_group_replaces_those_of_its_layers(model: MonetForCausalLM) -> None:
    mask = random_mask(E, E)
    model.set_expert_mask(1, mask)
    expected = logits(model)
    model.set_expert_mask(1, torch.zeros(E, E), layer=3)
    assert [(output == 0).all().item() for output in layer_outputs(model)] == [False, False, False, True]
    model.set_expert_mask(1, mask)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("layer", [1, 4, -1, 2.0, True])
def test_a_layer_of_another_group_is_refused(model: MonetForCausalLM, layer: int) -> None:
    with pytest.raises(UserError, match="is not in routing group 1; use one of 2 to 3"):
        model.set_expert_mask(1, torch.ones(E, E), layer=layer)


BAD_MASKS: dict[str, tuple[object, str]] = {
    "wrong experts": (torch.ones(E, E + 1), rf"mask of shape \[16, 17\] .* \[H, E, E\] = \[{H}, {E}, {E}\]"),
    "wrong heads": (torch.ones(H + 1, 1, 1), r"mask of shape \[4, 1, 1\] does not broadcast"),
    "four dimensions": (torch.ones(1, H, E, E), r"mask of shape \[1, 3, 16, 16\] does not broadcast"),
    "nan": (torch.full((E, E), float("nan")), "mask has values that are not finite"),
    "inf": (torch.full((E,), float("inf")), "mask has values that are not finite"),
    "complex": (torch.ones(E, dtype=torch.complex64), "mask must be a tensor of bool .* not torch.complex64 values"),
    "a list": ([True] * E, "mask must be a tensor of bool .* not list"),
}


@pytest.mark.parametrize(("mask", "message"), BAD_MASKS.values(), ids=BAD_MASKS.keys())
def test_a_bad_mask_is_refused_and_the_last_one_stays(model: MonetForCausalLM, mask: Tensor, message: str) -> None:
    model.set_expert_mask(0, random_mask(E, E))
    before = logits(model)
    with pytest.raises(UserError, match=message):
        model.set_expert_mask(0, mask)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("group", [GROUPS, -1, 0.0, True, "0", None])
def test_a_group_that_is_not_there_is_refused(model: MonetForCausalLM, group: int) -> None:
    message = "is not a routing group; use one of 0 to 1"
    with pytest.raises(UserError, match=message):
        model.set_expert_mask(group, torch.ones(E, E))
    if group is not None:
        with pytest.raises(UserError, match=message):
            model.clear_expert_mask(group)
