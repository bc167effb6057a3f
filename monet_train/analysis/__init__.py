"""Reading the experts of a trained model: collection into an atlas, profiles, selection, control."""
