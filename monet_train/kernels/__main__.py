"""``python -m monet_train.kernels``: say in a line which implementation runs on this machine's CPU, and on its GPU."""

import torch

from monet_train.kernels import describe

print(describe("auto", "cpu"))
if torch.cuda.is_available():
    print(describe("auto", "cuda"))
