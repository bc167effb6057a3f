"""The native extension: where it is, and whether it can be used."""

from __future__ import annotations

import functools
from pathlib import Path

import torch


@functools.cache
def missing() -> str | None:
    """Load the extension once. None when it can be used, else why not, in a few words."""
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
    return None
