"""Helpers of the tests: commands, runs, corpora, a local Slurm. No tests here."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
GOLDEN = REPOSITORY / "tests" / "golden"  # checkpoints with the published reference's answers, part of the repository
