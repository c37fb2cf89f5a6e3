"""`plan --gpus`: what a study would take on so many GPUs, from its formulas and the rates that the user states."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from attention_transfer import plan
from attention_transfer.config import Study
from attention_transfer.layout import Layout
from attention_transfer.measuring import counts, disk, flops_of_runs, gpus, memory, workload
from attention_transfer.measuring.counts import Counts
from attention_transfer.measuring.gpus import Fleet, Rates
from attention_transfer.measuring.memory import USABLE, Memory
from attention_transfer.measuring.workload import NOT_COUNTED, Stage, steps

UNITS = (("Z", 1e21), ("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("", 1.0))


@dataclass(frozen=True)
class Found:
    """All of it, before it is shown."""

    study: Study
    counted: Counts
    rates: Rates
    stages: list[Stage]
    memories: dict[str, Memory]
    fleets: list[Fleet]
    disk: dict[str, int]

    @property
    def files(self) -> bool:
        return self.study.data.source == "files"

    def hours(self, stages: Sequence[Stage]) -> float | None:
        """GPU hours, as if each ran on one; None without a rate."""
        if self.rates.tflops is None:
            return None
        return sum(gpus.seconds(stage, self.rates, 1, files=self.files)[0] for stage in stages) / 3600

    def limit(self, run: str) -> str:
        """What a run's training waits for."""
        if self.rates.tflops is None:
            return ""
        [first, *_] = [stage for stage in self.stages if stage.name == f"{run}-{self.study.seeds[0]}"]
        return gpus.seconds(first, self.rates, 1, files=self.files)[1]


def rates(
    *,
    tflops: float | None,
    memory: float | None,
    cores: int | None,
    decoded: float | None,
    node: int | None,
) -> Rates:
    """What is stated of the GPUs, see `gpus.Rates`; a machine has 8 unless it is said."""
    return Rates(tflops, memory, cores, decoded, Rates.node if node is None else node)


def show(
    study: Study,
    experiments: Sequence[str],
    params_file: Path,
    *,
    numbers: Sequence[int],
    rates: Rates,
    images: Mapping[str, int],
    classes: int | None,
    as_json: bool,
) -> None:
    """Prints the forecast as tables or as JSON.

    Args:
        experiments: that extend the study, and are not in the forecast.
        numbers: of GPUs, each a row.
        images: stated numbers of images, by set.
        classes: as stated.

    Raises:
        StudyError: nobody knows how many classes there are, or `images` names no set of the study.
    """
    layout = Layout.of(study)
    counted = counts.count(study, layout, images, classes)
    fleets = [gpus.fleet(study, counted, rates, number) for number in numbers]
    jobs = max((fleet.setting.jobs for fleet in fleets if fleet.setting), default=1)
    found = Found(
        study,
        counted,
        rates,
        workload.stages(study, counted),
        {name: memory.of_run(study, name, counted.classes) for name in study.runs},
        fleets,
        disk.needed(study, layout, counted, jobs=jobs),
    )
    print(_json(found, experiments) if as_json else _text(found, experiments, params_file))


def notes(found: Found, experiments: Sequence[str]) -> list[str]:
    """What was stated, what is counted and what is not, and which options would say more."""
    rates, lines = found.rates, ["computed from formulas and stated rates: nothing was measured"]
    if rates.tflops is None:
        lines.append(
            "hours: state the rate of a GPU, --tflops (its peak times the share of it that is reached)"
        )
    else:
        lines.append(f"stated: {rates.tflops:g} TFLOP/s of a GPU")
    if rates.memory is None:
        lines.append("passes, checkpointing and sharding: state the memory of a GPU, --gpu-memory")
    else:
        lines.append(f"stated: {rates.memory:g} GB of a GPU, of which {USABLE:.0%} are filled")
    if found.files and rates.images is None:
        lines.append("time to decode images is left out: state --cores and --images-per-core")
    elif found.files:
        lines.append(
            f"stated: {rates.cores} cores for each GPU, {rates.decoded:g} images a second from a core"
        )
    else:
        lines.append("time to render views, from images in memory, is left out")
    if found.counted.unknown:
        names = ", ".join(found.counted.unknown)
        lines.append(f"left out, until --images states their number: {names}")
    if experiments:
        lines.append(f"experiments are not included, and have plans of their own: {', '.join(experiments)}")
    lines += [
        f"a stage runs on one machine, of {rates.node} GPUs (--node); students go side by side, other stages alone",
        "left out: what goes between processes, starting, checkpoints, and the reading of files",
        f"not counted: {NOT_COUNTED}",
        "memory: of the students; a teacher that is pre-trained here is not in it",
        "disk: once, where DVC's cache shares blocks with the working copy; else all but checkpoints twice",
    ]
    return lines


def _json(found: Found, experiments: Sequence[str]) -> str:
    study, classes = found.study, found.counted.classes
    runs = {
        name: {
            "steps": steps(study, study.runs[name]),
            "flops_an_image": asdict(flops_of_runs.training(study, name, classes)),
            "limited": found.limit(name) or None,
            "memory": asdict(found.memories[name]),
        }
        for name in study.runs
    }
    values = {
        "study": study.name,
        "rates": asdict(found.rates),
        "counts": asdict(found.counted),
        "stages": [asdict(stage) for stage in found.stages],
        "gpu_hours": found.hours(found.stages),
        "runs": runs,
        "gpus": [asdict(fleet) for fleet in found.fleets],
        "disk": found.disk,
        "notes": notes(found, experiments),
    }
    return json.dumps(values, indent=1, sort_keys=True, allow_nan=False)


def _text(found: Found, experiments: Sequence[str], params_file: Path) -> str:
    study = found.study
    sections = [
        f"{params_file}: study {study.name}, {len(study.runs)} runs x {len(study.seeds)} seeds",
        "\n".join(f"attention of {name}: {plan.attention_source(study, name)}" for name in study.teachers),
        _stages(found),
        _runs(found),
        _memory(found),
        _fleets(found),
        _disk(found),
        ";\n".join(notes(found, experiments)) + ".",
    ]
    return "\n\n".join(sections)


def _stages(found: Found) -> str:
    kinds: dict[str, list[Stage]] = {}
    for stage in found.stages:
        kinds.setdefault(stage.kind, []).append(stage)
    rows = [[kind, len(each), *_amounts(found, each)] for kind, each in kinds.items()]
    rows.append(["all", len(found.stages), *_amounts(found, found.stages)])
    return _table("Stages, all instances", ["stage", "number", "FLOP", "images", "GPU hours"], rows)


def _amounts(found: Found, stages: Sequence[Stage]) -> list[str]:
    hours = found.hours(stages)
    flops, images = sum(stage.flops for stage in stages), sum(stage.images for stage in stages)
    return [_unit(flops), f"{images:,}", "" if hours is None else f"{hours:.2f}"]


def _runs(found: Found) -> str:
    rows = []
    for name, run in found.study.runs.items():
        work = flops_of_runs.training(found.study, name, found.counted.classes)
        own = [stage for stage in found.stages if stage.name == f"{name}-{found.study.seeds[0]}"]
        rows.append(
            [
                name,
                run.batch_size,
                f"{steps(found.study, run):,}",
                _unit(work.student),
                _unit(work.teacher) if work.teacher else "",
                *_amounts(found, own),
                found.limit(name),
            ]
        )
    return _table(
        "Runs, one seed with its predictions",
        [
            "run", "batch", "steps", "FLOP an image", "of the teacher", "FLOP", "images", "GPU hours",
            "waits for",
        ],
        rows,
    )  # fmt: skip


def _memory(found: Found) -> str:
    rows = [
        [
            name,
            f"{each.parameters / 1e6:.1f}",
            f"{each.frozen / 1e6:.1f}" if each.frozen else "",
            f"{each.fixed(1, sharded=False) / 1e9:.2f}",
            f"{each.fixed(2, sharded=False) / 1e9:.2f}",
            f"{each.kept / 1e6:.1f}",
            f"{each.recomputed / 1e6:.1f}",
        ]
        for name, each in found.memories.items()
    ]
    return _table(
        "Memory of a GPU (measuring/memory.py has the formula)",
        [
            "run", "parameters, 10^6", "of the teacher", "fixed, GB", "of several processes",
            "an image, MB", "with checkpointing",
        ],
        rows,
    )  # fmt: skip


def _fleets(found: Found) -> str:
    rows = [_fleet(fleet, rates=found.rates) for fleet in found.fleets]
    return _table(
        "On so many GPUs, as machine.yaml and `run` would have it",
        [
            "GPUs", "--jobs", "processes", "micro_batch", "passes a step", "checkpointing", "sharding", "hours",
            "busy, %", "limited by",
        ],
        rows,
    )  # fmt: skip


def _fleet(fleet: Fleet, *, rates: Rates) -> list[Any]:
    setting = fleet.setting
    if setting is None or fleet.passes is None:
        return [fleet.gpus, *[""] * 8, "memory: a run does not fit, sharded neither"]
    low, high = fleet.passes
    known = rates.memory is not None
    return [
        fleet.gpus,
        setting.jobs,
        setting.processes,
        (setting.micro_batch or "all") if known else "",
        (low if low == high else f"{low} to {high}") if known else "",
        ("yes" if setting.checkpointing else "no") if known else "",
        ("yes" if setting.sharding else "no") if known else "",
        "" if fleet.hours is None else f"{fleet.hours:.1f}",
        "" if fleet.busy is None else f"{100 * fleet.busy:.0f}",
        fleet.limited or "",
    ]


def _disk(found: Found) -> str:
    rows = [[name, f"{size / 1e9:.2f}"] for name, size in found.disk.items()]
    rows.append(["all", f"{sum(found.disk.values()) / 1e9:.2f}"])
    return _table("Disk", ["what", "GB"], rows)


def _unit(value: float) -> str:
    name, size = next(((name, size) for name, size in UNITS if value >= size), UNITS[-1])
    return f"{value / size:.3g} {name}".rstrip()


def _table(title: str, headers: list[str], rows: list[list[Any]]) -> str:
    table: str = tabulate(rows, headers, tablefmt="simple", disable_numparse=True)
    return f"{title}\n" + "\n".join(line.rstrip() for line in table.splitlines())
