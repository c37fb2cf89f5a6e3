"""The benchmarks' tools and records. Nothing here is timed."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
KEYS = {"name", "value", "target", "better", "unit", "machine", "versions"}
RECORDED: list[dict[str, Any]] = json.loads((ROOT / "benchmarks" / "results.json").read_text())


@pytest.fixture(scope="module")
def bench() -> Iterator[SimpleNamespace]:
    """The modules that the benchmarks share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        names = ("baseline", "flops", "measure", "page", "run")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def entry(name: str, value: float, target: float | None, better: str = "higher") -> dict[str, Any]:
    return {
        "name": name,
        "value": value,
        "target": target,
        "better": better,
        "unit": "x",
        "machine": {"cores": 2},
        "versions": {"torch": "2"},
    }


def test_results_have_the_form_that_readers_expect() -> None:
    for found in RECORDED:
        assert found.keys() == KEYS
        assert found["better"] in ("higher", "lower")
        assert math.isfinite(found["value"])
        assert found["target"] is None or math.isfinite(found["target"])
        assert all(isinstance(found[key], str) and found[key] for key in ("name", "unit"))
        assert all(isinstance(found[key], dict) and found[key] for key in ("machine", "versions"))
    names = [found["name"] for found in RECORDED]
    assert len(set(names)) == len(names)


def test_the_page_says_what_the_results_say(bench: SimpleNamespace) -> None:
    assert (ROOT / "docs" / "benchmarks.md").read_text() == bench.page.render(RECORDED), (
        "make it anew: python benchmarks/page.py"
    )


def test_every_benchmark_has_a_section(bench: SimpleNamespace) -> None:
    headings = {prefix for prefix, _, _ in bench.page.SECTIONS}
    scripts = {path.stem.replace("_", " ") for path in bench.run.benchmarks()}
    assert scripts - {"growth"} <= headings  # which has a figure instead


def test_the_page_tells_met_missed_and_out_of_reach(bench: SimpleNamespace) -> None:
    text = bench.page.render(
        [
            entry("training step: a (cpu)", 2.1, 2.0),
            entry("training step: b (cpu)", 1.9, 2.0),
            entry("training step: c (cpu)", 1.9, 2.0),
            entry("training step: c, floor (cpu)", 1.95, None),
            entry("cache bytes: d (cpu)", 0.3, 0.24, "lower"),
            entry("cache bytes: e (cpu)", 0.2, None, "lower"),
        ]
    )
    assert "| a (cpu) | 2.1 x | at least 2 |  | met |" in text
    assert "| b (cpu) | 1.9 x | at least 2 |  | **missed** |" in text
    assert "| c (cpu) | 1.9 x | at least 2 | 1.95 | **missed**, beyond the limit |" in text
    assert "| d (cpu) | 0.3 x | at most 0.24 |  | **missed** |" in text
    assert "| e (cpu) | 0.2 x |  |  |  |" in text
    assert "Training step, cache bytes: cores 2; torch 2." in text


def test_a_result_without_a_section_is_refused(bench: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="nonsense"):
        bench.page.render([entry("nonsense: a (cpu)", 1.0, None)])


def test_new_results_replace_those_of_the_same_benchmark_and_device(
    bench: SimpleNamespace, tmp_path: Path
) -> None:
    def write(*names: str, quick: bool = False) -> list[str]:
        options = argparse.Namespace(quick=quick, results=tmp_path / "results.json")
        results = [bench.measure.Result(name, 1.0, None, "higher", "x") for name in names]
        bench.measure.write(results, options)
        return [found["name"] for found in json.loads(options.results.read_text())]

    write("a: one (cpu)", "a: two (cpu)")
    write("a: one (cuda)")
    write("b: one (cpu)")
    after = ["a: three (cpu)", "a: one (cuda)", "b: one (cpu)"]
    assert sorted(write("a: three (cpu)")) == sorted(after)
    assert sorted(write("a: four (cpu)", quick=True)) == sorted(after)
    kept = json.loads((tmp_path / "results.json").read_text())
    assert all(found.keys() == KEYS for found in kept)


def test_a_value_like_its_target_reaches_it(bench: SimpleNamespace) -> None:
    assert bench.measure.reached(2.0, 2.0, "higher")
    assert bench.measure.reached(2.0, 2.0, "lower")
    assert not bench.measure.reached(1.9, 2.0, "higher")
    assert not bench.measure.reached(2.1, 2.0, "lower")
    assert set(asdict(bench.measure.Result("a", 1.0, None, "lower", "x"))) <= KEYS


def test_timed_actions_take_turns(bench: SimpleNamespace) -> None:
    calls: list[str] = []
    actions = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    taken = bench.measure.medians(actions, repeats=3, warm_up=2, device=torch.device("cpu"))
    assert calls == ["a", "b"] * 5
    assert taken.keys() == actions.keys()


def test_peak_memory_counts_what_is_held_at_one_time(bench: SimpleNamespace) -> None:
    megabyte = 2**18  # float32 numbers

    def action() -> None:
        first = torch.zeros(megabyte)
        second = torch.zeros(2 * megabyte)
        del first
        third = torch.zeros(megabyte // 2)
        del second, third

    assert bench.measure.peak_bytes(action, torch.device("cpu")) == 3 * 2**20


@pytest.mark.parametrize("kind", ["copy", "distill"])
def test_floating_point_operations_are_those_of_a_step(kind: str, bench: SimpleNamespace) -> None:
    """PyTorch counts the baseline's, whose products beyond the least ones are known."""
    flops: ModuleType = bench.flops
    batch, size, depth = 2, 32, 3
    model = bench.baseline.Baseline("vit_small_patch16_224", kind, img_size=size, depth=depth)
    with FlopCounterMode(display=False) as counter:
        model.loss(torch.randn(batch, 3, size, size), torch.zeros(batch, dtype=torch.long)).backward()
    classifier = 3 * 2 * batch * 384 * 1000
    block, product = flops.linear(batch, size), flops.attention(batch, size)
    teacher = flops.embedding(batch, size) + depth * (block // 3 + 2 * product)
    # Copy: the student's logits are computed and not used; of P v only the gradient by v is needed.
    student = 2 * flops.embedding(batch, size) + depth * (block + (3 if kind == "copy" else 6) * product)
    assert counter.get_total_flops() == teacher + student + classifier
    # A teacher stops at its last queries and keys; a copy student has none.
    teacher -= block // 3 * 10 // 12 + product
    if kind == "copy":
        student -= depth * (block // 6 + product)
    size_and_depth = {"batch": batch, "size": size, "depth": depth}
    assert flops.step(kind, "online", **size_and_depth) == teacher + student
    # From a cache, the teacher's logits are made of its queries and keys.
    assert flops.step(kind, "cached", **size_and_depth) == student + depth * product


@pytest.mark.slow
def test_every_benchmark_runs(
    bench: SimpleNamespace, warm_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in a process of its own, as `make bench` runs them, but one that has its libraries loaded."""
    results = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["benchmarks/run.py", "--quick", "--results", str(results)])
    monkeypatch.setattr(sys, "executable", f"{warm_path.partition(os.pathsep)[0]}/python")
    bench.run.main()  # raises where one fails
    assert not results.exists()
