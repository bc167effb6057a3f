"""Which process this is: rank and world from torchrun, the deepspeed launcher, srun, or a lone process."""

from __future__ import annotations

import itertools
import os
import subprocess
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from monet_train.errors import UserError

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
_group_numbers = itertools.count()  # numbers the process groups of this process: each uses its own keys of the store


@dataclass(frozen=True)
class Launch:
    """Place of this process among all."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int = 1  # processes on this host, if the launcher says
    cpus: int | None = None  # that the launcher reserved for this process

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise UserError(
                f"rank {self.rank} of {self.world_size} processes is not possible; start with torchrun, srun or the "
                "deepspeed launcher, or unset RANK and WORLD_SIZE"
            )

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes what is shared."""
        return self.rank == 0


def read_launch() -> Launch:
    """Read the launcher's environment variables. Raises :class:`UserError` where they are incomplete."""
    environment = os.environ
    try:
        if "RANK" in environment and "WORLD_SIZE" in environment:
            rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
            local_size = (
                environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or 1
            )  # torchrun, deepspeed
            return Launch(rank, world, int(environment.get("LOCAL_RANK", rank)), int(local_size))
        # the batch shell of sbatch also has SLURM_PROCID; only inside srun is there a step with several tasks
        if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            return Launch(
                int(environment["SLURM_PROCID"]),
                int(environment["SLURM_STEP_NUM_TASKS"]),
                int(environment["SLURM_LOCALID"]),
                int(environment.get("SLURM_STEP_TASKS_PER_NODE", "1").partition("(")[0].partition(",")[0]),
                int(environment["SLURM_CPUS_PER_TASK"]) if "SLURM_CPUS_PER_TASK" in environment else None,
            )
    except (KeyError, ValueError) as error:
        raise UserError(
            f"the launcher's environment is incomplete or not a number ({error}); "
            "start with torchrun, srun or the deepspeed launcher, or unset RANK and WORLD_SIZE"
        ) from None
    return Launch(0, 1, 0)


def resolve_device(name: str, launch: Launch) -> torch.device:
    """The device of this process for ``train.device`` (auto, cpu or cuda)."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            "train.device=cuda, but torch sees no GPU; use train.device=cpu or a CUDA build of torch",
            alone=launch.local_rank == 0,
        )
    visible = torch.cuda.device_count()
    if visible == 1 and "SLURM_GPUS_PER_TASK" in os.environ:  # srun shows each task only its own GPU
        return torch.device("cuda", 0)
    if launch.local_rank >= visible:
        raise UserError(
            f"local rank {launch.local_rank} has no GPU of its own ({visible} visible); "
            "start as many processes per node as it has GPUs",
            alone=launch.local_rank == visible,
        )
    return torch.device("cuda", launch.local_rank)


def start_process_group(launch: Launch, device: torch.device) -> None:
    """Initialise torch.distributed: NCCL on GPUs, gloo on the CPU, over the launcher's rendezvous."""
    if "OMP_NUM_THREADS" not in os.environ:
        if launch.cpus is not None:
            torch.set_num_threads(launch.cpus)
        elif launch.local_size > 1:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // launch.local_size))
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # DeepSpeed reads these, whatever the launcher; LOCAL_RANK is the number of its GPU
    number = launch.local_rank if device.index is None else device.index
    os.environ.update(RANK=str(launch.rank), WORLD_SIZE=str(launch.world_size), LOCAL_RANK=str(number))
    if launch.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = _first_slurm_host()
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = _slurm_port()
    store = dist.PrefixStore(f"group_{next(_group_numbers)}", _rendezvous(launch))
    dist.init_process_group(
        backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=COLLECTIVE_TIMEOUT
    )


@lru_cache(maxsize=1)
def _rendezvous(launch: Launch) -> dist.Store:
    """The store in which the processes meet. It lives as long as they do, for all runs of a sweep."""
    store, _, _ = next(dist.rendezvous("env://", launch.rank, launch.world_size, timeout=COLLECTIVE_TIMEOUT))
    return store


def stop_process_group() -> None:
    """End the process group and what Megatron built on it."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _first_slurm_host() -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST")
    if nodes is None:
        raise UserError("MASTER_ADDR is not set; start with torchrun, or set it to the first host's name")
    listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return listed.stdout.split()[0]


def _slurm_port() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        raise UserError("MASTER_PORT is not set; start with torchrun, or set it to a free port of the first host")
    return str(20000 + int(job) % 20000)
