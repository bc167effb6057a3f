"""``monet-experts profile`` and ``select`` on an atlas of a small model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from monet_train import ExpertSet
from monet_train.analysis.atlas import Atlas
from monet_train.analysis.cli import main
from monet_train.model.transformer import MonetForCausalLM
from tests.support.commands import exit_status

LITTLE = ["--firings", "1", "--documents", "1"]


def test_profile_counts_what_the_rule_gives(atlas: Atlas, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "profile.json"
    assert exit_status(main, "monet-experts", "profile", atlas.folder, "--by", "lang", *LITTLE, "--out", out) == 0
    shown = capsys.readouterr().out
    for group, found in enumerate(json.loads(out.read_text())):
        means = atlas.sums(group, "lang").half(0).mean
        ordered = np.sort(means, axis=0)
        labelled = (ordered[-1] > 0) & (ordered[-1] >= 2 * ordered[-2])
        assert found["labelled"] == labelled.sum() == sum(value["labelled"] for value in found["values"])
        assert found["replicated"] <= found["labelled"]
        assert [value["value"] for value in found["values"]] == ["en", "ru", "zh"]
        assert f"group {group}: of 256, " in shown


@pytest.mark.parametrize("halves", [False, True], ids=["pairs", "halves"])
def test_select_writes_a_set_that_the_model_takes(
    halves: bool, atlas: Atlas, model: MonetForCausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ru.experts.safetensors"
    arguments = ["--by", "lang", "--value", "ru", "--rule", "ratio", "--threshold", "1.2", *LITTLE, "--factor", "0.5"]
    given = [*arguments, *["--halves"] * halves, "--out", out]
    assert exit_status(main, "monet-experts", "select", atlas.folder, *given) == 0
    chosen = ExpertSet.load(out)
    assert f"{len(chosen):,} experts" in capsys.readouterr().out
    for group in atlas.groups:
        mean = atlas.sums(group, "lang", halves).half(0).mean
        passing = set(np.flatnonzero((mean[1] > 0) & (mean[1] >= 1.2 * mean[[0, 2]].mean(0))).tolist())
        pairs = [(int(i), int(j)) for i, j in chosen.pairs(group)]
        if halves:
            expected = {(i, j) for i in range(16) for j in range(16) if i in passing or 16 + j in passing}
            assert set(pairs) == expected
        else:
            assert {i * 16 + j for i, j in pairs} == passing
    chosen.apply(model)
    assert not torch.equal(model(torch.arange(20)[None]).logits, _unmasked(model))


def _unmasked(model: MonetForCausalLM) -> torch.Tensor:
    model.clear_expert_mask()
    return model(torch.arange(20)[None]).logits


REFUSED = {
    "a label that is not there": (["profile", "--by", "langs"], "no label 'langs': did you mean lang?"),
    "a value that is not there": (["select", "--by", "lang", "--value", "rus", "--out", "x"], "did you mean ru?"),
    "a budget above all": (
        ["select", "--by", "lang", "--value", "ru", "--budget", "2", "--out", "x"], "--budget 2.0 is not a share",
    ),
    "nothing that passes": (
        ["select", "--by", "lang", "--value", "ru", "--threshold", "1e9", "--out", "x"], "no expert passes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line(case: str, atlas: Atlas, capsys: pytest.CaptureFixture[str]) -> None:
    (command, *arguments), said = REFUSED[case]
    assert exit_status(main, "monet-experts", command, atlas.folder, *arguments) == 2
    shown = capsys.readouterr().err
    assert said in shown and shown.count("\n") == 1


def test_an_atlas_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(main, "monet-experts", "profile", tmp_path, "--by", "lang") == 2
    assert "is not an atlas" in capsys.readouterr().err
