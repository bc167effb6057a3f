"""``python -m monet_train.kernels``: say in one line which implementation runs on this machine's CPU."""

from monet_train.kernels import describe

print(describe("auto", "cpu"))
