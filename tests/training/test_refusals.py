"""Bad input is refused before training: one line that names the key or the file and the remedy, nothing written."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from monet_train.config.compose import compose
from monet_train.errors import EXIT_BAD_INPUT, UserError
from monet_train.parallel.launch import Launch
from monet_train.training.run_folder import lock_run_folder
from monet_train.training.setup import build_trainer
from tests.support.runs import TINY, train

ALONE = Launch(rank=0, world_size=1, local_rank=0)


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """Starting a process group sets RANK and the like, which later tests must not see."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step with its checkpoint. Not to be changed."""
    run = tmp_path_factory.mktemp("trained") / "run"
    configuration = compose([*overrides(run, shards), "train.max_steps=1"])
    with mock.patch.dict(os.environ), build_trainer(configuration, ALONE) as trainer:
        trainer.fit()
    return run


def overrides(run: Path, shards: Path) -> list[str]:
    return [*TINY, f"run.dir={run}", f"data.path={shards}"]


# key=value, and what the line must say: the key and the remedy
BAD_CONFIGURATIONS = {
    "misspelt key": ("train.max_step=5", "train.max_step", "did you mean train.max_steps?"),
    "misspelt section": ("trian.max_steps=5", "trian.max_steps", "did you mean train.max_steps?"),
    "no value": ("train.max_steps", "train.max_steps cannot be read", "key=value"),
    "open bracket": ("optimizer.betas=[0.9", "optimizer.betas=[0.9 cannot be read", "quotes"),
    "bad type": ("train.max_steps=many", "train.max_steps", "many"),
    "model size that is not there": ("model=2b", "model/2b", "850m"),
    "group option that is not there": ("zero=stage9", "zero/stage9", "stage3"),
    "tensor size that does not divide": ("parallel.tensor=3", "parallel.tensor=3", "use one of 1, 2, 4"),
    "global batch that ranks cannot make": ("train.global_batch_size=10", "train.global_batch_size=10", "8 and 12"),
    "sequences too long": ("train.seq_length=1024", "train.seq_length=1024", "model.max_position_embeddings=512"),
    "ZeRO stage that is not there": ("zero.stage=5", "zero.stage=5", "use one of 0, 1, 2, 3"),
    "sequence parallelism": ("parallel.sequence=true", "parallel.sequence=true", "use parallel.sequence=false"),
    "no length": ("train.max_steps=null", "train.max_steps", "train.max_tokens must be given"),
    "seed below 0": ("train.seed=-1", "train.seed=-1", "at least 0"),
    "learning rate that is not a number": ("optimizer.lr=nan", "optimizer.lr=nan", "a number of at least 0"),
    "clipping at no number": ("optimizer.clip=nan", "optimizer.clip=nan", "above 0"),
    "optimizer that is not there": ("optimizer.name=lion", "optimizer.name=lion", "use one of adamw"),
    "schedule that is not there": ("schedule.name=linear", "schedule.name=linear", "use one of cosine"),
    "callback that is not there": ("callbacks=[shout]", "shout is unknown", "install the package that offers it"),
    "no epsilon": ("optimizer.eps=-1", "optimizer.eps=-1", "above 0"),
    "momentum of 1": ("optimizer.betas=[0.9,1.0]", "optimizer.betas=[0.9, 1.0]", "below 1"),
    "rising rate": ("schedule.final=5", "schedule.final=5", "at most 1"),
    "norm without epsilon": ("model.rms_norm_eps=-1", "model.rms_norm_eps=-1", "above 0"),
    "kernels that are not there": ("kernels=fast", "kernels=fast", "auto, native, plain"),
    "no steps": ("train.max_steps=0", "train.max_steps=0", "at least 1"),
    "experts that cannot be chosen": ("model.moe_topk=64", "model.moe_topk=64", "less than model.moe_experts=64"),
    "no data": ("data.path=???", "data.path", "monet-data shards"),
    "data that is not there": ("data.path=nowhere", "nowhere", "monet-data shards"),
    "vocabulary too small": ("model.vocab_size=256", "512 pieces", "set model.vocab_size=512"),
    "checkpoint that is not there": ("checkpoint.resume=nowhere", "checkpoint.resume=nowhere", "give auto, never or"),
    "precision that is not there": ("train.precision=fp8", "train.precision=fp8", "fp32, bf16"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CONFIGURATIONS)
def test_bad_configuration(case: str, shards: Path, tmp_path: Path) -> None:
    bad, *fragments = BAD_CONFIGURATIONS[case]
    message = refusal([*overrides(tmp_path / "run", shards), bad])
    for fragment in fragments:
        assert fragment in message
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_that_is_not_there(shards: Path, tmp_path: Path) -> None:
    message = refusal([*overrides(tmp_path / "run", shards), "train.device=cuda"])
    assert "train.device=cuda" in message
    assert "use train.device=cpu" in message
    assert not (tmp_path / "run").exists()


def test_processes_that_tensor_parallelism_does_not_divide(shards: Path, tmp_path: Path) -> None:
    three = Launch(rank=0, world_size=3, local_rank=0)
    message = refusal([*overrides(tmp_path / "run", shards), "parallel.tensor=2"], three)
    assert "parallel.tensor=2 does not divide the 3 processes" in message
    assert "use one of 1, 3" in message


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_shard(damage: str, shards: Path, tmp_path: Path) -> None:
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    shard = next(copy.glob("*.bin"))
    if damage == "missing":
        shard.unlink()
    else:
        os.truncate(shard, shard.stat().st_size - 2)
    message = refusal(overrides(tmp_path / "run", copy))
    assert str(shard) in message
    assert damage in message
    assert "monet-data shards" in message
    assert not (tmp_path / "run").exists()


# what is changed in the command of a run that has a checkpoint, and what the line must say
CHANGES = {
    "architecture": ("model.moe_heads=2", "model.moe_heads=4", "set it back"),
    "seed": ("train.seed=1", "train.seed=0", "set it back"),
    "sequence length": ("train.seq_length=32", "train.seq_length=64", "set it back"),
    "held-out share": ("data.validation_fraction=0.05", "data.validation_fraction=0.01", "set it back"),
    "global batch": ("train.global_batch_size=16", "train.global_batch_size=8", "set it back"),
    "ZeRO stage": ("zero.stage=2", "zero.stage=1", "set it back"),
    "name": ("run.name=other", "belongs to the run nano", "choose another run.dir"),
    "resume": ("checkpoint.resume=never", "has checkpoints", "checkpoint.resume=auto"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_changed_run(case: str, trained: Path, shards: Path) -> None:
    change, *fragments = CHANGES[case]
    before = contents(trained)
    message = refusal([*overrides(trained, shards), change])
    for fragment in [str(trained), *fragments]:
        assert fragment in message
    assert contents(trained) == before


def test_other_shards(trained: Path, shards: Path) -> None:
    before = contents(trained)
    prefix = next(shards.glob("*.bin")).with_suffix("")  # the same tokens, but nothing says so
    message = refusal(overrides(trained, prefix))
    assert str(trained) in message
    assert "data.path=['shards " in message
    assert "set it back" in message
    assert contents(trained) == before


def test_checkpoint_of_another_run_by_path(trained: Path, shards: Path, tmp_path: Path) -> None:
    checkpoint = trained / "checkpoints" / "step_00000001"
    given = [f"checkpoint.resume={checkpoint}", "model.hidden_size=128"]
    message = refusal([*overrides(tmp_path / "run", shards), *given])
    assert f"{checkpoint} was trained with model.hidden_size=64" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["trainer.json", "trainer_rank_00000.pt", "mp_rank_00_model_states.pt"])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damaged_checkpoint(name: str, damage: str, trained: Path, shards: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(trained / "checkpoints" / "step_00000001", checkpoint)
    if damage == "missing":
        (checkpoint / name).unlink()
    else:
        os.truncate(checkpoint / name, (checkpoint / name).stat().st_size // 2)
    message = refusal([*overrides(tmp_path / "run", shards), f"checkpoint.resume={checkpoint}"])
    if (name, damage) == ("trainer.json", "missing"):
        assert f"checkpoint.resume={checkpoint} is not a checkpoint" in message
    else:
        assert str(checkpoint / name) in message
        assert "move this checkpoint away" in message
    assert not (tmp_path / "run").exists()


def test_folder_that_is_no_run(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    message = refusal(overrides(tmp_path, shards))
    assert f"run.dir={tmp_path}" in message
    assert "choose an empty or new folder" in message
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_folder_that_another_training_holds(trained: Path, shards: Path) -> None:
    before = contents(trained)
    with lock_run_folder(trained):
        message = refusal(overrides(trained, shards))
    assert f"run.dir={trained} is being trained" in message
    assert "choose another run.dir" in message
    assert contents(trained) == before


@pytest.mark.slow
def test_full_disk_while_saving(trained: Path, shards: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    size = 3 * sum(map(len, contents(trained).values())) // 2  # of one checkpoint and a half
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        run = disk / "run"
        (done,) = train([*overrides(run, shards), "train.max_steps=2", "checkpoint.every=1"])
        assert done.returncode == EXIT_BAD_INPUT
        (line,) = error_lines(done.stderr)
        assert f"{run / 'checkpoints'} cannot be written, the disk is full: make room" in line
        assert (run / "checkpoints" / "latest").read_text() == "step_00000001\n"
    finally:
        subprocess.run(["umount", disk], check=True)


def test_command_refuses_misspelt_key(shards: Path, tmp_path: Path) -> None:
    bad, *fragments = BAD_CONFIGURATIONS["misspelt key"]
    (done,) = train([*overrides(tmp_path / "run", shards), bad])
    assert done.returncode == EXIT_BAD_INPUT
    (line,) = error_lines(done.stderr)
    for fragment in fragments:
        assert fragment in line
    assert not (tmp_path / "run").exists()


def test_command_refuses_changed_run(trained: Path, shards: Path) -> None:
    before = contents(trained)
    (done,) = train([*overrides(trained, shards), "train.seed=1"])
    assert done.returncode == EXIT_BAD_INPUT
    (line,) = error_lines(done.stderr)
    assert "set it back" in line
    assert contents(trained) == before


@pytest.mark.distributed
def test_all_ranks_end_when_one_refuses(trained: Path, shards: Path, tmp_path: Path) -> None:
    """Only rank 0 takes the lock; the other rank must not wait for it."""
    run = tmp_path / "run"
    with lock_run_folder(run):
        ranks = train(overrides(run, shards), processes=2)
    assert [rank.returncode for rank in ranks] == [EXIT_BAD_INPUT, EXIT_BAD_INPUT]
    (line,) = error_lines(ranks[0].stderr + ranks[1].stderr)
    assert f"run.dir={run} is being trained" in line
    assert [path.name for path in run.iterdir()] == [".lock"]


def test_a_rank_tells_what_it_alone_may_have(shards: Path, tmp_path: Path) -> None:
    environment = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": ""}
    (done,) = train([*overrides(tmp_path / "run", shards), "train.device=cuda"], **environment)
    assert done.returncode == EXIT_BAD_INPUT
    assert "Traceback" not in done.stderr
    assert "rank 1: error: train.device=cuda, but torch sees no GPU" in done.stderr


@pytest.mark.parametrize(("rank", "world"), [("0", "x"), ("2", "2")])
def test_launcher_that_says_nonsense(rank: str, world: str) -> None:
    (done,) = train(["data.path=shards"], RANK=rank, WORLD_SIZE=world)
    assert done.returncode == EXIT_BAD_INPUT
    (line,) = error_lines(done.stderr)
    assert "unset RANK and WORLD_SIZE" in line


def refusal(command: list[str], launch: Launch = ALONE) -> str:
    """The one line with which a run is refused, through the same entry as the command's."""
    with pytest.raises(UserError) as refused:
        build_trainer(compose(command), launch)
    message = str(refused.value)
    assert "\n" not in message
    assert not torch.distributed.is_initialized()
    return message


def error_lines(stderr: str) -> list[str]:
    """The lines for the user, among everything that libraries print."""
    assert "Traceback" not in stderr
    return [line for line in stderr.splitlines() if line.startswith("error: ")]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
