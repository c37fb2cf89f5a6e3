"""Processes that decode and augment images: Pillow and RandAugment work at one image at a time."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import torch
from torch import Tensor

from attention_transfer.data import decoding
from attention_transfer.data.decoding import Picture
from attention_transfer.data.image_files import Shape
from attention_transfer.data.views import ViewRecipe
from attention_transfer.errors import StudyError

WORKERS = "ATTENTION_TRANSFER_WORKERS"
SMALLEST_SHARE = 4  # images: below that, sending them takes longer than decoding


def count() -> int:
    """Of ATTENTION_TRANSFER_WORKERS; without it one a core, shared with the other processes that train here."""
    text = os.environ.get(WORKERS)
    if text is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # set by PyTorch's launcher
    if not text.isdecimal() or int(text) < 1:
        raise StudyError(
            f"{text!r} is not a number of processes",
            where=f"environment variable {WORKERS}",
            remedy="set it to 1 or more, or remove it",
        )
    return int(text)


def render(
    pictures: Sequence[Picture], shape: Shape, recipe: ViewRecipe | None, examples: np.ndarray, view: int
) -> Tensor:
    """`decoding.render`, shared among the processes: uint8 (count, channels, size, size).

    Raises:
        StudyError: a file has changed or cannot be decoded; a process has been killed.
    """
    shares = max(1, min(count(), len(pictures) // SMALLEST_SHARE))
    bounds = [len(pictures) * share // shares for share in range(shares + 1)]
    try:
        parts: list[Future[Tensor]] = [
            _pool().submit(_render, pictures[start:end], shape, recipe, examples[start:end], view)
            for start, end in itertools.pairwise(bounds)
        ]
        return torch.cat([part.result() for part in parts])
    except BrokenProcessPool as error:
        raise StudyError(
            "a process that decodes images has been killed: by lack of memory, or by hand",
            where=f"environment variable {WORKERS}",
            remedy="set it to fewer processes, and start again: finished work is kept",
        ) from error


def _render(
    pictures: Sequence[Picture], shape: Shape, recipe: ViewRecipe | None, examples: np.ndarray, view: int
) -> Tensor:
    # A tensor travels by shared memory, an array through a pipe.
    return torch.from_numpy(decoding.render(pictures, shape, recipe, examples, view)).share_memory_()


_starting = threading.Lock()


def _pool() -> ProcessPoolExecutor:
    with _starting:  # training and what it reads ahead ask from two threads
        return _started()


@functools.cache
def _started() -> ProcessPoolExecutor:
    # Not forked from this process, which has threads: from a server that has loaded what they need, and no more.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(count(), mp_context=context, initializer=_prepare)


def _prepare() -> None:
    """In a new process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the stage decides what Ctrl-C does
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_the_stage, daemon=True).start()


def _end_with_the_stage() -> None:
    """However that ends: a killed one tells nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
