"""Where it runs: from the environment, never from params.yaml, because it must not change results."""

from __future__ import annotations

import ctypes
import os

import torch

from attention_transfer.errors import StudyError

DEVICE = "ATTENTION_TRANSFER_DEVICE"
THREADS = "ATTENTION_TRANSFER_THREADS"

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT = 2**30  # bytes


def device() -> torch.device:
    """The device of ATTENTION_TRANSFER_DEVICE; without it a GPU if there is one, else the CPU."""
    name = os.environ.get(DEVICE) or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(name)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise StudyError(
            f"{name!r} is not a device of this machine: {str(error).splitlines()[0]}",
            where=f"environment variable {DEVICE}",
            remedy="set it to cpu, cuda or mps, or remove it",
        ) from error
    return chosen


def prepare() -> torch.device:
    """Sets threads, memory and deterministic kernels for this process, and returns the device."""
    if threads := os.environ.get(THREADS):
        if not threads.isdecimal() or int(threads) < 1:
            raise StudyError(
                f"{threads!r} is not a number of threads",
                where=f"environment variable {THREADS}",
                remedy="set it to 1 or more, or remove it",
            )
        torch.set_num_threads(int(threads))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products on CUDA
    torch.use_deterministic_algorithms(True, warn_only=True)
    # That would also fill every new tensor with NaN before its kernel writes it (benchmarks/determinism.py).
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    _keep_freed_memory()
    return device()


def _keep_freed_memory() -> None:
    """A step's tensors take the places of the last step's.

    glibc gives large blocks back to the kernel, which hands them out again page by page, zeroed, a fault each.
    """
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):  # glibc alone has it
        libc.mallopt(M_MMAP_THRESHOLD, KEPT)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT)
