"""Memory of Attention Distill's loss and gradient: streamed, against the formula with all maps kept.

    python benchmarks/attention_loss_memory.py [--quick]

12 layers, 6 heads, 64 numbers a head (ViT-S), one image, 50 to 1601 tokens; on a GPU in bfloat16. Counted:
whatever the loss and its gradient allocate beyond the queries and keys. Also the times, in turns.
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
    return torch.stack(
        [streamed_attention_cross_entropy(*part.unbind(dim=1), q, k) for part, q, k in parts]
    ).sum()


def main() -> None:
    options = measure.arguments(__doc__)
    device = prepare()
    precision = torch.bfloat16 if device.type == "cuda" else torch.float32
    results = []
    for tokens in (50,) if options.quick else (50, 197, 577, 1025, 1601):
        torch.manual_seed(0)
        shape = (1, HEADS, tokens, WIDTH)
        teacher = [
            torch.randn(1, 2, HEADS, tokens, WIDTH, device=device, dtype=precision) for _ in range(LAYERS)
        ]
        queries, keys = (
            [torch.randn(shape, device=device, dtype=precision, requires_grad=True) for _ in range(LAYERS)]
            for _ in range(2)
        )

        def run(
            loss: Callable[..., Tensor], inputs: tuple[list[Tensor], ...] = (teacher, queries, keys)
        ) -> None:
            torch.autograd.grad(loss(*inputs), [*inputs[1], *inputs[2]])

        actions = {"materialised": lambda: run(materialised), "streamed": lambda: run(streamed)}
        taken = measure.medians(actions, repeats=1 if options.quick else 7, warm_up=1, device=device)
        held = {name: measure.peak_bytes(action, device) for name, action in actions.items()}
        print(
            f"{tokens:5} tokens  "
            + "  ".join(f"{name} {1e3 * taken[name]:8.1f} ms {held[name] / 1e6:8.1f} MB" for name in actions)
        )
        for what, figures, target in (("extra memory", held, TARGETS.get(tokens)), ("time", taken, None)):
            results.append(
                measure.Result(
                    f"attention loss memory: {what} at {tokens} tokens ({device.type})",
                    figures["streamed"] / figures["materialised"],
                    target,
                    "lower",
                    "x",
                )
            )
    measure.write(results, options)


if __name__ == "__main__":
    main()
