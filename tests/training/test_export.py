"""A run gives one whole model, whatever it was split over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from monet_train import load_pretrained
from monet_train.interop.export import main as monet_export
from tests.support.commands import exit_status
from tests.support.runs import TINY, train_in_turn, weights

STEPS = 5
SPLITS = {
    "tensor": ["parallel.tensor=2", "zero.stage=1", "train.micro_batch_size=4"],
    "zero3": ["zero.stage=3", "train.micro_batch_size=2"],
}
# Adam's first steps are about the sign of a gradient: with the usual epsilon, rounding decides those of the smallest
# ones, and weights that differ by a tenth of a step may move a token across a threshold (docs/lab-notes.md, "Topologies
# agree until the threshold amplifies rounding").
NO_AMPLIFIER = "optimizer.eps=1e-4"
IDS = torch.randint(512, (2, 48), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same run in one process (``whole``) and on two ranks, split as in ``SPLITS``."""
    folder = tmp_path_factory.mktemp("runs")
    base = [*TINY, f"data.path={shards}", f"train.max_steps={STEPS}", "schedule.warmup_steps=1", NO_AMPLIFIER]
    train_in_turn([[*base, f"run.dir={folder}/whole"]])
    train_in_turn([[*base, *split, f"run.dir={folder}/{name}"] for name, split in SPLITS.items()], processes=2)
    return folder


@pytest.fixture
def export(runs: Path, tmp_path: Path) -> Callable[[str], Path]:
    """``monet-export`` of the run of that name."""

    def command(name: str) -> Path:
        assert exit_status(monet_export, "monet-export", runs / name, tmp_path / name) == 0
        return tmp_path / name

    return command


@pytest.mark.distributed
@pytest.mark.parametrize("name", SPLITS)
def test_run_and_export_are_one_model(name: str, runs: Path, export: Callable[[str], Path]) -> None:
    of_run, of_export = load_pretrained(runs / name), load_pretrained(export(name))
    assert torch.equal(logits(of_run), logits(of_export))
    ours, theirs = of_run.state_dict(), of_export.state_dict()
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


@pytest.mark.distributed
@pytest.mark.parametrize("name", SPLITS)
def test_split_runs_agree_with_the_whole_one(name: str, runs: Path, export: Callable[[str], Path]) -> None:
    torch.testing.assert_close(
        logits(load_pretrained(export(name))), logits(load_pretrained(runs / "whole")), rtol=1e-5, atol=1e-5
    )


@pytest.mark.distributed
@pytest.mark.parametrize("name", SPLITS)
def test_router_statistics_survive(name: str, runs: Path) -> None:
    whole, split = weights(runs / "whole"), weights(runs / name)
    assert whole.keys() == split.keys()
    statistics = [key for key in whole if ".router.norm" in key]
    assert len(statistics) == 2 * 2 * 3  # routers, sides, buffers
    torch.testing.assert_close(
        {key: split[key] for key in statistics}, {key: whole[key] for key in statistics}, rtol=1e-5, atol=1e-6
    )
    # two micro-steps per step, each counted once
    assert [split[key].item() for key in statistics if key.endswith("tracked")] == [2 * STEPS] * 4


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits
