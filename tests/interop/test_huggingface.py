"""The exported folder in transformers, through ``trust_remote_code``: the path that users take."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, StaticCache

from monet_train.checkpoints.load import load_pretrained
from monet_train.interop.export import save_pretrained
from monet_train.interop.hf.modeling_monet import LogitStatistics, mask_for_attention
from monet_train.model.config import MonetConfig
from monet_train.model.transformer import MonetForCausalLM

TOLERANCE = 1e-5  # the contract's, for fp32


def load(folder: Path, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


def deviation(ours: Tensor, reference: Tensor) -> float:
    assert ours.shape == reference.shape
    return (ours.detach().double() - reference.double()).abs().max().item()


def test_evaluation_matches_the_reference(export: Path, answers: dict[str, Tensor]) -> None:
    model = load(export)
    ids = answers["input_ids"]
    with torch.no_grad():
        out = model(ids, labels=ids, output_hidden_states=True, output_router_probs=True)
    assert deviation(out.logits, answers["eval.logits"]) < TOLERANCE
    assert deviation(out.loss, answers["eval.loss"]) < TOLERANCE
    assert len(out.hidden_states) == 5
    for index, hidden in enumerate(out.hidden_states):
        assert deviation(hidden, answers[f"eval.hidden.{index}"]) < TOLERANCE
    assert [probs is None for probs in out.router_probs] == [False, True, False, True]
    for layer in (0, 2):
        for side in (0, 1):
            gates = out.router_probs[layer][side]
            reference = answers[f"eval.router.{layer}.g{side + 1}"]
            assert deviation(gates, reference) < TOLERANCE
            assert torch.equal(gates == 0, reference == 0)


@pytest.mark.parametrize("recomputation", ["off", "non-reentrant", "reentrant"])
def test_training_matches_the_reference(export: Path, answers: dict[str, Tensor], recomputation: str) -> None:
    model = load(export, router_statistics="update").train()
    if recomputation != "off":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers renames this in 6
            model.gradient_checkpointing_enable({"use_reentrant": recomputation == "reentrant"})
        model.enable_input_require_grads()
    ids = answers["input_ids"]
    out = model(ids, labels=ids)
    out.loss.backward()
    assert deviation(out.logits, answers["train.logits"]) < TOLERANCE
    assert deviation(out.loss, answers["train.loss"]) < TOLERANCE
    for name, parameter in model.named_parameters():
        assert deviation(parameter.grad, answers[f"train.grad.{name}"]) < TOLERANCE, name
    buffers = dict(model.named_buffers())
    assert {f"train.buffer.{name}" for name in buffers} == {n for n in answers if n.startswith("train.buffer.")}
    for name, buffer in buffers.items():
        assert deviation(buffer, answers[f"train.buffer.{name}"]) < TOLERANCE, name


def test_names_and_shapes_are_the_published_ones(export: Path, golden_folder: Path) -> None:
    published = load_pretrained(golden_folder).state_dict()
    ours = load(export).state_dict()
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in published.items()}
    assert all(torch.equal(ours[name], published[name]) for name in published)


def test_generation_with_any_cache_equals_generation_without(export: Path, answers: dict[str, Tensor]) -> None:
    model = load(export)
    prompt = answers["input_ids"][:, :9]
    options = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": 20,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    without = model.generate(prompt, use_cache=False, **options)
    assert without.shape == (3, 29)
    assert torch.equal(model.generate(prompt, **options), without)
    assert torch.equal(model.generate(prompt, cache_implementation="static", **options), without)


def test_a_static_cache_without_a_mask(export: Path, answers: dict[str, Tensor]) -> None:
    model = load(export)
    ids = answers["input_ids"]
    cache = StaticCache(config=model.config, max_cache_len=50)
    with torch.no_grad():
        parts = [model(part, past_key_values=cache).logits for part in ids.split([20, 12, 1], 1)]
    assert deviation(torch.cat(parts, 1), answers["eval.logits"]) < TOLERANCE


def test_left_padding_changes_nothing(export: Path, answers: dict[str, Tensor]) -> None:
    model = load(export)
    ids = answers["input_ids"][:1, :8]
    padded = torch.cat([torch.full((1, 5), 7), ids], 1)
    mask = torch.cat([torch.zeros(1, 5, dtype=torch.long), torch.ones_like(ids)], 1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        alone = model(ids).logits
        together = model(padded, attention_mask=mask, position_ids=positions).logits
    assert together.isfinite().all()
    assert deviation(together[:, 5:], alone) < TOLERANCE
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    continued = model.generate(padded, attention_mask=mask, **options)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(continued[:, 5:], expected)


def test_padding_always_attends_to_something() -> None:
    padding = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    mask = mask_for_attention(padding, 1, 3, padding.device)
    assert mask.shape == (2, 1, 3, 4)
    assert mask[0, 0].tolist() == [[False, True, False, False], [False, False, True, False], [False, False, True, True]]
    assert mask[1, 0].tolist() == [[True, True, False, False], [True, True, True, False], [True, True, True, True]]


def test_statistics_move_like_those_of_a_batch_norm() -> None:
    torch.manual_seed(0)
    ours, reference = LogitStatistics(2), nn.BatchNorm1d(2, affine=False)
    for logits in torch.randn(3, 2, 2, 4):  # few values: the variance must be unbiased
        reference(logits)
        values = logits.double().transpose(0, 1).flatten(1)
        ours.follow(values.mean(1), values.var(1, unbiased=False), torch.tensor(values.shape[1]))
    for name, buffer in reference.named_buffers():
        assert deviation(dict(ours.named_buffers())[name], buffer) < 1e-6, name


def test_statistics_that_a_checkpoint_lacks_start_afresh(exports: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(exports["tiny_vertical"], tmp_path / "without")
    weights = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in weights.items() if "norm1" not in n}, folder / "model.safetensors", {"format": "pt"})
    router = load(folder).model.layers[0].router
    assert router.norm1.running_mean.tolist() == [0, 0, 0]
    assert router.norm1.running_var.tolist() == [1, 1, 1]
    assert router.norm1.num_batches_tracked == 0
    assert torch.equal(router.norm2.running_var, weights["model.layers.0.router.norm2.running_var"])


def test_padding_stays_out_of_the_batch_statistics(export: Path, answers: dict[str, Tensor]) -> None:
    ids = answers["input_ids"]
    padded = torch.cat([ids, torch.full((len(ids), 6), 7)], 1)
    mask = (torch.arange(padded.shape[1]) < ids.shape[1]).long().expand_as(padded)
    model = load(export, router_statistics="update").train()
    model(padded, attention_mask=mask)
    for name, buffer in model.named_buffers():
        assert deviation(buffer, answers[f"train.buffer.{name}"]) < TOLERANCE, name


def test_bf16_computes_what_our_model_computes(export: Path, answers: dict[str, Tensor]) -> None:
    ids = answers["input_ids"]
    # the definition is what the export carries; the native kernels round elsewhere
    ours = load_pretrained(export, dtype=torch.bfloat16, kernels="plain")
    for model in (load(export, dtype=torch.bfloat16), load(export).to(torch.bfloat16)):
        assert model.lm_head.weight.dtype == torch.bfloat16
        assert model.model.layers[0].router.norm1.running_mean.dtype == torch.float32
        with torch.no_grad():
            out = model(ids, output_router_probs=True)
            assert out.router_probs[0][0].dtype == torch.float32
            assert torch.equal(out.logits, ours(ids).logits)


def test_grouped_key_value_heads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MonetConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        moe_dim=4, moe_heads=2, moe_experts=16, moe_topk=4, moe_groups=2,
    )  # fmt: skip
    ours = MonetForCausalLM(config).eval()
    theirs = load(save_pretrained(ours, tmp_path / "export"))
    ids = torch.randint(97, (2, 12))
    with torch.no_grad():
        assert deviation(theirs(ids).logits, ours(ids).logits) < TOLERANCE
        first = theirs(ids[:, :7])
        rest = theirs(ids[:, 7:], past_key_values=first.past_key_values)
        assert deviation(rest.logits, ours(ids).logits[:, 7:]) < TOLERANCE


def test_a_model_saved_by_transformers_loads_here(export: Path, answers: dict[str, Tensor], tmp_path: Path) -> None:
    model = load(export, router_statistics="update").train()
    model(answers["input_ids"])  # moves the statistics
    model.eval().save_pretrained(tmp_path / "tuned", max_shard_size="300KB")
    ids = answers["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits
        assert not torch.equal(expected, load(export)(ids).logits)
        assert torch.equal(load(tmp_path / "tuned")(ids).logits, expected)
        assert deviation(load_pretrained(tmp_path / "tuned")(ids).logits, expected) < TOLERANCE


def test_a_fresh_model_has_the_initialisation_of_the_paper(export: Path) -> None:
    config = load(export).config
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        elif parameter.dim() == 1 or name.rsplit(".", 1)[-1] in ("b", "b1", "b2"):
            assert (parameter == 0).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
    assert (model.model.layers[0].router.norm1.running_var == 1).all()


def test_the_base_model_loads_too(export: Path, answers: dict[str, Tensor]) -> None:
    model = AutoModel.from_pretrained(export, trust_remote_code=True)
    with torch.no_grad():
        hidden = model(answers["input_ids"]).last_hidden_state
    assert deviation(hidden, answers["eval.hidden.4"]) < TOLERANCE


@pytest.mark.parametrize("key, value", [("hidden_act", "silu"), ("tie_word_embeddings", True)])
def test_a_variant_that_is_not_monet_is_refused(
    exports: dict[str, Path], tmp_path: Path, key: str, value: object
) -> None:
    folder = shutil.copytree(exports["tiny_vertical"], tmp_path / "variant")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ValueError, match=key):
        load(folder)


def test_the_folder_needs_no_monet_train(exports: dict[str, Path], tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['monet_train'] = None  # importing it raises\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(exports['tiny_vertical'])!r}, trust_remote_code=True)\n"
        "print(model.num_parameters())"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}  # empty: all files come from the folder
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "309680"
