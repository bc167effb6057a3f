"""Tools that wrap, replace or move modules, on an export: adapters, quantizers, offloading, pruning, hooks, Trainer."""

import copy
import importlib
import json
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from transformers import Trainer, TrainingArguments

from monet_train.checkpoints.load import load_pretrained
from monet_train.interop.export import save_pretrained
from monet_train.model.config import MonetConfig
from monet_train.model.transformer import MonetForCausalLM
from tests.interop.test_huggingface import deviation, load

IDS = torch.randint(3, 256, (2, 24), generator=torch.Generator().manual_seed(1))


def optional(name: str) -> ModuleType:
    """A library of the ecosystem; the test skips without it."""
    return pytest.importorskip(name, reason=f"{name} is not installed (pip install monet-train[dev])")


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def expert_projections(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".moe." in n]


def adapted(export: Path, targets: str | list[str], **options: Any) -> nn.Module:
    peft = optional("peft")
    torch.manual_seed(0)
    return peft.get_peft_model(load(export), peft.LoraConfig(target_modules=targets, r=4, **options))


def train(model: nn.Module, steps: int) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_every_adapter_parameter_gets_a_gradient(export: Path) -> None:
    model = adapted(export, "all-linear", init_lora_weights=False).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert sum(".moe." in name for name in trainable) == 2 * len(expert_projections(load(export)))
    assert [n for n, p in trainable.items() if p.grad is None or not p.grad.any()] == []


def test_an_adapter_on_experts_counts_before_and_after_it_is_merged(export: Path) -> None:
    projections = sorted({name.rsplit(".", 1)[1] for name in expert_projections(load(export))})
    model = adapted(export, projections, init_lora_weights=False)
    with_adapter = logits(model)
    assert deviation(with_adapter, logits(load(export))) > 0.1
    assert deviation(logits(model.merge_and_unload()), with_adapter) < 1e-4


@pytest.mark.parametrize("statistics", ["frozen", "update"])
def test_an_adapter_restores_the_model_that_was_trained(export: Path, tmp_path: Path, statistics: str) -> None:
    peft = optional("peft")
    torch.manual_seed(0)
    options: dict[str, str] = {"frozen": {}, "update": {"router_statistics": "update"}}[statistics]  # frozen by default
    saved = {"frozen": None, "update": ["norm1", "norm2"]}[statistics]
    lora = peft.LoraConfig(target_modules="all-linear", r=4, modules_to_save=saved)
    model = peft.get_peft_model(load(export, **options), lora)
    untrained = logits(model)
    train(model, steps=5)
    trained = logits(model)
    assert deviation(trained, untrained) > 0.1
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(load(export, **options), tmp_path)), trained)
    assert deviation(logits(model.merge_and_unload()), trained) < 1e-4


def test_training_leaves_the_statistics_alone_unless_asked(export: Path) -> None:
    before = dict(load(export).named_buffers())
    frozen, updated = load(export), load(export, router_statistics="update")
    for model in (frozen, updated):
        train(model, steps=1)
    assert all(torch.equal(buffer, before[name]) for name, buffer in frozen.named_buffers())
    assert not any(torch.equal(buffer, before[name]) for name, buffer in updated.named_buffers())
    assert deviation(frozen.train()(IDS).logits, logits(frozen)) == 0  # training computes what evaluation does


def test_the_choice_for_the_statistics_is_kept_and_checked(exports: dict[str, Path], tmp_path: Path) -> None:
    export = exports["tiny_vertical"]
    load(export, router_statistics="update").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["router_statistics"] == "update"
    assert load(tmp_path).config.router_statistics == "update"
    message = "router_statistics='moving' is unknown: use 'frozen' or 'update'"
    with pytest.raises(ValueError, match=message):
        load(export, router_statistics="moving")
    with pytest.raises(ValueError, match=message):
        load(export).config.router_statistics = "moving"


def test_experts_can_be_masked_under_an_adapter(exports: dict[str, Path]) -> None:
    model = adapted(exports["tiny_vertical"], "all-linear", init_lora_weights=False)
    unmasked = logits(model)
    model.set_expert_mask(0, torch.zeros(64, dtype=torch.bool))
    assert deviation(logits(model), unmasked) > 0.1
    model.clear_expert_mask()
    assert torch.equal(logits(model), unmasked)


@pytest.mark.parametrize("kind", ["cpu", "cpu with buffers", "disk", "device map"])
def test_an_offloaded_model_computes_the_same(export: Path, tmp_path: Path, kind: str) -> None:
    accelerate = optional("accelerate")
    expected = logits(load(export))
    if kind == "device map":
        places: dict[str, Any] = {f"model.layers.{n}": ("disk", "cpu")[n % 2] for n in range(4)}
        places |= dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head"), "cpu")
        model = load(export, device_map=places, offload_folder=tmp_path)
    elif kind == "disk":
        model = accelerate.disk_offload(load(export), tmp_path, execution_device="cpu")
    else:
        model = accelerate.cpu_offload(load(export), execution_device="cpu", offload_buffers=kind != "cpu")
    assert torch.equal(logits(model), expected)
    half = torch.arange(64) % 2
    whole = load(export)
    for masked in (model, whole):
        masked.set_expert_mask(0, half)
    assert torch.equal(logits(model), logits(whole))


@pytest.fixture(scope="module", params=["vertical", "horizontal"])
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export whose widths are multiples of the blocks of quantizers (64)."""
    torch.manual_seed(0)
    config = MonetConfig(
        vocab_size=256, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        moe_dim=8, moe_heads=2, moe_experts=16, moe_topk=15, moe_groups=2,
        moe_decompose=request.param,
    )  # fmt: skip
    return save_pretrained(MonetForCausalLM(config).eval(), tmp_path_factory.mktemp("wide") / "export")


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_model_computes_nearly_the_same(wide: Path, bits: int) -> None:
    bitsandbytes = optional("bitsandbytes")
    transformers = importlib.import_module("transformers")
    # the fresh statistics let every half-expert pass: no threshold makes a large error of a small one
    quantization = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True, "bnb_4bit_quant_type": "nf4"})
    model = load(wide, quantization_config=quantization, device_map="cpu")
    kind = {8: bitsandbytes.nn.Linear8bitLt, 4: bitsandbytes.nn.Linear4bit}[bits]
    projections = expert_projections(model)
    assert projections == expert_projections(load(wide))
    assert all(isinstance(model.get_submodule(name), kind) for name in projections)
    expected = logits(load(wide))
    assert deviation(logits(model), expected) < {8: 0.1, 4: 0.3}[bits] * expected.std().item()


def test_pruning_reaches_the_experts(export: Path) -> None:
    model = load(export)
    unpruned = logits(model)
    for name in expert_projections(model):
        prune.random_unstructured(model.get_submodule(name), "weight", 0.5)
    pruned = logits(model)
    assert deviation(pruned, unpruned) > 0.1
    moved = copy.deepcopy(model.state_dict())
    model.load_state_dict({n: 2 * t if n.endswith("weight_orig") else t for n, t in moved.items()})
    assert deviation(logits(model), pruned) > 0.1  # the mask is applied at each call, to the weights of that time


@pytest.mark.slow
def test_pruning_or_normalising_any_projection_alone_changes_the_logits(export: Path) -> None:
    unchanged = logits(load(export))
    names = [n for n, m in load(export).named_modules() if isinstance(m, nn.Linear)]
    assert len(names) in (4 * (4 + 6) + 2 * 2 + 1, 4 * (4 + 2) + 2 * 2 + 1)
    for name in names:
        for change in (lambda m: prune.l1_unstructured(m, "weight", 0.5), parametrizations.spectral_norm):
            model = load(export)
            change(model.get_submodule(name))
            assert not torch.equal(logits(model), unchanged), name


def test_forward_hooks_fire_once_on_every_module_with_parameters_or_buffers(export: Path) -> None:
    model = load(export)
    calls = Counter[str]()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    own = [n for n, m in model.named_modules() if [*m.parameters(False), *m.buffers(False)]]
    assert {n for n, m in model.named_modules() if isinstance(m, nn.Linear)} <= {*own}
    for mode in (model.eval, model.train):
        mode()(input_ids=IDS)
        assert {name: calls[name] for name in own} == dict.fromkeys(own, 1)
        calls.clear()


def test_trainer_trains_evaluates_and_predicts(export: Path, tmp_path: Path) -> None:
    optional("accelerate")
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    arguments = TrainingArguments(
        tmp_path / "out", report_to=[], use_cpu=True, max_steps=3, per_device_train_batch_size=2,
        per_device_eval_batch_size=1, learning_rate=1e-2, save_strategy="no",
    )  # fmt: skip
    model = load(export, output_router_probs=True)  # what predictions must not collect
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    predictions = trainer.predict(rows).predictions
    assert predictions.shape == (2, 24, 256)
    assert deviation(torch.from_numpy(predictions), logits(model)) < 1e-4
    trainer.save_model(str(tmp_path / "saved"))
    with torch.no_grad():
        assert deviation(load_pretrained(tmp_path / "saved")(IDS).logits, logits(model)) < 1e-4
