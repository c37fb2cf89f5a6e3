"""Floating-point operations that a Vision Transformer cannot do without; a multiply-add counts as two.

Only matrix products are counted, and each as seldom as the arithmetic allows: an attention map is made once, nothing is
recomputed in the backward pass, a copy student has no queries and keys, and an online teacher stops at the queries and
keys of its last layer. All numbers are of one image.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from attention_transfer.config import Architecture
from attention_transfer.models.timm_entries import GATED_SHARE


@dataclass(frozen=True)
class Model:
    """The sizes that decide it.

    Attributes:
        patches: of an image.
        pixels: numbers in a patch.
        tokens: that attend to each other.
        mlp: weights of a block's MLP.
        classes: of the linear head; 0 without one.
    """

    patches: int
    pixels: int
    tokens: int
    width: int
    depth: int
    mlp: int
    classes: int

    @classmethod
    def of(cls, architecture: Architecture, *, image_size: int, channels: int, classes: int) -> Model:
        """Of params.yaml."""
        width = architecture.width
        if "swiglu" in architecture.components:
            mlp = 3 * width * int(width * (architecture.mlp_ratio * GATED_SHARE))
        else:
            mlp = 2 * width * int(width * architecture.mlp_ratio)
        return cls(
            patches=(image_size // architecture.patch_size) ** 2,
            pixels=channels * architecture.patch_size**2,
            tokens=architecture.tokens(image_size),
            width=width,
            depth=architecture.depth,
            mlp=mlp,
            classes=classes,
        )

    @property
    def embedding(self) -> int:
        """The patch embedding's output, or its weights' gradient."""
        return 2 * self.patches * self.pixels * self.width

    @property
    def linear(self) -> int:
        """The outputs of one block's linear layers; gradients of inputs and of weights are as many each."""
        return 2 * self.tokens * (4 * self.width**2 + self.mlp)

    @property
    def queries_and_keys(self) -> int:
        """Of one block."""
        return 2 * self.tokens * self.width * 2 * self.width

    @property
    def product(self) -> int:
        """One product of the size of q k^T, for all heads: P v, and each of their gradients, are others."""
        return 2 * self.tokens**2 * self.width

    @property
    def head(self) -> int:
        """The classifier's output."""
        return 2 * self.width * self.classes

    @property
    def block(self) -> int:
        """A forward pass of one."""
        return self.linear + 2 * self.product

    @property
    def forward(self) -> int:
        """A whole forward pass."""
        return self.embedding + self.depth * self.block + self.head

    @property
    def training(self) -> int:
        """Forward and backward pass: the images get no gradient."""
        return 3 * self.forward - self.embedding

    def read(self, last: int) -> int:
        """A frozen teacher's pass up to the logits of layer `last`, counted from 0 at the input."""
        return self.embedding + last * self.block + self.queries_and_keys + self.product


def copied(student: Model, layers: int) -> int:
    """What a copy student saves in a training step, in so many layers whose whole maps it is handed.

    It has no queries and keys; of P v there is the product and the gradient of v.
    """
    return layers * (3 * student.queries_and_keys + 4 * student.product)


def copied_forward(student: Model, layers: int) -> int:
    """The same in a forward pass."""
    return layers * (student.queries_and_keys + student.product)


def perceptron(*widths: int) -> int:
    """A forward pass of linear layers, for one row."""
    return sum(2 * inputs * outputs for inputs, outputs in pairwise(widths))
