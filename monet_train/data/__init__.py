"""Shards, their order and batches: sequence ``i`` of a run is a pure function of (shards, settings, seed, i)."""
