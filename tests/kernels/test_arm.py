"""The CPU kernels and their bindings compile for ARM too, where the portable instruction set is the only one."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

from tests.support import REPOSITORY

COMPILER = "aarch64-linux-gnu-g++"
SOURCES = [
    *sorted((REPOSITORY / "csrc" / "cpu").glob("*.cpp")),
    *(REPOSITORY / "csrc" / "bindings" / f"{name}.cpp" for name in ("schema", "autograd", "cpu")),
]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"{COMPILER} not found on the PATH")
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_compiles_without_a_warning(source: Path, tmp_path: Path) -> None:
    framework = [f"-isystem{path}" for path in (*include_paths(), sysconfig.get_path("include"))]
    flags = ["-std=c++20", "-O1", "-fopenmp", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    flags += ['-DMONET_TORCH_VERSION="any"', '-DMONET_SOURCES="any"']
    command = [COMPILER, *flags, *framework, "-c", source, "-o", tmp_path / "object.o"]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
