"""Finding and reading checkpoints, and what is refused."""

import json
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from monet_train.checkpoints.layout import resolve_checkpoint
from monet_train.checkpoints.load import load_pretrained
from monet_train.errors import UserError
from tests.support import GOLDEN


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint that a test may spoil."""
    return shutil.copytree(GOLDEN / "tiny_vertical", tmp_path / "checkpoint")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with two step folders; the older one holds the vertical model."""
    for step, name in ((100, "tiny_vertical"), (200, "tiny_horizontal")):
        shutil.copytree(GOLDEN / name, tmp_path / "run" / "checkpoints" / f"step_{step:08d}")
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step_00000200\n")
    return tmp_path / "run"


def test_a_run_means_its_newest_step(run: Path) -> None:
    newest = run / "checkpoints" / "step_00000200"
    assert resolve_checkpoint(run) == newest
    assert resolve_checkpoint(str(run / "checkpoints")) == newest
    assert resolve_checkpoint(newest) == newest
    older = run / "checkpoints" / "step_00000100"
    assert resolve_checkpoint(older) == older
    assert load_pretrained(run).config.moe_decompose == "horizontal"
    assert load_pretrained(older).config.moe_decompose == "vertical"


def test_what_is_no_checkpoint_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent is not a folder"):
        resolve_checkpoint(tmp_path / "absent")
    with pytest.raises(UserError, match=r"neither config\.json nor checkpoints/latest"):
        resolve_checkpoint(tmp_path)
    shutil.rmtree(run / "checkpoints" / "step_00000200")
    with pytest.raises(UserError, match="latest names step_00000200, which is not a checkpoint"):
        resolve_checkpoint(run)


def test_the_model_is_ready_for_evaluation_and_for_training(checkpoint: Path) -> None:
    model = load_pretrained(checkpoint)
    assert not model.training
    assert all(p.requires_grad and not p.is_meta for p in model.parameters())
    assert all(not b.is_meta for b in model.buffers())


def test_dtype_changes_parameters_and_not_statistics(checkpoint: Path) -> None:
    model = load_pretrained(checkpoint, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.layers[0].router.norm2.running_var.dtype == torch.float32


def test_statistics_that_were_stored_in_bf16_are_widened(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    narrow = {name: t.bfloat16() if t.is_floating_point() else t for name, t in weights.items()}
    save_file(narrow, checkpoint / "model.safetensors")
    model = load_pretrained(checkpoint)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.model.layers[0].router.norm1.running_mean.dtype == torch.float32


def test_old_torch_files_load(checkpoint: Path) -> None:
    expected = load_pretrained(checkpoint).state_dict()
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    torch.save(weights, checkpoint / "pytorch_model.bin")
    loaded = load_pretrained(checkpoint).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def change_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """Spoil the weights of a checkpoint."""

    def spoil(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return spoil


def change_config(**values: object) -> Callable[[Path], object]:
    """Change or, with None, remove keys of config.json."""

    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return spoil


def truncate(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def index_a_missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def hide_code_in_a_torch_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    # not a Path or a Namespace: Megatron, once imported, declares these safe to unpickle
    torch.save({"lm_head.weight": Fraction(1, 2)}, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (change_weights(lambda w: w.pop("model.norm.weight")), r"model\.safetensors lacks model\.norm\.weight"),
        (
            change_weights(lambda w: w.pop("model.layers.0.router.norm1.running_var")),
            r"model\.safetensors lacks model\.layers\.0\.router\.norm1\.running_var",
        ),
        (
            change_weights(lambda w: w.update({"extra.weight": torch.ones(2), "more.weight": torch.ones(2)})),
            r"model\.safetensors has extra\.weight.*\(and 1 more\)",
        ),
        (
            change_weights(lambda w: w.update({"lm_head.weight": torch.ones(3, 48)})),
            r"model\.safetensors: lm_head\.weight has shape \[3, 48\], config\.json makes \[256, 48\]",
        ),
        (change_config(moe_decompose="horizontal"), r"model\.safetensors lacks model\.layers\.0\.moe\.b "),
        (change_config(moe_experts=32), r"has shape .* config\.json makes"),
        (truncate, r"model\.safetensors cannot be read"),
        (hide_code_in_a_torch_file, r"pytorch_model\.bin cannot be read"),
        (index_a_missing_shard, r"model-00002-of-00002\.safetensors is missing"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"holds no weights"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json is not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), r"config\.json does not hold a JSON object"),
        (change_config(model_type="llama"), r"config\.json: model_type is 'llama'"),
        (change_config(hidden_act="silu"), r"config\.json: hidden_act='silu' is not supported"),
        (change_config(tie_word_embeddings=True), r"config\.json: tie_word_embeddings=True is not supported"),
        (change_config(rope_scaling={"factor": 2.0}), r"config\.json: rope_scaling=.* is not supported"),
        (change_config(moe_topk=64), r"config\.json: model\.moe_topk=64 must be less"),
        (change_config(hidden_size="wide"), r"config\.json: "),
    ],
)
def test_a_spoilt_checkpoint_is_refused_in_one_line(
    checkpoint: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(checkpoint)
    with pytest.raises(UserError, match=message) as refused:
        load_pretrained(checkpoint)
    assert str(checkpoint) in str(refused.value)
    assert "\n" not in str(refused.value)
