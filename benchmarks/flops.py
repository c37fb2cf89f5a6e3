"""The floating-point operations of the benchmarks' model, ViT-S/16: `attention_transfer.measuring.flops` for batches.

The classifier is left out.
"""

from __future__ import annotations

from attention_transfer.config import Architecture
from attention_transfer.measuring import flops

PATCH, WIDTH = 16, 384
LINEAR = {
    "qkv": (WIDTH, 3 * WIDTH),
    "proj": (WIDTH, WIDTH),
    "fc1": (WIDTH, 4 * WIDTH),
    "fc2": (4 * WIDTH, WIDTH),
}
"""Input and output width of a block's linear layers."""


def model(size: int, depth: int = 12) -> flops.Model:
    """For images of `size` pixels."""
    architecture = Architecture(patch_size=PATCH, width=WIDTH, depth=depth, heads=6, mlp_ratio=4.0)
    return flops.Model.of(architecture, image_size=size, channels=3, classes=0)


def tokens(size: int) -> int:
    """Patches and class token of an image of `size` pixels."""
    return model(size).tokens


def embedding(batch: int, size: int) -> int:
    """The patch embedding's output, or its weights' gradient."""
    return batch * model(size).embedding


def linear(batch: int, size: int) -> int:
    """One block's linear layers: outputs, and gradients of inputs and weights."""
    return 3 * batch * model(size).linear


def attention(batch: int, size: int) -> int:
    """One product of the size of q k^T, for all heads."""
    return batch * model(size).product


def step(kind: str, source: str, *, batch: int, size: int, depth: int) -> int:
    """A step of Attention Copy or Distill in all layers.

    Args:
        kind: `copy` or `distill`.
        source: `cached` or `online`.
    """
    of_an_image = model(size, depth)
    student = of_an_image.training - (flops.copied(of_an_image, depth) if kind == "copy" else 0)
    # The teacher's logits, where the teacher itself does not make them.
    teacher = of_an_image.read(depth - 1) if source == "online" else depth * of_an_image.product
    return batch * (student + teacher)
