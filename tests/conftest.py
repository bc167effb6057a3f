"""What all tests share: how they run side by side, a Slurm, and small corpora made once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# before anything imports transformers, which reads them once
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hf-modules-")
if "PYTEST_XDIST_WORKER" in os.environ:  # before anything imports torch: the cores belong to the workers
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from data_prep.__main__ import main
from data_prep.recipe import Recipe, Source
from data_prep.train_tokenizer import TokenizerOptions, make_tokenizer
from monet_train.kernels import extension
from monet_train.tokenizers import Tokenizer, load_tokenizer
from tests.support import slurm as support_slurm
from tests.support.commands import command, exit_status
from tests.support.corpora import text_of
from tests.support.shared import made_once

LONG = ("timeout", "distributed", "slurm", "slow")  # markers of tests that take long, the longest first


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A worker takes whole files, which share fixtures, in the order of the collection; all of Slurm goes to one."""
    if config.getoption("dist") != "load":
        return None  # another way was asked for

    from xdist.scheduler import LoadScopeScheduling

    class WholeFiles(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return "slurm" if Path(file).name == "test_slurm.py" else file

    config.option.loadscopereorder = False
    return WholeFiles(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Workers start with the files that take longest, so that none is left with one of them at the end."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    order: dict[Path, int] = {}
    for item in items:
        place = min((LONG.index(mark.name) for mark in item.iter_markers() if mark.name in LONG), default=len(LONG))
        order[item.path] = min(place, order.get(item.path, place))
    items.sort(key=lambda item: order[item.path])


def pytest_sessionstart() -> None:
    """A stale extension ends the run: the tests of the kernels would be skipped, as where there is no compiler."""
    if extension.missing() == extension.STALE:
        raise pytest.UsageError(f"the native kernels were {extension.STALE}")


def pytest_unconfigure() -> None:
    """Removes the code of models that transformers copied; in workers, and in the process that only starts them."""
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGCHLD, signal.SIGUSR1, signal.SIGUSR2)
# set by torch, DeepSpeed and fastokens for themselves when they are imported or first used, and meant to stay
SET_AT_IMPORT = {
    "TORCHINDUCTOR_CACHE_DIR",
    "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR",
    "PYTORCH_NVML_BASED_CUDA_CHECK",
    "DS_ACCELERATOR",
    "FASTOKENS_BPE_THREADS",
}


def process_state() -> dict[str, object]:
    """What a test could leave changed for those after it."""
    exempt = SET_AT_IMPORT | {"PYTEST_CURRENT_TEST"}
    return {
        **{f"environment variable {name}": value for name, value in os.environ.items() if name not in exempt},
        **{f"handler of {number.name}": signal.getsignal(number) for number in SIGNALS},
        "sys.argv": list(sys.argv),
        "working directory": Path.cwd(),
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
    }


@pytest.fixture(autouse=True)
def process_stays_as_it_was() -> Iterator[None]:
    """No test changes the process for the next: which one that is depends on how many workers there are."""
    before = process_state()
    yield
    after = process_state()
    changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    assert {name: (before.get(name), after.get(name)) for name in changed} == {}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread: in models as small as most of the tests', threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def slurm() -> Iterator[dict[str, str]]:
    """The environment of a running Slurm of two nodes."""
    if reason := support_slurm.missing():
        pytest.skip(reason)
    with support_slurm.local_slurm(nodes=2) as environment:
        yield environment


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of sources of the standard library, made by the commands a user would give. Read only.

    Not the source ``python``: that has the licences of whatever is installed, whose characters need not fit 512 pieces.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = [
        library / name for name in ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "xml")
    ]

    def make(folder: Path) -> None:
        for arguments in (
            ["tokenizer", *sources, "--max-bytes", "1M", "--vocab-size", "512", "--out", folder / "tokenizer"],
            ["shards", *sources, "--max-bytes", "2M", "--tokenizer", folder / "tokenizer", "--out", folder / "shards"],
        ):
            command([sys.executable, "-m", "data_prep", *map(str, arguments)])

    return made_once(tmp_path_factory, "text", make) / "shards"


@pytest.fixture(scope="session")
def jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 documents in two files, with labels. Read only."""
    folder = tmp_path_factory.mktemp("jsonl")
    for part in range(2):
        lines = [
            json.dumps({"text": text_of(i), "lang": ("en", "ru")[i % 2], "source": "made up"}, ensure_ascii=False)
            for i in range(part * 150, part * 150 + 150)
        ]
        (folder / f"part-{part}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer(jsonl: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A SentencePiece model of 400 pieces, trained on ``jsonl``."""
    folder = tmp_path_factory.mktemp("tokenizer") / "model"
    make_tokenizer(Recipe([Source(str(jsonl / "*.jsonl"))]), TokenizerOptions(400), folder)
    return load_tokenizer(folder)


@pytest.fixture
def data(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """``monet-data`` in this process: ``data(arguments...)`` -> exit status, standard output, standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        status = exit_status(main, "monet-data", *arguments)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run
