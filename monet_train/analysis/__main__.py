"""``python -m monet_train.analysis``: the same as ``monet-experts``."""

from monet_train.analysis.cli import main

if __name__ == "__main__":
    main()
