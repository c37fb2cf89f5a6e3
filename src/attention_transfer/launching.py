"""Starts the processes of a stage by PyTorch's elastic launcher, and ends with them."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from attention_transfer.errors import StudyError
from attention_transfer.machine_file import PREFIX, PROCESS, Machine, path

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

SECONDS_TO_SAVE = 120  # for a process that was asked to stop, until it is killed
LOST = ("Connection closed by peer", "Connection reset by peer", "DistBackendError", "gloo::", "/gloo/")
"""In the error of a process whose fellow has gone: not the reason, which the fellow knows."""


MEETING = f"{PREFIX}MEETING"
"""Set by a job on several nodes, for the launcher of each."""


@dataclass(frozen=True)
class Meeting:
    """Where the launchers of a stage find each other.

    Attributes:
        nodes: how many there are, a launcher on each.
        endpoint: host and port of the first one.
        address: of this node, as the others reach it.
        name: of the job.
    """

    nodes: int
    endpoint: str
    address: str
    name: str

    def environment(self) -> dict[str, str]:
        """For the stage on this node."""
        return {MEETING: json.dumps(asdict(self))}


def meeting() -> Meeting:
    """As the job says; without one this launcher is alone."""
    if told := os.environ.get(MEETING):
        return Meeting(**json.loads(told))
    return Meeting(1, "localhost:0", "localhost", str(os.getpid()))


def is_launched() -> bool:
    """Whether this process is one of several that a launcher has started."""
    return PROCESS in os.environ


def is_wanted(machine: Machine) -> bool:
    return machine.processes > 1 or meeting().nodes > 1


def number() -> int:
    """Of this process, from 0, where the launcher has started it; else 0."""
    return int(os.environ["RANK"]) if is_launched() else 0


def count() -> int:
    """Processes that work on this stage."""
    return int(os.environ["WORLD_SIZE"]) if is_launched() else 1


def launch(machine: Machine, command: Sequence[str]) -> int:
    """Runs a command in as many processes as the machine's settings say, on each node; returns an exit code.

    All of them end with the first that fails, whose message is printed; a stop signal goes on to all, which save
    their state.

    Raises:
        StudyError: the device cannot have so many processes.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, launch_agent

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what failed is told below
    _check_device(machine)
    os.environ[PROCESS] = "1"  # for the processes; this one starts nothing else
    os.environ.setdefault(
        "TORCH_CPP_LOG_LEVEL", "ERROR"
    )  # its advice on unused parameters: see training/passes.py
    where = meeting()
    with tempfile.TemporaryDirectory(prefix="attention-transfer-") as folder:
        config = LaunchConfig(
            min_nodes=where.nodes,
            max_nodes=where.nodes,
            nproc_per_node=machine.processes,
            run_id=where.name,
            rdzv_backend="c10d",
            rdzv_endpoint=where.endpoint,
            local_addr=where.address,
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            shutdown_timeout=SECONDS_TO_SAVE,
        )
        try:
            launch_agent(config, command[0], list(command[1:]))
        except SignalException as stopped:
            return 128 + int(stopped.sigval)
        except ChildFailedError as error:
            process, failure = min(error.failures.items(), key=lambda item: _rank_of_blame(item[1]))
            print(_told(process, machine.processes * where.nodes, failure), file=sys.stderr, flush=True)
            return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        return 0


def _check_device(machine: Machine) -> None:
    import torch

    on_gpu = machine.device in (None, "cuda") and torch.cuda.is_available()
    if machine.device not in (None, "cpu", "cuda"):
        raise StudyError(
            f"processes is {machine.processes}, but device {machine.device} has room for one",
            where=str(path()),
            remedy="set device: cpu or cuda, or processes: 1",
        )
    if on_gpu and machine.processes > torch.cuda.device_count():
        raise StudyError(
            f"processes is {machine.processes}, but there are {torch.cuda.device_count()} GPUs",
            where=str(path()),
            remedy="set processes to their number or less, or device: cpu",
        )


def _rank_of_blame(failure: ProcessFailure) -> tuple[int, int]:
    """Lowest for the process that failed by itself."""
    text = _text(failure)
    lost = any(word in text for word in LOST)
    return (2 if lost else 0 if text else 1), failure.timestamp


def _text(failure: ProcessFailure) -> str:
    """What the process has left of its error; nothing if it had no time to."""
    message = failure.error_file_data.get("message")
    return str(message["message"]) if isinstance(message, dict) else ""


def _told(process: int, processes: int, failure: ProcessFailure) -> str:
    text = _text(failure)
    if text and not any(word in text for word in LOST):
        return text
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        return f"error: process {process} of {processes} was ended by {name}; the same command goes on"
    return f"error: process {process} of {processes} ended with exit code {failure.exitcode}"


def leave_word(text: str) -> None:
    """Tells the launcher why this process ends, for it to print: once, whichever processes fail."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        word = {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(file).write_text(json.dumps({"message": word}), encoding="utf-8")  # as the launcher reads it
