"""Data- and tensor-parallel process groups: Megatron's, and the view of them that DeepSpeed needs."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from monet_train.parallel.launch import COLLECTIVE_TIMEOUT


class Topology:
    """The process grid. Tensor ranks are neighbours (Megatron's order), data ranks stride over them.

    Its methods are the ``mpu`` interface of ``deepspeed.initialize``, whose names Megatron-core no longer has.
    """

    def __init__(self, tensor_size: int) -> None:
        """Build the groups. Every process calls it, after the process group is started."""
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor_size,
            create_gloo_process_groups=dist.get_backend() == "gloo",
            distributed_timeout_minutes=int(COLLECTIVE_TIMEOUT.total_seconds() // 60),
        )
        self.tensor_group: dist.ProcessGroup = parallel_state.get_tensor_model_parallel_group()
        self.data_group: dist.ProcessGroup = parallel_state.get_data_parallel_group()

    @property
    def tensor_rank(self) -> int:
        return self.tensor_group.rank()

    @property
    def tensor_size(self) -> int:
        return self.tensor_group.size()

    @property
    def data_rank(self) -> int:
        return self.data_group.rank()

    @property
    def data_size(self) -> int:
        return self.data_group.size()

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        """Add a tensor over the data-parallel ranks, which share a micro-step. Not differentiable."""
        if self.data_size > 1:
            dist.all_reduce(tensor, group=self.data_group)
        return tensor

    # -- DeepSpeed's mpu ------------------------------------------------------------------------------------
    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.tensor_group

    def get_model_parallel_rank(self) -> int:
        return self.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        return self.tensor_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.data_group

    def get_data_parallel_rank(self) -> int:
        return self.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self.data_size
