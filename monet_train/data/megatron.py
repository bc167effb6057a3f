"""Megatron-core's indexed dataset, imported in one place, for the trainer and as the tests' reference.

The import takes seconds and warns about NVIDIA packages that shards do not need: ``monet-data`` works without it
(see ``index_file``).

Beware: an IndexedDataset closes its memory map when it is collected, even if arrays still point into it. Copy what
must outlive the dataset.
"""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.datasets import helpers
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

__all__ = ["DType", "IndexedDataset", "IndexedDatasetBuilder", "helpers"]
