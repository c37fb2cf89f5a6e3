"""This process on this machine: its device, threads and memory, and the processes that it works with."""

from __future__ import annotations

import ctypes
import os

import torch

from attention_transfer import machine_file, processes
from attention_transfer.errors import StudyError

DEVICE = "ATTENTION_TRANSFER_DEVICE"
THREADS = "ATTENTION_TRANSFER_THREADS"
LOCAL = "LOCAL_RANK"  # number of this process on its node, from PyTorch's launcher

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h
KEPT = 2**30  # bytes


def device() -> torch.device:
    """The device that the environment or machine.yaml names; without it a GPU if there is one, else the CPU.

    Of several processes on a node, each has the GPU of its number.
    """
    name = machine_file.settings().device or ("cuda" if torch.cuda.is_available() else "cpu")
    own = os.environ.get(LOCAL) if name == "cuda" and machine_file.PROCESS in os.environ else None
    try:
        chosen = torch.device(f"cuda:{own}" if own else name)
        torch.empty(0, device=chosen)
        if own:
            torch.cuda.set_device(chosen)
    except (RuntimeError, AssertionError) as error:
        remedy = "set it to cpu, cuda or mps, or remove it"
        raise StudyError(
            f"{str(chosen) if own else name!r} is not a device of this machine: {str(error).splitlines()[0]}",
            where=machine_file.where("device"),
            remedy=f"{remedy}; no more processes than GPUs" if own else remedy,
        ) from error
    return chosen


def prepare() -> torch.device:
    """Sets threads, memory and deterministic kernels for this process, meets the others, and returns the device."""
    settings = machine_file.settings()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    elif machine_file.PROCESS in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // settings.processes))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic matrix products on CUDA
    torch.use_deterministic_algorithms(True, warn_only=True)
    # That would also fill every new tensor with NaN before its kernel writes it (benchmarks/determinism.py).
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    _keep_freed_memory()
    chosen = device()
    processes.join(chosen)
    return chosen


def _keep_freed_memory() -> None:
    """A step's tensors take the places of the last step's.

    glibc gives large blocks back to the kernel, which hands them out again page by page, zeroed, a fault each. It gives
    back, too, what a thread other than the first has freed, unless all share one arena.
    """
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):  # glibc alone has it
        libc.mallopt(M_MMAP_THRESHOLD, KEPT)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT)
        libc.mallopt(M_ARENA_MAX, 1)
