"""What the interop tests share: offline transformers, the reference checkpoints, and their exports."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# before anything imports transformers, which reads them once
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="hf-modules-")

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from monet_train.checkpoints.load import load_pretrained
from monet_train.interop.export import save_pretrained

GOLDEN = Path(__file__).parent.parent / "golden"
FORMS = ("tiny_vertical", "tiny_horizontal")


@pytest.fixture(scope="session", autouse=True)
def no_modules_left_behind() -> Iterator[None]:
    yield
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The models here are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    """Each of the two decompositions."""
    return request.param


@pytest.fixture
def golden_folder(form: str) -> Path:
    """A published checkpoint."""
    return GOLDEN / form


@pytest.fixture
def answers(golden_folder: Path) -> dict[str, Tensor]:
    """What the published reference answers for it."""
    return load_file(golden_folder / "golden.safetensors")


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Our export of each published checkpoint."""
    folder = tmp_path_factory.mktemp("exports")
    return {form: save_pretrained(load_pretrained(GOLDEN / form), folder / form) for form in FORMS}


@pytest.fixture
def export(exports: dict[str, Path], form: str) -> Path:
    """Our export of the published checkpoint of ``form``; not to be changed."""
    return exports[form]
