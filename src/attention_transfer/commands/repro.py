"""`dvc repro` with several DVCs at a time, each at stages that do not wait for another's."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path

from attention_transfer import machine_file, stop_signals
from attention_transfer.commands.progress import Display
from attention_transfer.errors import StudyError
from attention_transfer.machine_file import Machine

THREADS = "ATTENTION_TRANSFER_THREADS"  # see training/machine.py, which takes torch with it
OF_STUDENTS = ("resolve", "train", "predict")  # stages that a study has by the hundred
SHARED_OUT = ("pretrain", "cache", "train", "predict")  # stages that several processes do together
LONG = ("pretrain", "cache")  # stages that have all cores for long, and for whose end students wait
WORKERS = "ATTENTION_TRANSFER_WORKERS"  # see data/workers.py, likewise
OMP = "OMP_NUM_THREADS"
GPUS = "CUDA_VISIBLE_DEVICES"
LARGEST_BATCH = 16  # stages that one DVC is given; starting it takes as long as a short stage
PATIENCE = 60.0  # seconds until a process that has ended has said its last word
TICK = 0.05
# On Linux the kernel ends it when this process is gone, be it killed: PR_SET_PDEATHSIG.
DVC = """
import ctypes, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
sys.argv = sys.argv[1:]
from dvc.cli import main
sys.exit(main())
"""


@dataclass
class Queue:
    """Which stages are left, and which of them can run now.

    Attributes:
        waiting: for each stage that has not begun the stages that it waits for, in the order of `depth_first`.
        jobs: DVCs at a time.
        cores: that they share.
        threads: of a stage, by family: an equal share for those of single students, all cores for the others. So a
            rerun has the same threads, and thus the same bits, whatever else is run, or is in the study.
    """

    waiting: dict[str, set[str]]
    jobs: int
    cores: int
    threads: dict[str, int] = field(init=False)
    total: int = field(init=False)
    done: int = 0

    def __post_init__(self) -> None:
        self.total = len(self.waiting)
        share = max(1, self.cores // self.jobs)
        self.threads = {
            kind: share if kind in OF_STUDENTS else self.cores for kind in map(family, self.waiting)
        }

    def take(self, busy: int) -> list[str]:
        """Stages for one DVC, in an order in which they can run: a long one by itself, or a share of the students.

        A student's predictions come right behind it. So what is stopped has lost one stage for each DVC, and the
        first students can be looked at while the last have not begun.

        Args:
            busy: threads of the stages at work. Two teams of threads on the same cores wait for each other: what
                finds too few cores free waits, unless nothing is at work.
        """
        free = self.cores - busy
        fitting = (
            stage
            for stage, before in self.waiting.items()
            if not before and (self.threads[family(stage)] <= free or not busy)
        )
        if (first := next(fitting, None)) is None:
            return []
        batch = self._students() if family(first) in OF_STUDENTS else self._alike(first)
        for stage in batch:
            del self.waiting[stage]
        return batch

    def _alike(self, first: str) -> list[str]:
        """A stage that has all cores, with others of its family that are ready, unless they take long."""
        if family(first) in LONG:
            return [first]
        ready = [stage for stage, before in self.waiting.items() if not before]
        return [stage for stage in ready if family(stage) == family(first)][:LARGEST_BATCH]

    def _students(self) -> list[str]:
        """Stages of students that are ready, or will be once those before them in the batch are done."""
        chosen: dict[str, None] = {}
        for stage, before in self.waiting.items():
            if family(stage) in OF_STUDENTS and before <= chosen.keys():
                chosen[stage] = None
        count = max(1, min(LARGEST_BATCH, len(chosen) // self.jobs))
        return [*chosen][:count]

    def finish(self, stages: list[str]) -> None:
        self.done += len(stages)
        for before in self.waiting.values():
            before.difference_update(stages)

    def next(self) -> str:
        """How many of which family have not begun."""
        counts = Counter(map(family, self.waiting))
        return ", ".join(f"{count} {kind}" if count > 1 else kind for kind, count in counts.items())


@dataclass
class Clock:
    """How long stages take, by family, for the estimate of what is left."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, stage: str, seconds: float) -> None:
        self.seconds.setdefault(family(stage), []).append(seconds)

    def left(self, stages: list[str], jobs: int) -> str:
        """Of these stages, as far as their families have been measured; only students go side by side."""
        if not stages:
            return "all done"
        known = [name for name in map(family, stages) if name in self.seconds]
        means = {name: sum(self.seconds[name]) / len(self.seconds[name]) for name in known}
        total = sum(means[name] / (jobs if name in OF_STUDENTS else 1) for name in known)
        least = "at least " if len(known) < len(stages) else "about "
        return f"{least}{math.ceil(total / 60)} min to go" if known else "no estimate yet"


def family(stage: str) -> str:
    """`train` of `studies/full/dvc.yaml:train@copy-0`."""
    return stage.rpartition(":")[2].partition("@")[0]


class Worker:
    """One DVC at a batch of stages, whose lines are shown with its number."""

    def __init__(
        self,
        number: int,
        stages: list[str],
        threads: int,
        clock: Clock,
        display: Display,
        *,
        where: Mapping[str, str],
    ) -> None:
        self.number, self.stages, self.threads = number, stages, threads
        self.clock, self.display = clock, display
        self.process = subprocess.Popen(
            [sys.executable, "-c", DVC, "dvc", "--wait-for-lock", "repro", "--single-item", *stages],
            env={**os.environ, **where},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self.reader = threading.Thread(target=self._show, daemon=True)
        self.reader.start()

    def _show(self) -> None:
        assert self.process.stdout is not None
        stage, since = "", 0.0
        for line in self.process.stdout:
            if stage and re.match(r"Updating lock file|Stage '|Running stage '|Use `dvc push", line):
                self.clock.add(stage, time.monotonic() - since)
                self.display.end(self.number, finished=True)
                stage = ""
            if found := re.match(r"Running stage '([^']*)'", line):
                stage, since = found[1], time.monotonic()
                self.display.begin(self.number, stage)
            self.display.line(self.number, line)
        self.display.end(self.number, finished=False)
        self.process.stdout.close()


def repro(graph: Path, jobs: int, only: Sequence[str] = ()) -> int:
    """Brings a graph's stages, and all that they depend on, up to date: 0, 1, or 128 and the signal that came.

    DVC's own locks keep the processes apart: one at a time reads or writes the lock files, and no stage begins
    while another writes what it reads.

    Args:
        graph: path of a dvc.yaml.
        jobs: DVCs at a time; each stage gets its share of the cores (see `Queue`), unless machine.yaml or the
            environment says otherwise, and GPUs of its own where there are any.
        only: families of stages: these and what they depend on; none for all.

    Raises:
        StudyError: there is no such graph, or it cannot be read.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    queue = Queue(depth_first(waits_for(graph, only)), jobs, cores)
    machine = machine_file.settings()
    devices = gpus() if machine.device in (None, "cuda") else []
    with Display() as display:
        display.say(f"{graph}: {queue.total} stages, up to {jobs} at a time on {cores} cores")
        return _work(queue, display, machine, devices)


def _work(queue: Queue, display: Display, machine: Machine, devices: list[str]) -> int:
    clock, workers, failed = Clock(), list[Worker](), False

    def stop() -> None:  # their stages end with them, and save their state
        for worker in workers:
            worker.process.terminate()

    with stop_signals.awaited(stop) as stopped:
        while workers or (queue.waiting and not failed and not stopped()):
            free = [
                number for number in range(1, queue.jobs + 1) if number not in {w.number for w in workers}
            ]
            busy = sum(worker.threads for worker in workers)
            if free and not failed and not stopped() and (stages := queue.take(busy)):
                threads = queue.threads[family(stages[0])]
                where = surroundings(machine, free[0], stages, threads, devices)
                workers.append(Worker(free[0], stages, threads, clock, display, where=where))
                continue
            time.sleep(TICK)
            for worker in [worker for worker in workers if worker.process.poll() is not None]:
                workers.remove(worker)
                worker.reader.join(PATIENCE)
                if worker.process.returncode:
                    # The others may have stages for hours before them; those at work save their state.
                    for other in workers if not failed else ():
                        display.say(f"[{other.number}] is stopped, since [{worker.number}] has failed")
                        other.process.terminate()
                    failed = True
                    continue
                queue.finish(worker.stages)
                left = [*queue.waiting, *(stage for other in workers for stage in other.stages)]
                then = f"; then {queue.next()}" if queue.waiting else ""
                display.overall(f"{queue.done} of {queue.total} stages: {clock.left(left, queue.jobs)}{then}")
    return 128 + stopped() if stopped() else int(failed)


def depth_first(waits: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The same stages in the order in which they are needed: a teacher, its students with their predictions, the next.

    Of those that one stage waits for, the ones that have all cores come first, since they would otherwise have to wait
    until no student is at work; and among these the ones behind the longest way, which need the others by themselves.

    Args:
        waits: in an order that respects them.
    """
    place = {stage: number for number, stage in enumerate(waits)}
    depth: dict[str, int] = {}
    for stage, before in waits.items():
        depth[stage] = 1 + max((depth[each] for each in before), default=0)
    ordered: dict[str, set[str]] = {}

    def visit(stages: Iterable[str]) -> None:
        for stage in sorted(
            stages, key=lambda each: (family(each) in OF_STUDENTS, -depth[each], place[each])
        ):
            if stage not in ordered:
                visit(waits[stage])
                ordered[stage] = set(waits[stage])

    visit(waits.keys() - set().union(*waits.values()))
    return ordered


def surroundings(
    machine: Machine, number: int, stages: list[str], threads: int, devices: list[str]
) -> dict[str, str]:
    """Variables for one DVC's stages: threads of each process, processes that decode images, and GPUs of their own.

    What the environment or machine.yaml says of threads counts first, and what the environment says of the others.

    Args:
        number: of the DVC, from 1.
        threads: of all its processes together.
        devices: all GPUs of the machine.
    """
    if machine.launcher == "slurm":
        return {}  # the job is on another machine
    together = machine.processes if all(family(stage) in SHARED_OUT for stage in stages) else 1
    each = str(machine.threads or max(1, threads // together))
    # What torch's libraries read when they are loaded decides on last bits too, as much as its own setting.
    found = {THREADS: each, OMP: each}
    if WORKERS not in os.environ:
        found[WORKERS] = str(threads)
    if groups := len(devices) // machine.processes:
        first = (number - 1) % groups * machine.processes
        found[GPUS] = ",".join(devices[first : first + machine.processes])
    return found


def gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if (visible := os.environ.get(GPUS)) is not None:
        return [device for device in visible.split(",") if device]
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    told = subprocess.run(command, check=False, capture_output=True, text=True)
    return told.stdout.split() if told.returncode == 0 else []


def waits_for(graph: Path, only: Sequence[str] = ()) -> dict[str, set[str]]:
    """Each stage of the graph, and each that one of them depends on, with those that it waits for: in that order.

    Raises:
        StudyError: there is no such graph or family of stages, or DVC cannot read it.
    """
    if not graph.exists():
        raise StudyError("does not exist", where=str(graph), remedy="give the path of a dvc.yaml")
    command = [sys.executable, "-m", "dvc", "dag", "--dot", str(graph)]
    told = subprocess.run(command, check=False, capture_output=True, text=True)
    if told.returncode:
        raise StudyError(
            f"DVC cannot read it: {told.stderr.strip()[:500]}",
            where=str(graph),
            remedy=f"correct what it names; dvc status {graph} says whether it is right",
        )
    waits: dict[str, set[str]] = {}
    for first, second in re.findall(r'"([^"]*)"(?: -> "([^"]*)")?;', told.stdout):
        waits.setdefault(second or first, set()).update([first] if second else [])
    wanted = set() if only else set(waits)
    for kind in only:
        # A study's report waits for its experiments, which have stages of the same names.
        found = {stage for stage in waits if family(stage) == kind}
        own = {stage for stage in found if (stage.rpartition(":")[0] or "dvc.yaml") == str(graph)}
        if not found:
            raise StudyError(
                f"has no stage {kind!r}",
                where=str(graph),
                remedy=f"choose among {', '.join(sorted(set(map(family, waits))))}",
            )
        wanted |= own or found
    new = wanted
    while new := {before for stage in new for before in waits[stage]} - wanted:
        wanted |= new
    return {stage: waits[stage] for stage in TopologicalSorter(waits).static_order() if stage in wanted}
