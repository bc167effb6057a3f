"""Statistics of the routing logits. An exported folder carries the definition itself here."""

from monet_train.model.statistics import NORM_EPS, BatchStatistics, FullPrecision, LogitStatistics

__all__ = ["NORM_EPS", "BatchStatistics", "FullPrecision", "LogitStatistics"]
