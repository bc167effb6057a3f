"""What the interop tests share: the reference checkpoints and their exports."""

from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from monet_train.checkpoints.load import load_pretrained
from monet_train.interop.export import save_pretrained
from tests.support import GOLDEN

FORMS = ("tiny_vertical", "tiny_horizontal")


@pytest.fixture(autouse=True)
def small_models(one_thread: None) -> None:
    """The models here are small."""


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
