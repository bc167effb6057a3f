"""Expert sets: how experts are chosen, combined, kept in a file and masked, and which model takes them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import monet_train
from monet_train import ExpertSet
from monet_train.checkpoints.load import load_pretrained
from monet_train.checkpoints.weights import write_model
from monet_train.errors import UserError
from monet_train.kernels import Kernels, extension
from monet_train.model.config import MonetConfig
from monet_train.model.identity import ModelIdentity, identify
from monet_train.model.initialize import initialize
from monet_train.model.transformer import MonetForCausalLM
from tests.model.conftest import CPU, tokens
from tests.model.test_decompositions import expert

H, E, GROUPS = 3, 16, 2
IDS = tokens(2, 12)
Cell = tuple[int, int, int, int, int]  # group, layer, head, i, j


@pytest.fixture
def model(config: MonetConfig, build: Callable[..., MonetForCausalLM]) -> MonetForCausalLM:
    return build(config)


@pytest.fixture
def identity(model: MonetForCausalLM) -> ModelIdentity:
    return identify(model)


def cells(chosen: ExpertSet) -> dict[Cell, float]:
    """Every chosen expert in every layer and head, and its factor."""
    found = {}
    for group, factors in chosen.factors.items():
        for layer, head, i, j in product(range(2), range(H), range(E), range(E)):
            value = factors.expand(2, H, E, E)[layer, head, i, j].item()
            if value == value:
                found[group, 2 * group + layer, head, i, j] = value
    return found


def expected(
    group: int, pairs: list[tuple[int | None, int | None]], factor: float, layers: object = None, heads: object = None
) -> dict[Cell, float]:
    return {
        (group, layer, head, i, j): factor
        for layer, head, i, j in product(range(2 * group, 2 * group + 2), range(H), range(E), range(E))
        if (layers is None or layer in layers)
        and (heads is None or head in heads)
        and any(one in (None, i) and two in (None, j) for one, two in pairs)
    }


CHOICES = {
    "a pair": ([(3, 14)], {}),
    "pairs": ([(3, 14), (15, 0), (3, 13), (3, 14)], {}),
    "half-expert of side 1": ([(7, None)], {}),
    "half-expert of side 2": ([(None, 7)], {}),
    "all of them, overlapping": ([(7, None), (None, 7), (7, 7), (1, 2)], {}),
    "every expert": ([(None, None)], {}),
    "nothing": ([], {}),
    "one head": ([(3, 14), (None, 2)], {"heads": [1]}),
    "one layer": ([(3, 14), (None, 2)], {"layers": [3]}),
    "heads and layers": ([(3, 14), (4, None)], {"heads": [2, 0], "layers": [2, 3]}),
    "no head": ([(3, 14)], {"heads": []}),
}


@pytest.mark.parametrize("factor", [0.0, -1.5])
@pytest.mark.parametrize(("pairs", "where"), CHOICES.values(), ids=CHOICES.keys())
def test_what_is_chosen(
    pairs: list[tuple[int | None, int | None]], where: dict[str, list[int]], factor: float, identity: ModelIdentity
) -> None:
    chosen = ExpertSet.choose(identity, 1, pairs, factor, **where)
    assert cells(chosen) == expected(1, pairs, factor, where.get("layers"), where.get("heads"))
    assert {tuple(pair) for pair in chosen.pairs(1).tolist()} == {cell[3:] for cell in cells(chosen)}
    assert len(chosen) == len({cell[3:] for cell in cells(chosen)})
    assert chosen.pairs(0).shape == (0, 2)
    table = torch.tensor([[-1 if half is None else half for half in pair] for pair in pairs]).view(-1, 2).long()
    assert cells(ExpertSet.choose(identity, 1, table, factor, **where)) == cells(chosen)


def test_a_factor_for_each(identity: ModelIdentity) -> None:
    factors = torch.tensor([0.5, 2.0, 0.0])
    chosen = ExpertSet.choose(identity, 0, [(1, 2), (3, None), (0, 0)], factors, heads=[1])
    assert cells(chosen) == {
        **expected(0, [(1, 2)], 0.5, heads=[1]),
        **expected(0, [(3, None)], 2.0, heads=[1]),
        **expected(0, [(0, 0)], 0.0, heads=[1]),
    }


REFUSED = {
    "group": ({"group": 2, "experts": [(0, 0)]}, "group=2 is not a routing group; use one of 0 to 1"),
    "i": ({"group": 0, "experts": [(16, 0)]}, "i=16 is not in the model; use one of 0 to 15"),
    "j": ({"group": 0, "experts": torch.tensor([[0, -2]])}, "j=-2 is not in the model; use one of 0 to 15"),
    "head": ({"group": 0, "experts": [(0, 0)], "heads": [3]}, "head=3 is not in the model; use one of 0 to 2"),
    "layer": ({"group": 0, "experts": [(0, 0)], "layers": [4]}, "layer=4 is not in the model; use one of 0 to 3"),
    "layer of another group": (
        {"group": 0, "experts": [(0, 0)], "layers": [2]}, "layer=2 is not in routing group 0; use one of 0 to 1",
    ),
    "infinite": ({"group": 0, "experts": [(0, 0)], "factor": float("inf")}, "factor has values that are not finite"),
    "two factors": (
        {"group": 0, "experts": [(1, 1), (1, None)], "factor": torch.tensor([1.0, 2.0])}, "chosen twice",
    ),
    "too few factors": ({"group": 0, "experts": [(1, 1)], "factor": torch.ones(2)}, r"factor of shape \[2\] must be"),
    "a mask": ({"group": 0, "experts": torch.ones(E, E, dtype=torch.bool)}, r"must be pairs \(i, j\)"),
}  # fmt: skip


@pytest.mark.parametrize(("choice", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_not_in_the_model_is_refused(choice: dict, message: str, identity: ModelIdentity) -> None:
    with pytest.raises(UserError, match=message):
        ExpertSet.choose(identity, **choice)


def some(identity: ModelIdentity) -> tuple[ExpertSet, ExpertSet]:
    """Two sets that overlap, in groups, layers and heads."""
    one = ExpertSet.choose(identity, 0, [(3, None), (1, 2)], 0.5)
    one = one.union(ExpertSet.choose(identity, 1, [(5, 5)], 0.25, layers=[3]))
    two = ExpertSet.choose(identity, 0, [(None, 2)], 2.0, heads=[0, 2])
    two = two.union(ExpertSet.choose(identity, 0, [(9, 9)], 3.0, layers=[1]))
    return one, two.union(ExpertSet.choose(identity, 1, [(5, None)], 4.0))


def test_set_arithmetic(identity: ModelIdentity) -> None:
    one, two = some(identity)
    a, b = cells(one), cells(two)
    everything = {cell for group in range(GROUPS) for cell in expected(group, [(None, None)], 0.0)}
    assert cells(one.union(two)) == b | a
    assert cells(two.union(one)) == a | b
    assert cells(one.intersection(two)) == {cell: factor for cell, factor in a.items() if cell in b}
    assert cells(one.inverted()) == dict.fromkeys(everything - a.keys(), 0.0)
    assert cells(one.inverted(1.5)) == dict.fromkeys(everything - a.keys(), 1.5)
    assert cells(one.inverted().inverted()).keys() == a.keys()
    assert cells(one.with_factor(-2.0)) == dict.fromkeys(a, -2.0)
    assert cells(two.scaled(0.5)) == {cell: factor / 2 for cell, factor in b.items()}
    assert cells(one) == a and cells(two) == b  # no operation changes a set
    with pytest.raises(UserError, match="not finite"):
        one.scaled(float("nan"))


def test_a_file_holds_the_set(identity: ModelIdentity, tmp_path: Path) -> None:
    file = tmp_path / "set.experts.safetensors"
    for number, chosen in enumerate([*some(identity), ExpertSet(identity, {}), some(identity)[0].inverted()]):
        described = replace(chosen, description=f"set {number}: Ёжик")
        assert described.save(file) == file
        loaded = ExpertSet.load(file)
        assert cells(loaded) == cells(chosen)
        assert loaded.identity == identity
        assert loaded.description == described.description
        assert loaded.name == str(file)


def test_the_layout_of_a_file(identity: ModelIdentity, tmp_path: Path) -> None:
    """As docs/ describes it for other tools."""
    chosen = ExpertSet.choose(identity, 1, [(3, 14), (2, 7)], torch.tensor([0.0, 0.5]))
    chosen = chosen.union(ExpertSet.choose(identity, 0, [(9, 9)], layers=[1], heads=[2]))
    with safe_open(chosen.save(tmp_path / "set.safetensors"), "pt") as file:
        assert file.metadata().keys() == {"format", "version", "model", "description"}
        assert json.loads(file.metadata()["model"])["moe_experts"] == E
        assert file.get_tensor("experts").tolist() == [[0, 1, 2, 9, 9], [1, -1, -1, 2, 7], [1, -1, -1, 3, 14]]
        assert file.get_tensor("factors").tolist() == [0.0, 0.5, 0.0]


def damage(file: Path, **changes: object) -> None:
    """Write a set's file again with other tensors or metadata."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() | {key: value for key, value in changes.items() if isinstance(value, str)}
    save_file(load_file(file) | {k: v for k, v in changes.items() if isinstance(v, Tensor)}, file, metadata)


DAMAGES = {
    "another file": ({"format": "pt"}, "is not an expert set; give a file that"),
    "a later version": ({"version": "2"}, "has version 2 of the format, this is version 1; use the monet_train that"),
    "no JSON": ({"model": "{"}, "is damaged"),
    "a model without sizes": ({"model": "{}"}, "is damaged .*lacks the field 'num_hidden_layers'"),
    "outside": ({"experts": torch.tensor([[0, -1, -1, 0, 16]], dtype=torch.int32)}, "is damaged .j=16 is not in"),
    "another table": ({"experts": torch.zeros(1, 4, dtype=torch.int32)}, "is damaged"),
    "not finite": ({"factors": torch.tensor([float("nan")])}, "is damaged .factor has values that are not finite"),
}


@pytest.mark.parametrize(("changes", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_file_is_one_line(
    changes: dict[str, object], message: str, identity: ModelIdentity, tmp_path: Path
) -> None:
    file = ExpertSet.choose(identity, 0, [(3, 14)]).save(tmp_path / "a.safetensors")
    damage(file, **changes)
    with pytest.raises(UserError, match=f"^{file} {message}") as refused:
        ExpertSet.load(file)
    assert "\n" not in str(refused.value)


def test_a_truncated_or_missing_file_is_one_line(identity: ModelIdentity, tmp_path: Path) -> None:
    file = ExpertSet.choose(identity, 0, [(3, 14), (None, 1)]).save(tmp_path / "a.safetensors")
    whole = file.read_bytes()
    for kept in range(0, len(whole), 37):
        file.write_bytes(whole[:kept])
        with pytest.raises(UserError, match=rf"^{file} cannot be read \(truncated\?\)") as refused:
            ExpertSet.load(file)
        assert "\n" not in str(refused.value)
    for nowhere in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(UserError, match=f"^{nowhere} is not a file"):
            ExpertSet.load(nowhere)
    weights = tmp_path / "model.safetensors"
    save_file({"lm_head.weight": torch.ones(2)}, weights)
    with pytest.raises(UserError, match=f"^{weights} is not an expert set"):
        ExpertSet.load(weights)
    with pytest.raises(UserError, match=r"none/set cannot be written \(No such file or directory\)"):
        ExpertSet(identity, {}).save(tmp_path / "none" / "set")


def logits(model: MonetForCausalLM) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(params=["plain", "native"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "native" and (reason := extension.missing()):
        pytest.skip(f"native kernels: {reason}")
    return Kernels(request.param)


def test_every_layer_is_the_sum_over_all_its_experts(
    kernels: Kernels, config: MonetConfig, build: Callable[..., MonetForCausalLM]
) -> None:
    """With factors that differ by group, layer and head, against the definition, expert by expert, in fp64."""
    model = build(config, kernels=kernels).double()
    chosen = some(identify(model))[0].union(some(identify(model))[1])
    chosen.apply(model)
    seen: list[tuple[Tensor, Tensor]] = []
    for layer in model.model.layers:
        layer.moe.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    with torch.no_grad():
        out = model(IDS, output_router_probs=True)
    for number, (layer, (x, output)) in enumerate(zip(model.model.layers, seen, strict=True)):
        group, place = divmod(number, config.moe_groups)
        g1, g2 = (g.flatten(0, 1) for g in out.router_probs[group * config.moe_groups])
        factors = chosen.factors[group].nan_to_num(1.0).expand(2, H, E, E)[place].double()
        weights = torch.einsum("thi,thj,hij->tij", g1, g2, factors)
        total = sum(weights[:, i, j, None] * expert(layer.moe, i, j, x) for i, j in product(range(E), range(E)))
        torch.testing.assert_close(output, total, rtol=1e-10, atol=1e-12)


def test_a_set_replaces_every_mask(model: MonetForCausalLM) -> None:
    one, two = some(identify(model))
    unmasked = logits(model)
    one.apply(model)
    first = logits(model)
    two.apply(model)
    assert not torch.equal(logits(model), first)
    one.apply(model)
    assert torch.equal(logits(model), first)
    assert not torch.allclose(first, unmasked)
    ExpertSet(identify(model), {}).apply(model)
    assert torch.equal(logits(model), unmasked)
    one.with_factor(1.0).apply(model)
    torch.testing.assert_close(logits(model), unmasked, rtol=0, atol=1e-5)


def test_all_off(model: MonetForCausalLM) -> None:
    outputs: list[Tensor] = []
    for layer in model.model.layers:
        layer.moe.register_forward_hook(lambda *of: outputs.append(of[2]))
    ExpertSet(identify(model), {}).inverted().apply(model)
    logits(model)
    assert len(outputs) == 4 and all((output == 0).all() for output in outputs)


# Which model a set is for.


@pytest.fixture
def folder(model: MonetForCausalLM, tmp_path: Path) -> Iterator[Path]:
    """The model as a checkpoint."""
    write_model(tmp_path, model.state_dict(), model.config, None)
    return tmp_path


@pytest.fixture(autouse=True)
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*made for a relative")
        yield


def test_identity_survives_a_cast_and_an_export(model: MonetForCausalLM, folder: Path, tmp_path: Path) -> None:
    import transformers

    own = identify(model)
    assert len(own.lineage) >= 1024 // 4
    assert identify(load_pretrained(folder, dtype=torch.bfloat16)) == own
    assert identify(load_pretrained(folder).double()) == own
    for dtype in (torch.float32, torch.bfloat16):
        export = monet_train.save_pretrained(model.to(dtype), tmp_path / f"export {dtype}")
        assert identify(load_pretrained(export)) == own
        theirs = transformers.AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True, dtype=dtype)
        assert identify(theirs) == own


def test_load_pretrained_takes_a_set(model: MonetForCausalLM, folder: Path) -> None:
    chosen = some(identify(model))[0]
    file = chosen.save(folder / "some.experts.safetensors")
    chosen.apply(model)
    assert torch.equal(logits(load_pretrained(folder, experts=file)), logits(model))


def trained(model: MonetForCausalLM, steps: int) -> MonetForCausalLM:
    """The model after some steps of fine-tuning that move its routers."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=0.02)
    for _ in range(steps):
        out = model(IDS, labels=IDS)
        (out.loss + 1e-2 * out.uniformity).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_a_descendant_gets_a_warning(model: MonetForCausalLM) -> None:
    chosen = replace(some(identify(model))[0], name="german.safetensors")
    before = identify(model)
    trained(model, 10)
    assert identify(model) != before
    with pytest.warns(UserWarning, match="german.safetensors was made for a relative of this model") as caught:
        chosen.apply(model)
    assert caught[0].filename == __file__
    assert next(model.model.routers()).mask.factors[0] is not None


def test_another_model_is_refused(model: MonetForCausalLM, config: MonetConfig) -> None:
    chosen = replace(some(identify(model))[0], name="german.safetensors")
    with torch.device("meta"):
        other = MonetForCausalLM(config)
    initialize(other, CPU, seed=1)
    other.set_expert_mask(0, torch.zeros(E, E))
    before = logits(other)
    with pytest.raises(UserError, match=r"^german.safetensors is for another model of the same sizes \((4|5)\d% of"):
        chosen.apply(other)
    assert torch.equal(logits(other), before)
    with pytest.raises(UserError, match="is for another model"):
        chosen.union(some(identify(other))[0])


@pytest.mark.parametrize("change", [{"moe_experts": 32}, {"moe_heads": 2}, {"moe_groups": 4}, {"hidden_size": 64}])
def test_a_model_of_other_sizes_is_refused_by_name(
    change: dict[str, int], model: MonetForCausalLM, config: MonetConfig, build: Callable[..., MonetForCausalLM]
) -> None:
    chosen = replace(some(identify(model))[0], name="german.safetensors")
    ((key, value),) = change.items()
    message = f"^german.safetensors is for a model with {key}={getattr(config, key)}, this one has {key}={value}; use"
    with pytest.raises(UserError, match=message):
        chosen.apply(build(replace(config, **change)))


def test_the_vocabulary_and_the_context_may_change(model: MonetForCausalLM) -> None:
    one = identify(model)
    model.config.vocab_size, model.config.max_position_embeddings = 80, 64
    assert identify(model) == one
