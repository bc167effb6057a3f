"""Builds ``csrc/`` into ``monet_train/kernels/_C``; everything else about the package is in pyproject.toml.

The extension is an extra: without torch, without a compiler, or when the build fails, the install still succeeds
and the plain PyTorch definition runs. Its CUDA part is an extra of the extension: it is built where torch is a CUDA
build and nvcc is found, or with MONET_CUDA=1 (to see on any machine with nvcc that it compiles and links); MONET_CUDA=0
leaves it out. TORCH_CUDA_ARCH_LIST is heeded.
"""

from __future__ import annotations

import os
import platform
import re
import runpy
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

BINDINGS = "csrc/bindings"
sources_digest = runpy.run_path("monet_train/kernels/sources.py")["sources_digest"]
COMMON_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-Wall",
    "-Wextra",
]
CUDA_BINDING = "csrc/bindings/cuda.cpp"
CUDA_FLAGS = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
CUDA_ARCHITECTURES = "8.0 9.0+PTX"  # A100, H100 and H200; the driver compiles for newer ones


class BuildKernels(build_ext):
    """Compile every file of ``csrc/`` with flags of its own, link, and put the library in place in one step."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:  # whatever is missing, the package works without its extension
            reason = " ".join(str(error).split()) or type(error).__name__
            self.warn(f"native kernels not built ({reason}); the plain PyTorch definition will run")

    def build_extension(self, ext: Extension) -> None:
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise RuntimeError(f"no C++ compiler: {compiler} not found")
        objects = Path(self.build_temp)
        objects.mkdir(parents=True, exist_ok=True)
        framework = [f"-isystem{path}" for path in include_paths()] + ["-fopenmp", *torch_defines(torch)]

        def compile_one(source: str) -> str:
            target = str(objects / (source.replace("/", ".") + ".o"))
            if source.endswith(".cu"):
                self.spawn([nvcc(), *CUDA_FLAGS, *cuda_architectures(), "-c", source, "-o", target])
            else:
                flags = framework if source.startswith(BINDINGS) else instruction_set(source)
                self.spawn([compiler, *COMMON_FLAGS, *flags, "-c", source, "-o", target])
            return target

        def compile_all(sources: list[str]) -> list[str]:
            with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
                return list(pool.map(compile_one, sources))

        def link(linker: list[str], compiled: list[str]) -> None:
            library = Path(self.get_ext_fullpath(ext.name))
            library.parent.mkdir(parents=True, exist_ok=True)
            # OpenMP is not linked: its symbols come with libtorch, so that both share one pool of threads.
            linked = [f"-L{path}" for path in library_paths()] + ["-lc10", "-ltorch_cpu", "-ltorch"]
            fresh = library.with_suffix(".new")
            self.spawn([*linker, "-shared", *compiled, *linked, "-o", str(fresh)])
            fresh.replace(library)  # a process that has the old library open keeps it

        for_cuda = [source for source in ext.sources if source.endswith(".cu") or source == CUDA_BINDING]
        compiled = compile_all([source for source in ext.sources if source not in for_cuda])
        reason = no_cuda(torch)
        if reason is None:
            try:
                # the runtime that torch has loaded, not a second one
                link([nvcc(), "-ccbin", compiler, "-cudart", "shared"], compiled + compile_all(for_cuda))
                return
            except Exception as error:  # the rest of the extension works without its CUDA part
                reason = " ".join(str(error).split())
        if reason:
            self.warn(f"CUDA kernels not built ({reason}); the plain PyTorch definition will run on GPUs")
        link([compiler], compiled)


def no_cuda(torch) -> str | None:
    """Why the CUDA part is not built: None if it is to be built, nothing to say where nobody would expect it."""
    wanted = os.environ.get("MONET_CUDA")
    if wanted == "0" or (wanted is None and torch.version.cuda is None):
        return ""
    compiler = nvcc()
    if compiler is None:
        return "nvcc found neither on the PATH nor in CUDA_HOME"
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.", said)
    if wanted is None and (release is None or release[1] != torch.version.cuda.split(".")[0]):
        return f"nvcc is of another CUDA than torch's {torch.version.cuda}"
    return None


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def cuda_architectures() -> list[str]:
    """nvcc's options for TORCH_CUDA_ARCH_LIST, such as ``8.0;9.0+PTX``."""
    options = []
    for architecture in re.split(r"[;\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES).strip()):
        number = architecture.removesuffix("+PTX").replace(".", "")
        options += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if architecture.endswith("+PTX"):
            options += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return options


def torch_defines(torch) -> list[str]:
    """Macros that tie the binding to the torch and the sources it is built against."""
    abi = int(torch.compiled_with_cxx11_abi())
    return [
        f"-D_GLIBCXX_USE_CXX11_ABI={abi}",
        f'-DMONET_TORCH_VERSION="{torch.__version__}"',
        f'-DMONET_SOURCES="{sources_digest(Path("csrc"))}"',
    ]


def instruction_set(source: str) -> list[str]:
    """Flags of a kernel that is compiled for one instruction set, chosen when the program runs."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return []
    if source.endswith("_avx512.cpp"):
        return ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mprefer-vector-width=512"]
    if source.endswith("_avx2.cpp"):
        return ["-mavx2", "-mfma"]
    return []


def native_extension() -> Extension:
    """The extension: the bindings, the kernels of each device, and the headers that a source archive must carry."""
    sources = sorted(str(path) for suffix in ("*.cpp", "*.cu") for path in Path("csrc").rglob(suffix))
    headers = sorted(str(path) for suffix in ("*.h", "*.cuh", "*.inl") for path in Path("csrc").rglob(suffix))
    return Extension("monet_train.kernels._C", sources, depends=headers, optional=True)


def conf_packages() -> list[str]:
    """``conf/`` and its groups, carried as packages so that wheels have the configuration."""
    groups = sorted(path.name for path in Path("conf").iterdir() if any(path.glob("*.yaml")))
    return ["monet_train.conf", *(f"monet_train.conf.{group}" for group in groups)]


setup(
    packages=[*find_packages(include=["monet_train*", "data_prep*"]), *conf_packages()],
    package_dir={"monet_train.conf": "conf"},
    package_data={name: ["*.yaml"] for name in conf_packages()},
    ext_modules=[native_extension()],
    cmdclass={"build_ext": BuildKernels},
)
