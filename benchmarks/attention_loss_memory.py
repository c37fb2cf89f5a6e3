"""Memory of Attention Distill's loss and gradient: streamed, against the formula with all maps kept.

    python benchmarks/attention_loss_memory.py

12 layers, 6 heads, 64 numbers a head (ViT-S), one image, 50 to 1601 tokens. Counted: whatever the loss and its
gradient allocate beyond the queries and keys. Also the times, in turns.
"""

from __future__ import annotations

from collections.abc import Callable

import measure
import torch
from torch import Tensor

from attention_transfer.training.machine import prepare
from attention_transfer.transfer.losses import attention_cross_entropy, streamed_attention_cross_entropy

LAYERS, HEADS, WIDTH = 12, 6, 64
TARGETS = {577: 1 / 3, 1025: 1 / 6}


def materialised(teacher: list[Tensor], queries: list[Tensor], keys: list[Tensor]) -> Tensor:
    """All maps of all layers at once, as the formula stands."""
    logits = [
        torch.stack([q @ k.mT * WIDTH**-0.5 for q, k in pairs])
        for pairs in ([part.unbind(dim=1) for part in teacher], list(zip(queries, keys, strict=True)))
    ]
    return attention_cross_entropy(*logits, reduction="sum")


def streamed(teacher: list[Tensor], queries: list[Tensor], keys: list[Tensor]) -> Tensor:
    """Layer by layer, as Attention Distill does it."""
    parts = zip(teacher, queries, keys, strict=True)
    return torch.stack([streamed_attention_cross_entropy(*part) for part in parts]).sum()


def main() -> None:
    device = prepare()
    results = []
    for tokens in (50, 197, 577, 1025, 1601):
        torch.manual_seed(0)
        teacher = [torch.randn(1, 2, HEADS, tokens, WIDTH, device=device) for _ in range(LAYERS)]
        queries, keys = (
            [torch.randn(1, HEADS, tokens, WIDTH, device=device, requires_grad=True) for _ in range(LAYERS)]
            for _ in range(2)
        )

        def run(
            loss: Callable[..., Tensor], inputs: tuple[list[Tensor], ...] = (teacher, queries, keys)
        ) -> None:
            gradients = torch.autograd.grad(loss(*inputs), [*inputs[1], *inputs[2]])
            assert len(gradients) == 2 * LAYERS

        actions = {"materialised": lambda: run(materialised), "streamed": lambda: run(streamed)}
        taken = measure.medians(actions, repeats=5, warm_up=1, device=device)
        held = {name: measure.peak_bytes(action, device) for name, action in actions.items()}
        print(
            f"{tokens:5} tokens  "
            + "  ".join(f"{name} {1e3 * taken[name]:8.1f} ms {held[name] / 1e6:8.1f} MB" for name in actions)
        )
        results += [
            measure.Result(
                name=f"attention loss, extra memory at {tokens} tokens ({device.type})",
                value=round(held["streamed"] / held["materialised"], 4),
                target=TARGETS.get(tokens),
                better="lower",
                unit="x",
            ),
            measure.Result(
                name=f"attention loss, time at {tokens} tokens ({device.type})",
                value=round(taken["streamed"] / taken["materialised"], 4),
                target=None,
                better="lower",
                unit="x",
            ),
        ]
    measure.write(results)


if __name__ == "__main__":
    main()
