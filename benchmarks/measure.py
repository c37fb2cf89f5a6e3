"""What the benchmarks share: times taken in turns, peak memory, and benchmarks/results.json."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile

from attention_transfer import provenance
from attention_transfer.files import write_json

RESULTS = Path(__file__).with_name("results.json")


@dataclass(frozen=True)
class Result:
    """One figure.

    Attributes:
        target: None where there is none to reach.
        better: whether a higher or a lower value is better.
    """

    name: str
    value: float
    target: float | None
    better: Literal["higher", "lower"]
    unit: str

    @property
    def reached(self) -> bool:
        if self.target is None:
            return True
        return self.value >= self.target if self.better == "higher" else self.value <= self.target


def medians(
    actions: Mapping[str, Callable[[], object]], *, repeats: int, warm_up: int, device: torch.device
) -> dict[str, float]:
    """Median seconds of each action. They take turns, so that a busy machine slows all alike."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(warm_up + repeats):
        for name, action in actions.items():
            wait()
            start = time.perf_counter()
            action()
            wait()
            if turn >= warm_up:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(action: Callable[[], object], device: torch.device) -> int:
    """The most memory that tensors made within the action hold at one time."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        action()
    held = peak = 0
    assert recorded.profiler is not None
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def write(results: list[Result]) -> None:
    """Puts the results into results.json, in the place of older ones of the same name and device."""
    known: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    machine, versions = provenance.machine(), provenance.versions()
    new = [{**asdict(result), "machine": machine, "versions": versions} for result in results]
    names = {result.name for result in results}
    write_json(RESULTS, [entry for entry in known if entry["name"] not in names] + new)
    for result in results:
        target = "" if result.target is None else f"target {result.target:g} {result.unit}"
        print(
            f"{result.name:60} {result.value:9.3f} {result.unit:12} {target:22}"
            f"{'' if result.reached else 'MISSED'}"
        )
