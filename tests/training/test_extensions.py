"""Each extension point of training is used once: an optimizer, a schedule, a callback of another package."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from monet_train.config.compose import compose
from monet_train.config.schema import OptimizerSection, ScheduleSection
from monet_train.errors import UserError
from monet_train.model.transformer import MonetForCausalLM
from monet_train.parallel.launch import Launch
from monet_train.training.callbacks.table import BUILT_IN, find_callbacks
from monet_train.training.loop import Phase, Trainer
from monet_train.training.optimizers import OPTIMIZERS, decay_groups
from monet_train.training.schedules import SCHEDULES
from monet_train.training.setup import build_trainer
from tests.support.runs import TINY, records, weights

# A package as pip installs it: a module, and the entry points of its metadata.
PACKAGE = '''
from dataclasses import dataclass

from monet_train.training.callbacks.routers import RouterUsage
from monet_train.training.loop import Callback, Phase
from monet_train.training.records import Part


@dataclass(frozen=True)
class Busiest(Part):
    """The router with the most active half-experts so far."""

    busiest_router: int
    busiest_active: float


class BusiestRouter(Callback):
    name = "busiest_router"
    phase = Phase.MEASURE

    def __init__(self):
        self.best = Busiest(-1, 0.0)

    def state_dict(self):
        return {"best": (self.best.busiest_router, self.best.busiest_active)}

    def load_state_dict(self, state):
        self.best = Busiest(*state["best"])

    def on_step(self, trainer, record):
        usage = record.get(RouterUsage)
        for layer, active in zip(usage.layers, usage.active):
            if sum(active) > self.best.busiest_active:
                self.best = Busiest(layer, sum(active))
        record.add(self.best)


class Impostor(Callback):
    name = "wandb"
    phase = Phase.WRITE
'''
ENTRY_POINTS = """
[monet_train.callbacks]
busiest_router = busiest:BusiestRouter
progress = busiest:Impostor
impostor = busiest:Impostor
no_callback = busiest:dataclass
gone = busiest:Gone
twice = busiest:BusiestRouter
"""


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """Starting a process group sets RANK and the like, which later tests must not see."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package ``busiest``, installed."""
    for name, points in (("busiest", ENTRY_POINTS), ("copycat", "[monet_train.callbacks]\ntwice = other:Thing\n")):
        metadata = tmp_path / "site" / f"{name}-1.0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(points)
    (tmp_path / "site" / "busiest.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield
    sys.modules.pop("busiest", None)


def fit(run: Path, shards: Path, *overrides: str) -> Trainer:
    """A training in this process, to its end."""
    base = [*TINY, f"data.path={shards}", f"run.dir={run}", "checkpoint.every=2"]
    with build_trainer(compose([*base, *overrides]), Launch(0, 1, 0)) as trainer:
        trainer.fit()
    return trainer


def resumed_equals_whole(folder: Path, shards: Path, *overrides: str) -> None:
    """A run of 2 steps that resumes to 4 ends like one of 4 steps, bit for bit."""
    fit(folder / "whole", shards, "train.max_steps=4", *overrides)
    fit(folder / "run", shards, "train.max_steps=2", *overrides)
    fit(folder / "run", shards, "train.max_steps=4", *overrides)
    assert records(folder / "run") == records(folder / "whole")
    ours, theirs = weights(folder / "run"), weights(folder / "whole")
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def sgd(model: MonetForCausalLM, config: OptimizerSection) -> torch.optim.SGD:
    return torch.optim.SGD(decay_groups(model, config.weight_decay), lr=0.0, momentum=config.betas[0])


def hold(step: int, total: int, config: ScheduleSection) -> float:
    """Warm up, then stay: a schedule that does not ask how long the run is."""
    return min(1.0, (step + 1) / max(1, config.warmup_steps))


@pytest.mark.slow
@pytest.mark.parametrize("variant", [("zero.stage=2",), ("zero.stage=0", "train.precision=bf16")])
def test_an_optimizer_and_a_schedule(
    variant: tuple[str, ...], shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPTIMIZERS, "sgd", sgd)
    monkeypatch.setitem(SCHEDULES, "hold", hold)
    chosen = ["optimizer.name=sgd", "optimizer.lr=0.1", "schedule.name=hold", "schedule.warmup_steps=2"]
    resumed_equals_whole(tmp_path, shards, *chosen, *variant)
    whole = records(tmp_path / "whole")
    assert [record["lr"] for record in whole] == pytest.approx([0.05, 0.1, 0.1, 0.1])

    adamw = fit(tmp_path / "adamw", shards, "train.max_steps=2", *chosen, "optimizer.name=adamw", *variant)
    assert isinstance(adamw.engine.basic_optimizer, torch.optim.AdamW)
    others = records(tmp_path / "adamw")
    assert others[0]["loss"] == whole[0]["loss"]  # the same initial weights
    assert others[1]["loss"] != whole[1]["loss"]


@pytest.mark.slow
def test_a_run_keeps_its_optimizer(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, "sgd", sgd)
    fit(tmp_path / "run", shards, "train.max_steps=2")
    with pytest.raises(UserError, match=r"optimizer\.name=adamw, this configuration has sgd"):
        fit(tmp_path / "run", shards, "train.max_steps=4", "optimizer.name=sgd")


@pytest.mark.slow
@pytest.mark.usefixtures("package")
def test_a_callback_of_another_package(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEDULES, "hold", hold)
    resumed_equals_whole(tmp_path, shards, "callbacks=[busiest_router]", "schedule.name=hold")
    for record in records(tmp_path / "run"):  # the record has what the callback added, after what it read
        assert record["busiest_router"] in (0, 2)
        assert record["busiest_active"] >= sum(record["router/0/active"])
    most = [record["busiest_active"] for record in records(tmp_path / "run")]
    assert most == sorted(most)  # its state went through the checkpoint


@pytest.mark.usefixtures("package")
def test_callbacks_that_are_refused(shards: Path, tmp_path: Path) -> None:
    refusals = {
        "nonsense": "nonsense is unknown; use busiest_router, gone, impostor, no_callback, progress, twice, or install",
        "progress": "there is a callback called progress already; leave it out",
        "impostor": "busiest:Impostor is not a Callback with the name impostor; repair that package",
        "no_callback": "busiest:dataclass is not a Callback with the name no_callback; repair that package",
        "gone": "busiest:Gone cannot be imported",
        "twice": "busiest:BusiestRouter and other:Thing are both called twice; uninstall one",
        "busiest_router,busiest_router": "there is a callback called busiest_router already",
    }
    for names, message in refusals.items():
        with pytest.raises(UserError) as refused:
            fit(tmp_path / "run", shards, f"callbacks=[{names}]")
        assert str(refused.value).startswith("callbacks=[") and message in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_the_order_of_callbacks() -> None:
    phases = [callback.phase for callback in find_callbacks([])]
    assert phases == sorted(phases)  # the table reads in the order of the calls
    assert BUILT_IN[-1].phase == Phase.SAVE
    assert len({callback.name for callback in BUILT_IN}) == len(BUILT_IN)
