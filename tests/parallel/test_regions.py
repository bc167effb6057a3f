"""Into and out of what tensor-parallel ranks share: sums over the ranks, whatever the tensors' layout in memory."""

from __future__ import annotations

import pytest

from tests.support import worker
from tests.support.processes import run_ranks


@pytest.mark.distributed
def test_gradients_and_sums_are_added_over_the_ranks() -> None:
    for done in run_ranks(worker.check_regions, ranks=2):
        assert done.returncode == 0, done.stderr
