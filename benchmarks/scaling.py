"""Processes against threads, and what micro-batches and checkpointing save of memory.

    python benchmarks/scaling.py [--quick]

ViT-S/16 at 112 pixels on the CPU, Attention Distill with the teacher in the step: images a second of whole training
steps, as 2 processes of 1 thread, 1 process of 2 threads, and 1 of 1. Each is a run of its own, in turns. Memory is a
process's largest, above what it holds before its first step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import measure

WAYS = {"1 process of 1 thread": (1, 1), "1 process of 2 threads": (1, 2), "2 processes of 1 thread": (2, 1)}
BATCHES = (8, 16, 32, 64)
WORK = "--work"  # with what to do, as JSON: this process is one of those that are measured


def train(options: dict[str, Any]) -> None:
    """Steps of one setting; the first process writes seconds a step and bytes."""
    import resource

    import timm
    import torch

    from attention_transfer import processes
    from attention_transfer.machine_file import Machine
    from attention_transfer.training import execution
    from attention_transfer.training.passes import Passes
    from attention_transfer.transfer.attention_distill import AttentionDistill
    from attention_transfer.transfer.method import Needs
    from attention_transfer.transfer.teacher_source import OnlineTeacher

    torch.set_num_threads(options["threads"])
    processes.join(torch.device("cpu"))
    torch.manual_seed(0)
    arguments = {"img_size": options["size"], "depth": options["depth"], "num_classes": 10}
    student, teacher = (timm.create_model("vit_small_patch16_224", **arguments) for _ in range(2))
    layers, heads = tuple(range(options["depth"])), tuple(range(6))
    machine = Machine(micro_batch=options["micro_batch"], checkpointing=options["checkpointing"])
    batch = options["batch"]
    how = execution.choose(machine, batch=batch, pairs=False, called="whole", where="benchmark")
    how.apply(student)
    method = AttentionDistill(
        student, layers=layers, heads=(heads,) * len(layers), transfer="map", weight=3.0, reduction="sum",
        temperature=1.0, student_heads=6, label_smoothing=0.0,
    )  # fmt: skip
    source = OnlineTeacher(teacher, Needs("attention", layers), "float16")
    images, labels = torch.randn(batch, 3, options["size"], options["size"]), torch.arange(batch) % 10

    class Task:
        model, steps_per_epoch = student, 10**6

        def train(self) -> None:
            method.train()

        def losses(self, epoch: int, step: int, part: slice = slice(None)) -> dict[str, torch.Tensor]:
            loss = method.loss(images[part], labels[part], source(images[part], None, 0))
            return {"total": loss.total}

        def validate(self, model: torch.nn.Module) -> dict[str, float]:
            return {}

    passes, optimizer = Passes(Task(), how.division), torch.optim.AdamW(student.parameters(), fused=True)

    def held() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    before, times = held(), []
    for step in range(options["steps"] + 2):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        passes.backward(0, step, seed=step)
        optimizer.step()
        times.append(time.perf_counter() - start)
    if processes.number() == 0:
        found = {"seconds": statistics.median(times[2:]), "bytes": held() - before}
        Path(options["file"]).write_text(json.dumps(found))
    processes.part()


def measured(options: dict[str, Any], *, processes: int = 1, threads: int = 1) -> dict[str, float]:
    """Seconds and bytes of a step, in new processes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        settings = {
            "micro_batch": None,
            "checkpointing": False,
            **options,
            "threads": threads,
            "file": str(file),
        }
        command = [__file__, WORK, json.dumps(settings)]
        program = (
            "import sys; from attention_transfer.launching import launch;"
            "from attention_transfer.machine_file import Machine;"
            f"sys.exit(launch(Machine(device='cpu', processes={processes}), [sys.executable, *sys.argv[1:]]))"
        )
        start = [sys.executable, "-c", program, *command] if processes > 1 else [sys.executable, *command]
        subprocess.run(start, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        found: dict[str, float] = json.loads(file.read_text())
        return found


def speed_ups(base: dict[str, Any], turns: int) -> list[measure.Result]:
    """Of two cores, used by threads or by processes, against one."""
    taken: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(turns):
        for name, (processes, threads) in WAYS.items():
            taken[name].append(measured(base, processes=processes, threads=threads)["seconds"])
    medians = {name: statistics.median(times) for name, times in taken.items()}
    alone = medians.pop("1 process of 1 thread")
    return [
        measure.Result(f"scaling: {name} against 1 of 1 (cpu)", alone / seconds, None, "higher", "x")
        for name, seconds in medians.items()
    ]


def memory(base: dict[str, Any], batches: tuple[int, ...]) -> list[measure.Result]:
    """Of a step, by images in it: as it comes, in passes of the smallest batch, and with checkpointing."""
    ways: dict[str, dict[str, Any]] = {
        "as it comes": {},
        f"passes of {batches[0]}": {"micro_batch": batches[0]},
        "checkpointing": {"checkpointing": True},
    }
    return [
        measure.Result(
            f"scaling: memory of {batch} images, {name} (cpu)",
            measured({**base, **way, "batch": batch, "steps": 1})["bytes"] / 1e6,
            None,
            "lower",
            "MB",
        )
        for batch in batches
        for name, way in ways.items()
    ]


def main() -> None:
    if WORK in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument(WORK, type=json.loads)
        train(parser.parse_args().work)
        return
    options = measure.arguments(__doc__)
    base = {"size": 112, "depth": 12, "batch": 32, "steps": 10}
    if options.quick:
        base = {"size": 32, "depth": 2, "batch": 4, "steps": 1}
    results = speed_ups(base, turns=1 if options.quick else 3)
    results += memory(base, (4,) if options.quick else BATCHES)
    measure.write(results, options)


if __name__ == "__main__":
    main()
