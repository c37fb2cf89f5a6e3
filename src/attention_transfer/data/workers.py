"""Processes that decode and augment images: Pillow and RandAugment work at one image at a time."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attention_transfer.data import decoding, shared_pixels
from attention_transfer.data.decoding import Picture
from attention_transfer.data.image_files import Shape
from attention_transfer.data.shared_pixels import SharedPixels, UnknownBlockError
from attention_transfer.data.views import ViewRecipe
from attention_transfer.errors import StudyError

WORKERS = "ATTENTION_TRANSFER_WORKERS"
SMALLEST_SHARE = 4  # images: below that, sending them takes longer than decoding
SHARES = 4  # of a batch for each process: the last one to finish keeps the others waiting for less


def count() -> int:
    """Of ATTENTION_TRANSFER_WORKERS, without it one a core: shared out among the processes that train here.

    So the pools of a stage have no more workers together than that, but for the one that each process needs.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # set by PyTorch's launcher
    text = os.environ.get(WORKERS)
    if text is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, cores // processes)
    if not text.isdecimal() or int(text) < 1:
        raise StudyError(
            f"{text!r} is not a number of processes",
            where=f"environment variable {WORKERS}",
            remedy="set it to 1 or more, or remove it",
        )
    return max(1, int(text) // processes)


Work = tuple[Sequence[Picture], Shape, ViewRecipe | None, np.ndarray, int]
"""Pictures, what they are brought to, and recipe, numbers and view, as `decoding.render` takes them."""


@dataclass(frozen=True)
class Part:
    """A share of a batch.

    Attributes:
        rows: of the batch.
        done: when their pixels are there.
    """

    rows: slice
    work: Work
    done: Future[None]


@dataclass(frozen=True)
class Begun:
    """Images that the processes are at.

    Attributes:
        pixels: where they go.
    """

    pixels: SharedPixels
    parts: list[Part]

    def shares(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows and their pixels, uint8 (rows, channels, size, size), in order; the pixels are good until the next.

        Raises:
            StudyError: a file has changed or cannot be decoded; a process has been killed.
        """
        for part in self.parts:
            try:
                try:
                    part.done.result()
                except UnknownBlockError:
                    pool().submit(_render, self.pixels, part.rows, part.work).result()
            except BrokenProcessPool as error:
                raise _killed() from error
            yield part.rows, self.pixels.rows(part.rows)
        self.pixels.give_back()

    def drop(self) -> None:
        """What no process is at yet is not begun; where one is, it goes on writing, and the block is not lent again."""
        for part in self.parts:
            part.done.cancel()


def begin(
    pictures: Sequence[Picture], shape: Shape, recipe: ViewRecipe | None, examples: np.ndarray, view: int
) -> Begun:
    """`decoding.render`, shared among the processes.

    Raises:
        StudyError: a process has been killed.
    """
    shares = max(1, min(SHARES * count(), len(pictures) // SMALLEST_SHARE))
    bounds = [len(pictures) * share // shares for share in range(shares + 1)]
    pixels = shared_pixels.lend((len(pictures), shape.channels, shape.size, shape.size))
    parts = []
    try:
        for rows in itertools.starmap(slice, itertools.pairwise(bounds)):
            work = pictures[rows], shape, recipe, examples[rows], view
            parts.append(Part(rows, work, pool().submit(_render, pixels.to_send(), rows, work)))
    except BrokenProcessPool as error:
        raise _killed() from error
    return Begun(pixels, parts)


def render(
    pictures: Sequence[Picture], shape: Shape, recipe: ViewRecipe | None, examples: np.ndarray, view: int
) -> Tensor:
    """The same, waited for: uint8 (count, channels, size, size).

    Raises:
        StudyError: a file has changed or cannot be decoded; a process has been killed.
    """
    begun = begin(pictures, shape, recipe, examples, view)
    found = torch.empty(begun.pixels.shape, dtype=torch.uint8)
    for rows, pixels in begun.shares():
        found[rows] = pixels
    return found


def _killed() -> StudyError:
    return StudyError(
        "a process that decodes images has been killed: by lack of memory, or by hand",
        where=f"environment variable {WORKERS}",
        remedy="set it to fewer processes, and start again: finished work is kept",
    )


def _render(pixels: SharedPixels, rows: slice, work: Work) -> None:
    pixels.keep_mapped()
    decoding.render(*work, pixels=pixels.rows(rows).numpy())


_starting = threading.Lock()


def pool() -> ProcessPoolExecutor:
    """The processes, started when they are first needed."""
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
