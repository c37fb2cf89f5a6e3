"""Supervised pre-training on coarser labels than the task's: its classes, merged into groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_transfer.models.projections import pooled
from attention_transfer.models.vit import ViT


class GroupClassification(nn.Module):
    """A linear classifier of the groups on the encoder's pooled features, as a student has of the classes.

    Label smoothing as in Szegedy et al., Rethinking the Inception Architecture, CVPR 2016, equation 8: over
    the groups.

    Args:
        encoder: trained.
        groups: of each class of the task its group; groups are numbered from 0 without gaps, at least two.
        label_smoothing: share of the target that is spread over all groups, in [0, 1).

    Raises:
        ValueError: an argument is out of its range.
    """

    views: ClassVar[int] = 1
    labelled: ClassVar[bool] = True
    groups: Tensor  # (classes,) int64

    def __init__(self, encoder: ViT, *, groups: Sequence[int], label_smoothing: float) -> None:
        super().__init__()
        count = len(set(groups))
        if count < 2 or set(groups) != set(range(count)):
            raise ValueError(
                f"groups: expected at least two, numbered from 0 without gaps, got {sorted(set(groups))}"
            )
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing: expected a number in [0, 1), got {label_smoothing}")
        self.label_smoothing = label_smoothing
        self.encoder = encoder
        self.head = nn.Linear(encoder.num_features, count)
        # Given, not learned: a checkpoint must not bring other groups.
        self.register_buffer("groups", torch.tensor(groups, dtype=torch.int64), persistent=False)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, mean over the batch, in float32.

        Args:
            images: (batch, channels, size, size).
            labels: (batch,) int64, of the task's classes.

        Raises:
            ValueError: labels are of another type or shape, or one is no class of the task.
        """
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"labels: expected int64 ({len(images)},), got {labels.dtype} {tuple(labels.shape)}"
            )
        # A negative index would silently count from the end.
        if not bool(((labels >= 0) & (labels < len(self.groups))).all()):
            raise ValueError(
                f"labels: expected 0 to {len(self.groups) - 1}, got {int(labels.min())} to {int(labels.max())}"
            )
        logits = self.head(pooled(self.encoder, images)).float()
        return F.cross_entropy(logits, self.groups[labels], label_smoothing=self.label_smoothing)
