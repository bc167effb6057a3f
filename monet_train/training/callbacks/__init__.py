"""Everything that accompanies training without being the loop: what is shown, written, checked and saved."""

from monet_train.training.callbacks.base import Callback, Record

__all__ = ["Callback", "Record"]
