"""A study on so many GPUs, from what its stages have to do and the rates that the user states: nothing is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from attention_transfer.config import Study
from attention_transfer.measuring import memory, workload
from attention_transfer.measuring.counts import Counts
from attention_transfer.measuring.memory import Memory
from attention_transfer.measuring.workload import STUDENTS, Stage

FEWEST = 8
"""Images of a pass below which activations are rather computed again: smaller products leave a GPU idle."""


@dataclass(frozen=True)
class Rates:
    """What the user states; None: not stated.

    Attributes:
        tflops: that a GPU reaches, 10^12 a second: its peak in the study's precision times the share of it.
        memory: of a GPU, 10^9 bytes.
        cores: that a machine has for each of its GPUs.
        decoded: images a second that a core decodes and augments.
        node: GPUs of one machine; a stage runs on one.
    """

    tflops: float | None = None
    memory: float | None = None
    cores: int | None = None
    decoded: float | None = None
    node: int = 8

    @property
    def images(self) -> float | None:
        """A second, for each GPU."""
        return None if self.cores is None or self.decoded is None else self.cores * self.decoded


@dataclass(frozen=True)
class Setting:
    """What machine.yaml would say.

    Attributes:
        jobs: stages side by side.
        processes: GPUs of each.
        micro_batch: images in a pass; None: all of a step's share at once.
    """

    jobs: int
    processes: int
    micro_batch: int | None
    checkpointing: bool
    sharding: bool


Limit = Literal["compute", "decoding", "memory", "too few students"]


@dataclass(frozen=True)
class Fleet:
    """The study on so many GPUs.

    Attributes:
        setting: None where a run fits on no number of them.
        passes: of a step, the fewest and the most of any run.
        hours: by the clock; None without a rate, or where a run does not fit.
        busy: share of all GPUs' hours in which they compute or wait for images.
        limited: by what.
    """

    gpus: int
    setting: Setting | None
    passes: tuple[int, int] | None
    hours: float | None
    busy: float | None
    limited: Limit | None


def seconds(stage: Stage, rates: Rates, gpus: int, *, files: bool) -> tuple[float, Limit]:
    """How long a stage takes on so many GPUs of one machine, and what it waits for.

    Args:
        files: whether images are decoded whenever they are shown.
    """
    assert rates.tflops is not None
    computing = stage.flops / (rates.tflops * 1e12 * (gpus if stage.shared else 1))
    decoding = stage.images / (rates.images * gpus) if files and rates.images else 0.0
    return (decoding, "decoding") if decoding > computing else (computing, "compute")


def fleet(study: Study, counts: Counts, rates: Rates, gpus: int) -> Fleet:
    """The setting that ends first; of equals the one with the fewest processes."""
    memories = {name: memory.of_run(study, name, counts.classes) for name in study.runs}
    settings = []
    for processes in _powers(min(gpus, rates.node)):
        jobs = min(gpus // processes, len(study.grid))
        if (setting := _setting(study, memories, rates, jobs, processes)) is not None:
            settings.append(setting)
    if not settings:
        return Fleet(gpus, None, None, None, None, "memory")
    if rates.tflops is None:
        setting = settings[0]
        return Fleet(gpus, setting, _passes(study, setting), None, None, None)
    timed = [(*_hours(study, counts, rates, setting, gpus), setting) for setting in settings]
    hours, limited, setting = min(timed, key=lambda each: (round(each[0], 9), each[2].processes))
    work = workload.stages(study, counts, recomputing=setting.checkpointing)
    alone = sum(seconds(stage, rates, 1, files=_in_files(study))[0] for stage in work) / 3600
    return Fleet(gpus, setting, _passes(study, setting), hours, min(1.0, alone / (gpus * hours)), limited)


def _powers(most: int) -> list[int]:
    return [2**n for n in range(most.bit_length()) if 2**n <= most]


def _setting(
    study: Study, memories: dict[str, Memory], rates: Rates, jobs: int, processes: int
) -> Setting | None:
    """One for all runs, as machine.yaml has one; None where one of them does not fit."""
    unit = 2 if study.views.mixes else 1
    if min(run.batch_size for run in study.runs.values()) // unit < processes:
        return None
    if rates.memory is None:
        return Setting(jobs, processes, None, False, False)
    for sharding in (False, True) if processes > 1 else (False,):
        for checkpointing, least in ((False, FEWEST), (True, unit)):
            most = min(
                _room(each, rates.memory, processes, checkpointing=checkpointing, sharding=sharding)
                for each in memories.values()
            )
            share = max(-(-run.batch_size // processes) for run in study.runs.values())
            if most >= min(least, share):
                whole = most >= share
                return Setting(
                    jobs, processes, None if whole else most - most % unit, checkpointing, sharding
                )
    return None


def _room(found: Memory, gigabytes: float, processes: int, *, checkpointing: bool, sharding: bool) -> int:
    """Images of a pass that a GPU has room for."""
    free = gigabytes * 1e9 * memory.USABLE - found.fixed(processes, sharded=sharding)
    return max(0, int(free // found.of_an_image(checkpointing=checkpointing)))


def _passes(study: Study, setting: Setting) -> tuple[int, int]:
    shares = [-(-run.batch_size // setting.processes) for run in study.runs.values()]
    counts = [-(-share // (setting.micro_batch or share)) for share in shares]
    return min(counts), max(counts)


def _in_files(study: Study) -> bool:
    return study.data.source == "files"


def _hours(study: Study, counts: Counts, rates: Rates, setting: Setting, gpus: int) -> tuple[float, Limit]:
    """By the clock, and what would have to be more for it to be less."""
    work = workload.stages(study, counts, recomputing=setting.checkpointing)
    timed = [(stage, *seconds(stage, rates, setting.processes, files=_in_files(study))) for stage in work]
    others = sum(taken for stage, taken, _ in timed if stage.kind not in STUDENTS)
    students: dict[str, float] = {}
    for stage, taken, _ in timed:
        if stage.kind in STUDENTS:
            students[stage.name] = students.get(stage.name, 0.0) + taken
    together = longest_queue([*students.values()], setting.jobs)
    waits: dict[Limit, float] = {"compute": 0.0, "decoding": 0.0}
    for _, taken, limit in timed:
        waits[limit] += taken
    longest, share = max(students.values()), sum(students.values()) / setting.jobs
    limited = max(waits, key=lambda limit: waits[limit])
    if setting.checkpointing and limited == "compute":
        limited = "memory"  # for want of which activations are computed again
    if gpus // setting.processes > len(students) or (setting.jobs > 1 and longest > share):
        limited = "too few students"
    return (others + together) / 3600, limited


def longest_queue(times: Sequence[float], jobs: int) -> float:
    """When the last of them ends: in this order, each begins when one of the jobs has nothing to do."""
    free = [0.0] * jobs
    for taken in times:
        first = free.index(min(free))
        free[first] += taken
    return max(free)
