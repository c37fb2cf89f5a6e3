"""docs/benchmarks.md from benchmarks/results.json.

python benchmarks/page.py
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import RESULTS, reached

from attention_transfer.files import write_text

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
FLOOR = ", floor ("
"""In the name of a result that says how far the one without it can go."""

INTRODUCTION = """# Benchmarks

Measured by `make bench`, which writes `benchmarks/results.json` and, from it, this page. Each value is a ratio
of medians within one run; the two sides take turns. The baseline is `benchmarks/baseline.py`: both networks in
one module, the teacher run in every step, all maps kept in float32, queries and keys computed by the student
of Attention Copy too. *Limit* is the best that can be reached at all, as each section says; a target beyond
it cannot be met."""

SECTIONS = (
    (
        "training step",
        "Training step",
        "ViT-S/16 at 224 pixels, all layers, forward, backward and AdamW; float32 on a CPU (8 images), "
        "bfloat16 against bfloat16 on a GPU (128 images). 2 means twice as fast as the baseline. The limit "
        "is a step of nothing but the matrix products that the method cannot do without, at the speed that the "
        "machine reaches for those of the model's linear layers, and the passes over tensors outside attention "
        "(norms, GELU, residual sums, AdamW), as PyTorch's kernels take them alone, all in "
        "the same run.",
    ),
    (
        "attention loss memory",
        "Attention loss",
        "Loss and gradient of Attention Distill in 12 layers for one image, streamed against all maps kept: "
        "memory allocated beyond queries and keys, and time.",
    ),
    (
        "constant map",
        "Applying a copied map",
        "Forward and backward, the values alone with a gradient: the map kept, or made twice in blocks, against "
        "PyTorch's fused attention; 2 means twice as fast. The rule in `models/constant_map.py` rests on it.",
    ),
    (
        "cache writing",
        "Cache writing",
        "From images to a finished cache, against the teacher's forward passes alone. The limit is the slower "
        "of these passes and of one plain file of the same bytes, written and fsynced.",
    ),
    (
        "cache reading",
        "Cache reading",
        "Random batches against one `preadv` a row of the same rows; 1 means as fast. Cold: each pass over new "
        "rows by a new reader, checksums computed, after the fsynced files were dropped from the page cache "
        "(`posix_fadvise`, DONTNEED); Linux's count of bytes fetched from storage is checked after it.",
    ),
    (
        "determinism",
        "Deterministic kernels",
        "A training step with PyTorch's deterministic algorithms against the same step with PyTorch's choice of "
        "kernels; 1.1 means a tenth slower. *As trained* is what every stage does; *filled* is PyTorch's own "
        "setting, which fills every new tensor with NaN first.",
    ),
    (
        "waiting for data",
        "Waiting for data",
        "Rendering views and reading attention in the default study's runs: the share of a step that the same "
        "step on tensors already there does not take.",
    ),
    (
        "decoding images",
        "Images in files",
        "JPEGs of 500 x 375 pixels to normalised batches of 224, in as many processes as cores: images a second of "
        "the loader against Pillow alone, which decodes, crops and resizes the same and keeps nothing; 1 means "
        "as fast. With RandAugment the loader erases too, which Pillow alone does not. Evaluation: on a device that "
        "takes as long for a batch as its images take to be decoded; for 4.1 batches the best is 0.62.",
    ),
    (
        "cache bytes",
        "Size of the cache",
        "ViT-S/16: bytes of all files of a cache, with checksums, keys and manifest, against the same images' "
        "maps in float16 without any file around them.",
    ),
    (
        "int8 error",
        "Error of int8",
        "Queries and keys in 8 bits with a scale a token: divergence from the exact maps.",
    ),
    (
        "attention reading",
        "Reading attention",
        "A forward pass whose queries and keys are read, against the plain pass.",
    ),
    (
        "scaling",
        "Processes, passes and checkpointing",
        "ViT-S/16 at 112 pixels, Attention Distill with the teacher in the step, on two cores of a CPU: whole training "
        "steps of 32 images as two processes or two threads, against one of one. Memory is what the largest step "
        "adds to a process, resident.",
    ),
)

PICTURE = Path(__file__).with_name("growth.svg")
GROWTH = "## Growth with tokens and depth\n\n" + (
    """![Time and memory of a training step by tokens and by layers](../benchmarks/growth.svg)

Numbers: `benchmarks/growth.csv`."""
    if PICTURE.exists()
    else "Not measured yet."
)


def render(results: Sequence[dict[str, Any]]) -> str:
    """The page.

    Raises:
        ValueError: a result that belongs to no section.
    """
    parts = [INTRODUCTION]
    known = {prefix for prefix, _, _ in SECTIONS}
    if strange := {_benchmark(entry) for entry in results} - known:
        raise ValueError(f"no section for the results of {sorted(strange)}")
    for prefix, heading, text in SECTIONS:
        entries = [entry for entry in results if _benchmark(entry) == prefix]
        parts += [f"## {heading}", text, _table(entries) if entries else "Not measured yet."]
    parts += [GROWTH, "## Where", *_places(results)]
    return "\n\n".join(parts) + "\n"


def write(results: Path = RESULTS, page: Path = PAGE) -> None:
    write_text(page, render(json.loads(results.read_text())))


def _benchmark(entry: dict[str, Any]) -> str:
    name: str = entry["name"]
    return name.partition(":")[0]


def _table(entries: list[dict[str, Any]]) -> str:
    limits = {
        entry["name"].replace(FLOOR, " ("): entry["value"] for entry in entries if FLOOR in entry["name"]
    }
    lines = ["| what | value | target | limit | |", "|---|---|---|---|---|"]
    for entry in entries:
        if FLOOR not in entry["name"]:
            what, limit = entry["name"].partition(": ")[2], limits.get(entry["name"])
            lines.append(
                f"| {what} | {_number(entry['value'])} {entry['unit']} | {_target(entry)} "
                f"| {'' if limit is None else _number(limit)} | {_verdict(entry, limit)} |"
            )
    return "\n".join(lines)


def _target(entry: dict[str, Any]) -> str:
    if entry["target"] is None:
        return ""
    return f"at {'least' if entry['better'] == 'higher' else 'most'} {_number(entry['target'])}"


def _verdict(entry: dict[str, Any], limit: float | None) -> str:
    target, better = entry["target"], entry["better"]
    if target is None:
        return ""
    if reached(entry["value"], target, better):
        return "met"
    if limit is not None and not reached(limit, target, better):
        return "**missed**, beyond the limit"
    return "**missed**"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _places(results: Sequence[dict[str, Any]]) -> list[str]:
    """A paragraph for each machine with its versions, and what was measured there."""
    places: dict[str, list[str]] = {}
    for entry in results:
        machine = ", ".join(f"{key} {value}" for key, value in entry["machine"].items())
        versions = ", ".join(f"{key} {value}" for key, value in entry["versions"].items())
        measured = places.setdefault(f"{machine}; {versions}", [])
        if _benchmark(entry) not in measured:
            measured.append(_benchmark(entry))
    return [f"{', '.join(measured).capitalize()}: {place}." for place, measured in places.items()]


if __name__ == "__main__":
    write()
