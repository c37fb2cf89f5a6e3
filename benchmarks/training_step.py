"""One training step of Attention Copy and Distill, against the plain baseline of baseline.py.

    python benchmarks/training_step.py [--quick]

ViT-S/16 at 224 pixels, all layers, random weights: forward, backward, AdamW. The cache holds the teacher's
queries and keys for some views and is read in the step. On a GPU in bfloat16, both sides. Ratios of medians
taken in turns: 2 means twice as fast as the baseline.

The floor: a step cannot be shorter than its matrix products, at the rate that the machine reaches for the
products of the model's linear layers alone, and the passes over tensors that are no part of attention (norms,
GELU, residual sums, AdamW), as PyTorch's kernels take them alone. The ratio of the
baseline's step to that time is what no code with the same arithmetic and these kernels can exceed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import flops
import measure
import passes
import torch
from steps import Kind, Setting, Step, Steps, default_setting

from attention_transfer.training.machine import prepare

TARGETS = {
    "cpu": {"copy cached": 2.0, "distill cached": 1.5, "distill online": 1.2},
    "cuda": {"copy cached": 2.5, "distill cached": 1.8, "distill online": 1.4},
}
KINDS: tuple[Kind, ...] = ("copy", "distill")


def actions(steps: Steps) -> dict[str, Step]:
    found = {"plain": steps.plain()}
    for kind in KINDS:
        found[f"{kind} baseline"] = steps.baseline(kind)
        found[f"{kind} cached"] = steps.ours(kind, steps.cached)
        found[f"{kind} online"] = steps.ours(kind, steps.online)
    return found


def products(setting: Setting) -> dict[str, Step]:
    """The matrix products of one block's linear layers, forward and backward."""
    tokens = setting.batch * flops.tokens(setting.size)
    found = {}
    for name, (inputs, outputs) in flops.LINEAR.items():
        options = {"device": setting.device, "dtype": setting.precision}
        given = torch.randn(tokens, inputs, **options)  # type: ignore[arg-type]
        weight = torch.randn(outputs, inputs, **options)  # type: ignore[arg-type]
        gradient = torch.randn(tokens, outputs, **options)  # type: ignore[arg-type]
        found[f"{name} output"] = lambda x=given, w=weight: x @ w.mT
        found[f"{name} input gradient"] = lambda g=gradient, w=weight: g @ w
        found[f"{name} weight gradient"] = lambda g=gradient, x=given: g.mT @ x
    return found


def main() -> None:
    options = measure.arguments(__doc__)
    device = prepare()
    gpu = device.type == "cuda"
    setting = default_setting(device, quick=options.quick)
    repeats, warm_up = (1, 0) if options.quick else (20, 5) if gpu else (7, 1)
    with tempfile.TemporaryDirectory() as name:
        steps = Steps(setting, Path(name) / "cache")
        linear, block, teacher_block = (
            products(setting),
            passes.of_a_block(setting),
            passes.of_a_teacher_block(setting),
        )
        weights = sum(weight.numel() for weight in steps.teacher.parameters())
        parts = {**linear, **block, **teacher_block, **passes.of_the_optimiser(setting, weights)}
        taken = measure.medians({**actions(steps), **parts}, repeats=repeats, warm_up=warm_up, device=device)
    depth = len(steps.layers)
    rate = flops.linear(setting.batch, setting.size) / sum(taken[name] for name in linear)
    print(f"matrix products of the linear layers: {rate / 1e9:.0f} GFLOP/s")
    queries_and_keys = depth * 2 * flops.WIDTH**2  # weights that a copy student does not have
    student, teacher = (sum(taken[name] for name in names) for names in (block, teacher_block))
    results = []
    for action in (f"{kind} {source}" for kind in KINDS for source in ("cached", "online")):
        kind, source = action.split()
        baseline = taken[f"{kind} baseline"]
        multiplying = flops.step(kind, source, batch=setting.batch, size=setting.size, depth=depth) / rate
        updated = 1 - queries_and_keys / weights if kind == "copy" else 1
        passing = depth * student + updated * taken[passes.ADAMW]
        passing += (depth - 1) * teacher if source == "online" else 0
        print(f"{action}: products {1e3 * multiplying:.0f} ms, other passes {1e3 * passing:.0f} ms")
        floor = multiplying + passing
        target = TARGETS[device.type].get(action)
        results += [
            measure.Result(
                f"training step: {action} ({device.type})", baseline / taken[action], target, "higher", "x"
            ),
            measure.Result(
                f"training step: {action}, floor ({device.type})", baseline / floor, None, "higher", "x"
            ),
        ]
    for name in ("plain", *(f"{kind} {side}" for kind in KINDS for side in ("baseline", "cached", "online"))):
        print(f"{name:18} {1e3 * taken[name]:8.1f} ms  {taken[name] / taken['plain']:.2f} x the plain step")
    results += [
        measure.Result(
            f"training step: {kind} baseline against the plain step ({device.type})",
            taken[f"{kind} baseline"] / taken["plain"],
            None,
            "lower",
            "x",
        )
        for kind in KINDS
    ]
    measure.write(results, options)


if __name__ == "__main__":
    main()
