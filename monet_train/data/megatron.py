"""Megatron-core's indexed dataset, imported in one place.

The import takes seconds and warns about NVIDIA packages that reading and writing shards do not need, so callers
import this module where they need it.

A warning of our own: an IndexedDataset closes its memory map when it is collected, whatever arrays still look
into it. Copy what outlives the dataset.
"""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.datasets import helpers
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

__all__ = ["DType", "IndexedDataset", "IndexedDatasetBuilder", "helpers"]
