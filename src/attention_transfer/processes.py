"""The processes that work on one stage together: which one this is, what falls to it, what all of them know.

Without a process group there is one process, and nothing here does any work.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, distributed


def number() -> int:
    """Of this process, from 0; process 0 alone writes results."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def count() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def join(device: torch.device) -> None:
    """Meets the other processes, if the launcher has started any; gloo for the CPU, NCCL for GPUs."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        distributed.init_process_group(backend(device))


def part() -> None:
    """Ends the group, when all have done their work: gloo's threads, left to Python's teardown, may abort a process.

    A stage ends without that teardown. Not for a process that fails: the others would lose it, and the launcher end it,
    before it could say why.
    """
    if distributed.is_initialized():
        distributed.destroy_process_group()


def backend(device: torch.device) -> str:
    """Small numbers always go by gloo: nothing waits for a GPU to tell them."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def share(items: int) -> slice:
    """The stretch of so many items that falls to this process: as equal as can be, in order of the processes."""
    return share_of(items, number(), count())


def share_of(items: int, process: int, processes: int) -> slice:
    """The stretch that falls to one of several processes; the first ones have one item more."""
    each, more = divmod(items, processes)
    start = process * each + min(process, more)
    return slice(start, start + each + (process < more))


def largest(*values: int) -> list[int]:
    """The largest of every process's values, place by place: on all of them the same."""
    if count() == 1:
        return list(values)
    numbers = torch.tensor(values, dtype=torch.int64)
    distributed.all_reduce(numbers, distributed.ReduceOp.MAX)
    return [int(value) for value in numbers]


def summed(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sums of every process's scalars, on all of them the same."""
    if count() == 1:
        return values
    stacked = torch.stack(list(values.values()))
    distributed.all_reduce(stacked)
    return dict(zip(values, stacked.unbind(), strict=True))


def joined(rows: Tensor | None, counts: list[int]) -> Tensor:
    """The rows of all processes, in their order, on all of them.

    Args:
        rows: float32 (any number, columns) on the CPU; None where this process has none.
        counts: how many rows each process has.
    """
    if count() == 1:
        assert rows is not None
        return rows
    (columns,) = largest(0 if rows is None else rows.shape[1])
    whole = torch.empty(sum(counts), columns)
    for process, part in enumerate(whole.split(counts)):
        if process == number() and rows is not None:
            part.copy_(rows)
        distributed.broadcast(part, src=process)
    return whole


def told(value: Any) -> Any:
    """What process 0 says, on all processes."""
    if count() == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


def collected(value: Any) -> list[Any]:
    """What every process says, in their order, on all of them."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    distributed.all_gather_object(values, value)
    return values
