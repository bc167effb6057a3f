"""What all tests share: a Slurm, and small corpora made once per session."""

from __future__ import annotations

import json
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# before anything imports transformers, which reads them once
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hf-modules-")

import pytest
import torch

from data_prep.__main__ import main
from data_prep.recipe import Recipe, Source
from data_prep.train_tokenizer import TokenizerOptions, make_tokenizer
from monet_train.tokenizers import Tokenizer, load_tokenizer
from tests.support import slurm as support_slurm
from tests.support.commands import command, exit_status
from tests.support.corpora import text_of


@pytest.fixture(scope="session", autouse=True)
def no_modules_left_behind() -> Iterator[None]:
    """Removes the code of models that transformers copied."""
    yield
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


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
    folder = tmp_path_factory.mktemp("text")
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = [
        library / name for name in ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "xml")
    ]
    for arguments in (
        ["tokenizer", *sources, "--max-bytes", "1M", "--vocab-size", "512", "--out", folder / "tokenizer"],
        ["shards", *sources, "--max-bytes", "2M", "--tokenizer", folder / "tokenizer", "--out", folder / "shards"],
    ):
        command([sys.executable, "-m", "data_prep", *map(str, arguments)])
    return folder / "shards"


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
