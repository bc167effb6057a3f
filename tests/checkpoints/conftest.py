"""Threads."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def small_models(one_thread: None) -> None:
    """The models here are small."""
