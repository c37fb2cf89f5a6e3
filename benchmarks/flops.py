"""Floating-point operations that a training step of ViT-S/16 cannot do without; a multiply-add counts as two.

Only matrix products are counted, and each as seldom as the arithmetic allows: an attention map is made once,
nothing is recomputed in the backward pass, a copy student has no queries and keys, and an online teacher
stops at the queries and keys of its last layer. The classifier is left out.
"""

from __future__ import annotations

PATCH, WIDTH, PIXELS = 16, 384, 3 * 16 * 16
LINEAR = {
    "qkv": (WIDTH, 3 * WIDTH),
    "proj": (WIDTH, WIDTH),
    "fc1": (WIDTH, 4 * WIDTH),
    "fc2": (4 * WIDTH, WIDTH),
}
"""Input and output width of a block's linear layers."""


def tokens(size: int) -> int:
    """Patches and class token of an image of `size` pixels."""
    return (size // PATCH) ** 2 + 1


def embedding(batch: int, size: int) -> int:
    """The patch embedding's output, or its weights' gradient."""
    return 2 * batch * (tokens(size) - 1) * PIXELS * WIDTH


def linear(batch: int, size: int) -> int:
    """One block's linear layers: outputs, and gradients of inputs and weights."""
    return 3 * 2 * batch * tokens(size) * sum(inputs * outputs for inputs, outputs in LINEAR.values())


def attention(batch: int, size: int) -> int:
    """One product of the size of q k^T, for all heads: P v, and each of their gradients, are others."""
    return 2 * batch * tokens(size) ** 2 * WIDTH


def step(kind: str, source: str, *, batch: int, size: int, depth: int) -> int:
    """A step of Attention Copy or Distill in all layers.

    Args:
        kind: `copy` or `distill`.
        source: `cached` or `online`.
    """
    block, product = linear(batch, size), attention(batch, size)
    queries_and_keys = 2 * batch * tokens(size) * WIDTH * 2 * WIDTH
    online = source == "online"
    # P v and its gradient by v; of its own map also the logits, and three gradients more.
    products = 2 if kind == "copy" else 6
    # The teacher's logits, where the teacher itself does not make them.
    products += not online
    if kind == "copy":
        block -= 3 * queries_and_keys
    student = 2 * embedding(batch, size) + depth * (block + products * product)
    if not online:
        return student
    whole = linear(batch, size) // 3 + 2 * product
    return student + embedding(batch, size) + (depth - 1) * whole + queries_and_keys + product
