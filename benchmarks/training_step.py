"""One training step of Attention Copy and Distill, against the plain baseline of baseline.py.

    python benchmarks/training_step.py

ViT-S/16 at 224 pixels, all layers, random weights: forward, backward, AdamW. The cache holds the teacher's
queries and keys for 64 views and is read in the step. On a GPU in bfloat16, both sides. Ratios of medians
taken in turns: 2 means twice as fast as the baseline.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import measure
import numpy as np
import timm
import torch
from baseline import Baseline
from torch import Tensor, nn

from attention_transfer.models.attention import slim
from attention_transfer.training.machine import prepare
from attention_transfer.transfer.attention_copy import AttentionCopy
from attention_transfer.transfer.attention_distill import AttentionDistill
from attention_transfer.transfer.attention_source import (
    AttentionSource,
    CachedAttention,
    OnlineAttention,
    teacher_attention,
)
from attention_transfer.transfer.cache import CacheReader, CacheWriter, Layout
from attention_transfer.transfer.method import Method

MODEL, VIEWS = "vit_small_patch16_224", 64
TARGETS = {
    "cpu": {"copy cached": 2.0, "distill cached": 1.5, "distill online": 1.2},
    "cuda": {"copy cached": 2.5, "distill cached": 1.8, "distill online": 1.4},
}


def optimised(model: nn.Module, loss: Callable[[], Tensor], precision: torch.dtype) -> Callable[[], None]:
    """A step: forward, backward and AdamW."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    device = trained[0].device

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            value = loss()
        value.backward()
        optimizer.step()

    return step


def write_cache(folder: Path, teacher: nn.Module, images: Tensor, layers: tuple[int, ...]) -> Layout:
    """The teacher's attention for VIEWS views: the same images again and again, since bytes are bytes."""
    rows = teacher_attention(teacher, images, layers)
    _, _, depth, heads, tokens, width = rows.shape
    layout = Layout(layers=depth, heads=heads, tokens=tokens, head_dim=width, dtype="float16")
    keys = np.stack([np.arange(VIEWS), np.zeros(VIEWS, np.int64)], axis=1)
    with CacheWriter(folder, layout=layout, recipe={"benchmark": "training_step"}, keys=keys) as writer:
        for piece in writer.pending():
            for start in range(piece.start, piece.stop, len(rows)):
                writer.write(rows[: min(len(rows), piece.stop - start)])
    return layout


def main() -> None:
    device = prepare()
    gpu = device.type == "cuda"
    batch, precision = (128, torch.bfloat16) if gpu else (8, torch.float32)
    torch.manual_seed(0)
    images = torch.randn(batch, 3, 224, 224, device=device)
    labels = torch.randint(1000, (batch,), device=device)
    teacher = timm.create_model(MODEL, num_classes=0).to(device).eval().requires_grad_(False)
    layers = tuple(range(len(teacher.blocks)))
    generator = np.random.default_rng(0)

    def ours(kind: str, source: AttentionSource) -> Callable[[], None]:
        student = timm.create_model(MODEL).to(device).train()
        method: Method
        if kind == "copy":
            slim(student, layers)
            student.to(device)
            method = AttentionCopy(student, layers=layers, label_smoothing=0.0)
        else:
            method = AttentionDistill(
                student, layers=layers, weight=3.0, reduction="sum", label_smoothing=0.0
            )

        def loss() -> Tensor:
            examples = generator.choice(VIEWS, batch, replace=batch > VIEWS)
            return method.loss(images, labels, source(images, examples, 0)).total

        return optimised(student, loss, precision)

    with tempfile.TemporaryDirectory() as name:
        write_cache(Path(name) / "cache", teacher, images[:8], layers)
        cached = CachedAttention(CacheReader(Path(name) / "cache", expect=None), layers)
        online = OnlineAttention(teacher, layers, "float16")
        plain = timm.create_model(MODEL).to(device).train()
        actions = {
            "plain": optimised(plain, lambda: nn.functional.cross_entropy(plain(images), labels), precision)
        }
        for kind in ("copy", "distill"):
            baseline = Baseline(MODEL, kind).to(device)  # type: ignore[arg-type]
            baseline.student.train()
            actions[f"{kind} baseline"] = optimised(
                baseline, lambda model=baseline: model.loss(images, labels), precision
            )
            actions[f"{kind} cached"] = ours(kind, cached)
            actions[f"{kind} online"] = ours(kind, online)
        taken = measure.medians(actions, repeats=20 if gpu else 5, warm_up=5 if gpu else 1, device=device)
    for action, seconds in taken.items():
        print(f"{action:18} {1e3 * seconds:8.1f} ms  {seconds / taken['plain']:.2f} x the plain step")
    measure.write(
        [
            measure.Result(
                name=f"training step, {action}, against baseline ({device.type})",
                value=round(taken[f"{action.split()[0]} baseline"] / taken[action], 3),
                target=TARGETS[device.type].get(action),
                better="higher",
                unit="x",
            )
            for action in ("copy cached", "copy online", "distill cached", "distill online")
        ]
    )


if __name__ == "__main__":
    main()
