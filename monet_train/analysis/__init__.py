"""Reading the experts of a trained model: collection into an atlas, profiles, selection, control."""

from monet_train.analysis.atlas import Atlas
from monet_train.model.mask import ExpertSet

__all__ = ["Atlas", "ExpertSet"]
