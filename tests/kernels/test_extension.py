"""The extension beside its sources: one that was built before they changed is not used."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from monet_train.kernels import extension


def test_an_extension_is_current_only_beside_the_sources_that_it_was_built_from(native: None, tmp_path: Path) -> None:
    """A changed kernel would otherwise run with the bindings of before, or not at all, without a word."""
    if not extension.CSRC.is_dir():
        pytest.skip("csrc/ is not beside the package")
    csrc = tmp_path / "csrc"
    assert extension._is_current(csrc), "an installed package has no sources to compare with"
    shutil.copytree(extension.CSRC, csrc)
    assert extension._is_current(csrc)
    (csrc / "README.md").write_text("words")
    assert extension._is_current(csrc)

    header = csrc / "pairs.h"
    before = header.read_bytes()
    header.write_bytes(before + b"\n")
    assert not extension._is_current(csrc)
    header.write_bytes(before)
    header.rename(csrc / "cpu" / "pairs.h")
    assert not extension._is_current(csrc)
