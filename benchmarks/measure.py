"""What the benchmarks share: times taken in turns, peak memory, arguments, and benchmarks/results.json."""

from __future__ import annotations

import argparse
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
        name: `benchmark: what (device)`; the part before the colon is the name of the script.
        target: None where there is none to reach.
        better: whether a higher or a lower value is better.
        unit: `x` for a ratio.
    """

    name: str
    value: float
    target: float | None
    better: Literal["higher", "lower"]
    unit: str


def reached(value: float, target: float | None, better: str) -> bool:
    """Whether a value is at least as good as its target."""
    if target is None:
        return True
    return value >= target if better == "higher" else value <= target


def arguments(description: str | None) -> argparse.Namespace:
    """The command line that all benchmarks have: `quick`, and where the results go."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smoke test: tiny sizes, nothing is kept")
    parser.add_argument("--results", type=Path, default=RESULTS, help="default: %(default)s")
    return parser.parse_args()


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


def write(results: list[Result], options: argparse.Namespace) -> None:
    """Prints results and keeps them, in the place of all that the same benchmark measured on this device."""
    for result in results:
        target = "" if result.target is None else f"target {result.target:.4g}"
        missed = "" if reached(result.value, result.target, result.better) else "MISSED"
        print(f"{result.name:80} {result.value:9.4g} {result.unit:8} {target:16}{missed}")
    if options.quick:
        return
    known: list[dict[str, Any]] = json.loads(options.results.read_text()) if options.results.exists() else []
    about = {"machine": _machine(), "versions": provenance.versions()}
    new = [{**asdict(result), "value": float(f"{result.value:.4g}"), **about} for result in results]
    replaced = {_origin(result.name) for result in results}
    kept = [entry for entry in known if _origin(entry["name"]) not in replaced]
    write_json(options.results, sorted(kept + new, key=lambda entry: _origin(entry["name"])))


def _machine() -> dict[str, Any]:
    machine = {**provenance.machine(), "threads": torch.get_num_threads()}
    return {**machine, "gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else machine


def _origin(name: str) -> tuple[str, str]:
    """Benchmark and device of a result."""
    return name.partition(":")[0], name.rpartition("(")[2]
