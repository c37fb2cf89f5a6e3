"""The ways to apply a copied map, forward and backward, against PyTorch's fused attention: what `path` rests on.

    python benchmarks/constant_map.py [--quick]

Shapes of the default study and of ViT-S/16, float32 on a CPU and bfloat16 on a GPU; the values alone have a
gradient. 2 means twice as fast as the fused call, whose backward pass computes all three gradients on a CPU.
"""

from __future__ import annotations

from functools import partial
from typing import get_args

import measure
import torch

from attention_transfer.models.constant_map import Path, mixed_by_constant_map, path
from attention_transfer.training.machine import prepare

SHAPES = (  # batch, heads, tokens, head_dim
    (125, 4, 17, 24),
    (8, 6, 50, 64),
    (8, 6, 197, 64),
    (2, 6, 577, 64),
    (1, 6, 1025, 64),
    (1, 6, 1601, 64),
)


def main() -> None:
    options = measure.arguments(__doc__)
    device = prepare()
    precision = torch.bfloat16 if device.type == "cuda" else torch.float32
    results = []
    for shape in SHAPES[:2] if options.quick else SHAPES:
        tokens, head_dim = shape[-2:]
        torch.manual_seed(0)
        queries, keys, values, gradient = torch.randn(4, *shape, device=device, dtype=precision)
        values.requires_grad_()

        def run(
            how: Path, inputs: tuple[torch.Tensor, ...] = (queries, keys, values, gradient)
        ) -> torch.Tensor:
            *qkv, received = inputs
            return torch.autograd.grad(mixed_by_constant_map(*qkv, how=how), qkv[2], received)[0]

        taken = measure.medians(
            {how: partial(run, how) for how in get_args(Path)},
            repeats=2 if options.quick else 60,
            warm_up=3,
            device=device,
        )
        chosen = path(device.type, tokens, head_dim)
        print(
            f"{tokens:5} tokens, {head_dim} numbers a head, rule: {chosen:12}  "
            + "  ".join(f"{how} {1e3 * seconds:.2f} ms" for how, seconds in taken.items())
        )
        for how in ("materialised", "streamed"):
            mark = ", the rule's choice" if how == chosen else ""
            name = (
                f"constant map: {how} at {tokens} tokens and {head_dim} numbers a head{mark} ({device.type})"
            )
            results.append(measure.Result(name, taken["fused"] / taken[how], None, "higher", "x"))
    measure.write(results, options)


if __name__ == "__main__":
    main()
