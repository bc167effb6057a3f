"""The CUDA kernels on the CPU: ``csrc/cuda`` and its binding compiled as C++ against an emulation of CUDA.

The operations are those of ``torch.ops.monet_emulated``, for CPU tensors. What this shows: what the sources compute,
and that it does not depend on the order in which threads and blocks run. What it does not: anything about speed, the
code that nvcc makes of them, and cuBLAS, whose place torch's CPU products take.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from filelock import FileLock
from torch.utils.cpp_extension import include_paths, library_paths

from monet_train.kernels import fake

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
BUILD = HERE.parents[2] / "build" / "cuda_emulation"
NAME = "monet_emulated"
BINDINGS = ("schema", "autograd", "cuda")
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", f"-I{HERE}"]


def missing() -> str | None:
    """None where the emulation can be built, else why not."""
    return None if shutil.which(_compiler()) else f"no C++ compiler: {_compiler()} not found"


@functools.cache
def load() -> ctypes.CDLL:
    """The library, built if its sources have changed, by one process for all; its operations are registered."""
    BUILD.parent.mkdir(exist_ok=True)
    with FileLock(BUILD.with_suffix(".lock")):
        library = _build()
    torch.ops.load_library(library)
    fake.register(NAME)
    return ctypes.CDLL(str(library))


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def _build() -> Path:
    sources = [
        HERE / "emulation.cpp",
        *(CSRC / "bindings" / f"{name}.cpp" for name in BINDINGS),
        *sorted((CSRC / "cuda").glob("*.cu")),
    ]
    headers = [*HERE.glob("*.h"), *CSRC.glob("*.h"), *CSRC.glob("bindings/*.[hi]*"), *CSRC.glob("cuda/*.*h")]
    state = hashlib.sha256(f"{torch.__version__} {_compiler()} {FLAGS}".encode())
    for path in sorted([*sources, *headers]):
        state.update(path.read_bytes())
    library = BUILD / state.hexdigest()[:16] / "emulation.so"
    if library.exists():
        return library
    shutil.rmtree(BUILD, ignore_errors=True)
    library.parent.mkdir(parents=True)
    framework = [f"-isystem{path}" for path in include_paths()]
    framework += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    framework += [f"-DMONET_LIBRARY={NAME}", "-DMONET_CUDA_DEVICE=CPU"]
    framework += ['-DMONET_TORCH_VERSION="any"', '-DMONET_SOURCES="any"']

    def compile_one(source: Path) -> str:
        target = library.parent / f"{source.name}.o"
        extra = framework if source.parent.name == "bindings" else []
        subprocess.run([_compiler(), *FLAGS, *extra, "-x", "c++", "-c", source, "-o", target], check=True)
        return str(target)

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    linked = [f"-L{path}" for path in library_paths()] + ["-lc10", "-ltorch_cpu", "-ltorch"]
    fresh = library.with_suffix(".new")
    subprocess.run([_compiler(), "-shared", *objects, *linked, "-o", fresh], check=True)
    return fresh.rename(library)
