"""What a collection will take, told before it begins."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import numpy as np

from monet_train.analysis.collector import Collector
from monet_train.analysis.plan import Plan
from monet_train.analysis.sums import Scales, Sums
from monet_train.errors import UserError
from monet_train.kernels.visits import CONTEXT, HISTOGRAM_BINS, SLOTS
from monet_train.model.config import MonetConfig
from monet_train.model.transformer import MonetForCausalLM

TIMED_TOKENS = 2048
BYTES_OF_SLOT = 4 + 8 + 8 + 4 + 2 * CONTEXT
BYTES_OF_TALLY = 8 + 8 + 4 + 8 * HISTOGRAM_BINS


@dataclass(frozen=True)
class Estimate:
    """What one process needs, besides the model."""

    memory: int  # bytes
    seconds: float
    microseconds_per_token: float


def memory_of_collection(config: MonetConfig, plan: Plan, groups: int) -> int:
    """Bytes that a process takes for what it collects. They do not depend on how much is read."""
    sums = Sums(1, plan.schema.cells, len(plan.schema.numeric), Scales.of_plan(plan, config.moe_heads))
    per_expert = sum(array.numel() * array.element_size() for array in sums.arrays().values())
    experts = config.moe_experts**2
    return groups * (
        experts * (per_expert + BYTES_OF_TALLY + SLOTS * BYTES_OF_SLOT) + 2 * config.moe_experts * per_expert
    )


def estimate(model: MonetForCausalLM, plan: Plan, groups: list[int], workers: int) -> Estimate:
    """Read a few documents for the time. The first ones of the plan are as good as any: they go by hash."""
    collector = Collector(model, plan, groups)
    read, begin = 0, time.perf_counter()
    for document, tokens in enumerate(plan.documents.tokens.tolist()):
        collector.add(document)
        if document == 0 and len(plan.documents) > 1:  # the first one also prepares: it does not count
            begin = time.perf_counter()
            continue
        read += tokens
        if read >= TIMED_TOKENS:
            break
    per_token = (time.perf_counter() - begin) / max(1, read)
    memory = memory_of_collection(model.config, plan, len(groups))
    return Estimate(memory, per_token * plan.tokens / workers, per_token * 1e6)


def check_memory(config: MonetConfig, plan: Plan, groups: int, processes: int) -> None:
    """Refuse a collection that cannot fit into this machine.

    Args:
        processes: of the collection on this machine.

    Raises:
        UserError: with what to leave out.
    """
    needed = processes * memory_of_collection(config, plan, groups)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UserError(
            f"the collection needs {needed / 1e9:.1f} GB of memory on this machine, which has {there / 1e9:.1f} GB: "
            "read fewer routing groups at once with --groups, or fewer labels with --labels"
        )


def said(plan: Plan, found: Estimate) -> str:
    """One line for the user."""
    labels = [f"{len(column.values)} values of {column.name}" for column in plan.schema.columns]
    labels += [column.name for column in plan.schema.numeric]
    time_each = f"{found.microseconds_per_token:.0f} us per token"
    duration = f"{found.seconds / 60:.0f} minutes" if found.seconds > 90 else f"{np.ceil(found.seconds):.0f} seconds"
    return (
        f"reading {plan.tokens:,} tokens of {len(plan.documents):,} documents by {', '.join(labels) or 'no label'}: "
        f"about {duration} ({time_each}) and {found.memory / 1e9:.2f} GB besides the model"
    )
