"""SimMIM: Xie et al., SimMIM: A Simple Framework for Masked Image Modeling, CVPR 2022."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_transfer import draws
from attention_transfer.models.tokens import token_layout
from attention_transfer.models.vit import ViT


class MaskedImageModelling(nn.Module):
    """The encoder sees all patches, some of them hidden; a linear layer predicts the pixels of those.

    Unlike the paper, a hidden patch is replaced in pixel space, by learned pixels, not after the patch
    projection by a learned token: so any encoder serves as it is, with whatever positions it has. A patch is
    the unit of masking (there a square of 32 pixels), and targets are normalised within each patch, as the
    masked autoencoder's are. The tokens are normalised before the linear layer, because an encoder that pools
    by mean has its last norm behind the pool, which this method never reaches.

    Args:
        encoder: trained.
        mask_ratio: share of patches that are hidden, in (0, 1), 0.6 in the paper; at least one patch is
            hidden and one is not.

    Raises:
        ValueError: mask_ratio is out of its range.
        TypeError: the encoder has no fixed grid of patches, or drops some.
    """

    views: ClassVar[int] = 1
    labelled: ClassVar[bool] = False

    def __init__(self, encoder: ViT, *, mask_ratio: float) -> None:
        super().__init__()
        if not 0 < mask_ratio < 1:
            raise ValueError(f"mask_ratio: expected a number between 0 and 1, got {mask_ratio}")
        rows, columns = token_layout(encoder).grid
        self.patches = rows * columns
        self.hidden = max(1, min(self.patches - 1, round(self.patches * mask_ratio)))
        self.patch_size: tuple[int, int] = encoder.patch_embed.patch_size
        pixels = encoder.patch_embed.proj.weight[0].numel()
        self.encoder = encoder
        self.mask_pixels = nn.Parameter(torch.empty(pixels, 1))
        self.norm = nn.LayerNorm(encoder.num_features)
        self.head = nn.Linear(encoder.num_features, pixels)
        nn.init.normal_(self.mask_pixels, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Mean absolute error over the pixels of hidden patches, in float32.

        Args:
            images: (batch, channels, size, size).
        """
        order = draws.of_examples(
            len(images), lambda count: torch.rand(count, self.patches, device=images.device)
        ).argsort(dim=1)
        hidden = torch.zeros_like(order, dtype=torch.bool).scatter(1, order[:, : self.hidden], True)
        errors = (self.predict(images, hidden).float() - self.targets(images)).abs().mean(dim=2)
        return (errors * hidden).sum() / hidden.sum()

    def predict(self, images: Tensor, hidden: Tensor) -> Tensor:
        """Normalised pixels of all patches, in the order of `targets`, from those that are not hidden.

        Args:
            images: (batch, channels, size, size).
            hidden: (batch, patches) bool, patches in reading order.
        """
        seen = torch.where(hidden[:, None], self.mask_pixels, self._pixels(images))
        images = F.fold(seen, images.shape[2:], kernel_size=self.patch_size, stride=self.patch_size)
        tokens = self.encoder.forward_features(images)[:, self.encoder.num_prefix_tokens :]
        predictions: Tensor = self.head(self.norm(tokens))
        return predictions

    def targets(self, images: Tensor) -> Tensor:
        """Pixels by patch, normalised within each patch: (batch, patches, channels * rows * columns)."""
        pixels = self._pixels(images).mT
        variance, mean = torch.var_mean(pixels, dim=2, keepdim=True)
        return (pixels - mean) / (variance + 1e-6).sqrt()

    def _pixels(self, images: Tensor) -> Tensor:
        """(batch, pixels of a patch, patches)."""
        return F.unfold(images, kernel_size=self.patch_size, stride=self.patch_size)
