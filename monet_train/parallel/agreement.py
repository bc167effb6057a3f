"""Agreement between the ranks: if one refuses, all refuse; what the main rank knows, all know."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from monet_train.errors import UserError

T = TypeVar("T")


def agree(check: Callable[[], T]) -> T:
    """Run ``check`` on every rank and return its result. If any rank refuses, all do, and none waits for the others.

    Raises:
        UserError: on every rank, the error of the first rank that has one.
    """
    error: UserError | None = None
    try:
        result = check()
    except UserError as refused:
        error = refused
    raise_together(error)
    return result


def raise_together(error: UserError | None) -> None:
    """End all ranks if any has an error: raise the first rank's on each, so that none waits for the others."""
    messages: list[str | None] = [None] * dist.get_world_size()
    own = None if error is None else str(error)
    if dist.get_world_size() == 1:
        messages = [own]
    else:
        dist.all_gather_object(messages, own)
    failed = [(rank, message) for rank, message in enumerate(messages) if message is not None]
    if failed:
        rank, message = failed[0]
        where = "" if len(failed) == len(messages) else f" (on rank {rank})"
        raise UserError(message + where)


def from_main_rank(value: T) -> T:
    """The value that rank 0 passed, on every rank; it is pickled on the way."""
    values = [value]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]
