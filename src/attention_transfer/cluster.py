"""Runs a stage as a job of SLURM, by submitit: waits for it, shows what it prints, and ends as it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attention_transfer import launching, stop_signals
from attention_transfer.errors import StudyError
from attention_transfer.machine_file import PREFIX, Machine, path

if TYPE_CHECKING:
    from submitit import Job
    from submitit.helpers import DelayedSubmission

SECONDS_BETWEEN_LOOKS = 1.0
PORTS = range(20000, 30000)
"""Where the nodes of a job meet: below those that the kernel hands out."""
SECONDS_UNTIL_QUEUED_AGAIN = 180.0
"""SLURM begins a preemption with SIGTERM, on which the stage saves its state: then comes the signal to queue again."""


class Work:
    """The stage's own command, on each node; asked to make room, it saves its state and is put back in the queue."""

    def __init__(self, command: Sequence[str]) -> None:
        self.command = list(command)
        self.process: subprocess.Popen[bytes] | None = None
        self.end: threading.Thread | None = None

    def __call__(self) -> int:
        # SLURM sends that signal to every process of the job; it is for submitit alone, which calls `checkpoint`.
        deaf = ["sh", "-c", "trap '' USR2; exec \"$@\"", "sh", *self.command]
        here = {f"{PREFIX}LAUNCHER": "local", **_meeting()}
        self.process = subprocess.Popen(deaf, env={**os.environ, **here})
        # In a thread, because the handler of submitit's signal waits for it too, and Popen.wait is not re-entrant.
        self.end = threading.Thread(target=self.process.wait)
        self.end.start()
        while self.end.is_alive():
            self.end.join(SECONDS_BETWEEN_LOOKS)
        code = self.process.returncode
        if code == 128 + signal.SIGTERM:
            time.sleep(SECONDS_UNTIL_QUEUED_AGAIN)
        return code

    def checkpoint(self) -> DelayedSubmission:
        """What submitit puts in the queue in its place."""
        from submitit.helpers import DelayedSubmission

        if self.process is not None and self.end is not None:
            self.process.terminate()
            self.end.join()
        return DelayedSubmission(Work(self.command))


def _meeting() -> dict[str, str]:
    """What the stage on this node must know to meet those on the job's other nodes; nothing if there are none."""
    from submitit import JobEnvironment

    job = JobEnvironment()
    if job.num_nodes == 1:
        return {}
    port = PORTS[int(job.raw_job_id) % len(PORTS)]  # the same for all, and another for each job
    first, own = job.hostnames[0], job.hostnames[job.node]
    return launching.Meeting(job.num_nodes, f"{first}:{port}", own, job.job_id).environment()


def is_job() -> bool:
    """Whether this process is part of one."""
    return "SUBMITIT_EXECUTOR" in os.environ


def run(
    machine: Machine,
    command: Sequence[str],
    *,
    label: str,
    folder: Path,
    cluster: str = "slurm",
    one_node: bool = False,
) -> int:
    """Submits a command as a job and waits: its exit code. A stop signal cancels the job, which saves its state.

    Args:
        machine: its `slurm` says what the job asks for.
        label: name of the job.
        folder: for its logs.
        cluster: as submitit names it.
        one_node: whatever the machine says: several could not share the work.

    Raises:
        StudyError: submitit or SLURM is not there, or takes no such parameters.
    """
    asked = {**machine.slurm, **({"nodes": 1} if one_node else {})}
    job = _submitted(asked, command, label=label, folder=folder, cluster=cluster)
    print(f"{label}: job {job.job_id}; logs in {folder}", flush=True)
    tasks = [job.task(number).paths for number in range(job.num_tasks)]  # one on each node
    shown = {log: 0 for paths in tasks for log in (paths.stdout, paths.stderr)}
    with stop_signals.awaited() as stopped:
        while not job.done():
            if number := stopped():
                job.cancel(check=False)
                return 128 + number
            _show(shown)
            time.sleep(SECONDS_BETWEEN_LOOKS)
    _show(shown)
    try:
        codes: list[int] = job.results()
    except Exception as error:  # submitit's, with the job's state and log; or the job's own
        print(f"error: job {job.job_id} of {label} has not done its work: {error}", file=sys.stderr)
        return 1
    code = next((code for code in codes if code != 0), 0)
    return code if code >= 0 else 128 - code


def _submitted(
    asked: Mapping[str, Any], command: Sequence[str], *, label: str, folder: Path, cluster: str
) -> Job[Any]:
    where = f"{path()}: slurm"
    if asked.get("tasks_per_node", 1) != 1:
        raise StudyError(
            f"tasks_per_node is {asked['tasks_per_node']}, but a stage starts its processes on a node itself",
            where=where,
            remedy="remove it, and set processes to the number for each node",
        )
    try:
        import submitit
    except ImportError as error:
        raise StudyError(
            "launcher is slurm, but the package submitit is not installed",
            where=str(path()),
            remedy="pip install -e .[slurm], or set launcher: local",
        ) from error
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        executor.update_parameters(name=label, **asked)
        return executor.submit(Work(command))
    except (NameError, ValueError, TypeError, AssertionError) as error:
        raise StudyError(
            f"submitit refuses its parameters: {error}", where=where, remedy="correct or remove that key"
        ) from error
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        raise StudyError(
            f"the job was not accepted: {' '.join(str(error).split())}",
            where=where,
            remedy="try sbatch by hand with the same partition, account and limits; or set launcher: local",
        ) from error


def _show(shown: dict[Path, int]) -> None:
    """Prints what has been added to the logs, which come to standard error together."""
    for file, size in shown.items():
        if file.exists() and file.stat().st_size > size:
            with file.open("rb") as log:
                log.seek(size)
                new = log.read()
            shown[file] = size + len(new)
            sys.stderr.write(new.decode("utf-8", errors="replace"))
            sys.stderr.flush()
