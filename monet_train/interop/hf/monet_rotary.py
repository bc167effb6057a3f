"""Rotary positions. An exported folder carries the definition itself here."""

from monet_train.model.rotary import rotary_tables, rotate

__all__ = ["rotary_tables", "rotate"]
