"""The Hydra configuration of the commands, carried as the package ``monet_train.conf``."""
