"""Exports: what the folder holds, that nothing is lost, and what is never overwritten."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from monet_train.checkpoints.load import load_pretrained
from monet_train.errors import UserError
from monet_train.interop.export import main, save_pretrained
from monet_train.kernels import plain
from monet_train.model.transformer import MonetForCausalLM
from tests.support import GOLDEN
from tests.support.commands import exit_status


@pytest.fixture
def model() -> MonetForCausalLM:
    return load_pretrained(GOLDEN / "tiny_vertical")


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_round_trip_is_exact(export: Path, golden_folder: Path, answers: dict[str, torch.Tensor]) -> None:
    before, after = load_pretrained(golden_folder), load_pretrained(export)
    assert after.config == before.config
    with torch.no_grad():
        assert torch.equal(after(answers["input_ids"]).logits, before(answers["input_ids"]).logits)


def test_the_files_are_the_published_ones_and_our_code(export: Path, golden_folder: Path) -> None:
    published = json.loads((golden_folder / "config.json").read_text())
    ours = json.loads((export / "config.json").read_text())
    assert ours.pop("auto_map")["AutoModelForCausalLM"] == "modeling_monet.MonetForCausalLM"
    for config in (published, ours):
        config.pop("transformers_version")
    assert ours == published
    published_weights, our_weights = (load_file(f / "model.safetensors") for f in (golden_folder, export))
    assert our_weights.keys() == published_weights.keys()
    assert all(torch.equal(our_weights[name], tensor) for name, tensor in published_weights.items())
    assert (export / "monet_plain.py").read_bytes() == Path(plain.__file__).read_bytes()
    assert (export / "model.safetensors").stat().st_mode == (export / "config.json").stat().st_mode
    card = (export / "README.md").read_text()
    assert f"{sum(p.numel() for p in load_pretrained(export).parameters()):,}" in card
    assert f"64² = {64**2:,}" in card


def test_large_weights_are_sharded(model: MonetForCausalLM, tmp_path: Path, exports: dict[str, Path]) -> None:
    folder = save_pretrained(model, tmp_path / "sharded", max_shard_size="400KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    for loaded in (load_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)):
        weights = loaded.state_dict()
        assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_command_exports_a_run_in_bf16(tmp_path: Path) -> None:
    step = shutil.copytree(GOLDEN / "tiny_horizontal", tmp_path / "run" / "checkpoints" / "step_00000007")
    (step.parent / "latest").write_text(step.name)
    assert exit_status(main, "monet-export", tmp_path / "run", tmp_path / "out" / "hf", "--dtype", "bf16") == 0
    original, exported = (load_file(f / "model.safetensors") for f in (step, tmp_path / "out" / "hf"))
    for name, tensor in exported.items():
        statistics = "norm1" in name or "norm2" in name
        assert torch.equal(tensor, original[name] if statistics else original[name].bfloat16()), name
    assert json.loads((tmp_path / "out" / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hf", trust_remote_code=True)
    assert loaded.dtype == torch.bfloat16


def test_occupied_folders_stay_as_they_are(model: MonetForCausalLM, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="file is a file"):
        save_pretrained(model, tmp_path / "file")
    for force in (False, True):
        with pytest.raises(UserError, match="used is not empty and not an earlier export"):
            save_pretrained(model, tmp_path / "used", force=force)
    assert contents(tmp_path) == before


def test_an_earlier_export_is_replaced_only_by_force(model: MonetForCausalLM, tmp_path: Path) -> None:
    folder = save_pretrained(model, tmp_path / "export")
    first = contents(tmp_path)
    other = load_pretrained(GOLDEN / "tiny_horizontal")
    with pytest.raises(UserError, match="holds an earlier export; give --force"):
        save_pretrained(other, folder)
    assert contents(tmp_path) == first
    save_pretrained(other, folder, force=True)
    assert load_pretrained(folder).config.moe_decompose == "horizontal"
    assert [entry.name for entry in tmp_path.iterdir()] == ["export"]

    (folder / "notes.txt").write_text("mine")
    second = contents(tmp_path)
    with pytest.raises(UserError, match=r"holds notes\.txt, which no export wrote"):
        save_pretrained(model, folder, force=True)
    assert contents(tmp_path) == second


def test_a_failed_export_leaves_nothing_behind(model: MonetForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json is not a file"):
        save_pretrained(model, tmp_path / "export", tmp_path / "tokenizer.json")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    assert save_pretrained(model, tmp_path / "empty") == tmp_path / "empty"
    assert load_pretrained(tmp_path / "empty").config == model.config


def test_a_place_that_cannot_be_written_is_refused(model: MonetForCausalLM, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"export cannot be written: .*file"):
        save_pretrained(model, tmp_path / "file" / "export")
    assert (tmp_path / "file").read_text() == "mine"


def test_the_working_folder_can_be_the_target(
    model: MonetForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save_pretrained(model, ".")
    assert load_pretrained(tmp_path / "here").config == model.config
    assert (tmp_path / "here" / "README.md").read_text().count("# here") == 1


@pytest.mark.parametrize(
    "source, message", [("absent", "absent is not a folder"), ("empty", "neither config.json nor checkpoints/latest")]
)
def test_command_refuses_in_one_line(
    source: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert exit_status(main, "monet-export", tmp_path / source, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
