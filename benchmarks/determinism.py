"""What deterministic kernels cost: a training step with them, and with PyTorch's choice of kernels.

    python benchmarks/determinism.py [--quick]

ViT-S/16 at 224 pixels, all layers, cached attention, as in training_step.py. `as trained` is what every stage
does: deterministic algorithms, without filling new tensors first; `filled` is PyTorch's own setting, with that.
Ratios of medians taken in turns to the step with no switch at all: 1.1 means a tenth slower.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import measure
import torch
from steps import Step, Steps, default_setting

from attention_transfer.training.machine import prepare

SWITCHES = {"free": (False, False), "as trained": (True, False), "filled": (True, True)}
"""Deterministic algorithms, and whether new tensors are filled with NaN."""


def switched(step: Step, algorithms: bool, filled: bool) -> Step:
    def action() -> None:
        torch.use_deterministic_algorithms(algorithms, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
        step()

    return action


def main() -> None:
    options = measure.arguments(__doc__)
    device = prepare()
    setting = default_setting(device, quick=options.quick)
    repeats, warm_up = (1, 0) if options.quick else (15, 2)
    with tempfile.TemporaryDirectory() as name:
        steps = Steps(setting, Path(name) / "cache")
        ours = {"copy": steps.ours("copy", steps.cached), "distill": steps.ours("distill", steps.cached)}
        actions = {
            f"{kind} {switch}": switched(step, *how)
            for kind, step in ours.items()
            for switch, how in SWITCHES.items()
        }
        taken = measure.medians(actions, repeats=repeats, warm_up=warm_up, device=device)
    results = [
        measure.Result(
            f"determinism: {kind} step, {switch} ({device.type})",
            taken[f"{kind} {switch}"] / taken[f"{kind} free"],
            None,
            "lower",
            "x",
        )
        for kind in ours
        for switch in SWITCHES
        if switch != "free"
    ]
    measure.write(results, options)


if __name__ == "__main__":
    main()
