"""The native extension: where it is, and whether it can be used."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from monet_train.kernels import fake
from monet_train.kernels.sources import sources_digest

STALE = "built before csrc/ changed: run make install to rebuild"
CSRC = Path(__file__).parents[2] / "csrc"


@torch.compiler.assume_constant_result
def missing() -> str | None:
    """Load the extension once. None when it can be used, else why not, in a few words."""
    return _load()


@torch.compiler.assume_constant_result
def built_for_cuda() -> bool:
    """Whether the extension has the kernels for GPUs. It must be loaded."""
    return torch.ops.monet.built_for_cuda()


@functools.cache
def _load() -> str | None:
    library = next(iter(sorted(Path(__file__).parent.glob("_C*.so"))), None)
    if library is None:
        return "not built"
    try:
        torch.ops.load_library(library)
        built_with = torch.ops.monet.built_with()
    except (OSError, AttributeError, RuntimeError) as error:
        return f"{library.name} does not load: {str(error).splitlines()[0]}"
    if built_with != torch.__version__:
        return f"built for torch {built_with}, this is {torch.__version__}: install again to rebuild"
    if not all(hasattr(torch.ops.monet, name) for name in ("built_from", *fake.OPERATIONS)):
        return "built from older sources: install again to rebuild"
    if not _is_current():
        return STALE
    fake.register()
    return None


def _is_current(csrc: Path = CSRC) -> bool:
    """Whether the extension was built from the sources beside it. In an installed package there are none."""
    return not csrc.is_dir() or torch.ops.monet.built_from() == sources_digest(csrc)
