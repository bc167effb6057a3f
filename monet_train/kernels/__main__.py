"""``python -m monet_train.kernels``: one line each for this machine's CPU and GPU: which implementation runs there."""

import torch

from monet_train.kernels import AUTO

print(AUTO.describe("cpu"))
if torch.cuda.is_available():
    print(AUTO.describe("cuda"))
