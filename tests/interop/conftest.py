"""What the interop tests share: the reference checkpoints and their exports."""

from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from monet_train.checkpoints.load import load_pretrained
from monet_train.interop.export import save_pretrained
from tests.support import GOLDEN

CHECKPOINTS = ("tiny_vertical", "tiny_horizontal")


@pytest.fixture(autouse=True)
def small_models(one_thread: None) -> None:
    """The models here are small."""


@pytest.fixture(params=CHECKPOINTS)
def checkpoint(request: pytest.FixtureRequest) -> str:
    """A published checkpoint of each of the two decompositions, by name."""
    return request.param


@pytest.fixture
def golden_folder(checkpoint: str) -> Path:
    """Its folder."""
    return GOLDEN / checkpoint


@pytest.fixture
def answers(golden_folder: Path) -> dict[str, Tensor]:
    """What the published reference answers for it."""
    return load_file(golden_folder / "golden.safetensors")


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Our export of each published checkpoint."""
    folder = tmp_path_factory.mktemp("exports")
    return {
        checkpoint: save_pretrained(load_pretrained(GOLDEN / checkpoint), folder / checkpoint)
        for checkpoint in CHECKPOINTS
    }


@pytest.fixture
def export(exports: dict[str, Path], checkpoint: str) -> Path:
    """Our export of that published checkpoint; not to be changed."""
    return exports[checkpoint]
