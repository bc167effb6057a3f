"""Fair timing on a machine that others use too: subjects take turns in one process, medians are compared."""

from __future__ import annotations

import datetime
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Work = Callable[[], object]


def medians_in_turn(subjects: dict[str, Work], rounds: int) -> dict[str, float]:
    """Median seconds of each subject over ``rounds`` rounds in which every subject runs once.

    A disturbance that lasts longer than a round falls on all subjects alike, so ratios of the medians are steadier
    than the medians. The first round is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for round_number in range(rounds + 1):
        for name, work in subjects.items():
            start = time.perf_counter()
            work()
            wait_for_device()
            if round_number > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def wait_for_device() -> None:
    """Work on a GPU is queued: wait until it is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_bytes(work: Work) -> int:
    """Most memory that tensors took at once during ``work``, beyond what they took before it."""
    if torch.get_default_device().type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes), default=0)


def bytes_kept_for_backward(forward: Callable[[], Tensor], parameters: list[Tensor]) -> int:
    """Storage that autograd holds on to after ``forward``, without the parameters."""
    known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
    del result
    return sum(kept.values())


def environment(device: torch.device | str) -> dict[str, Any]:
    """What the figures of work on ``device`` depend on."""
    gpu = torch.device(device).type == "cuda"
    return {
        "processor": torch.cuda.get_device_name() if gpu else processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def processor_name() -> str:
    """The processor's name as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
