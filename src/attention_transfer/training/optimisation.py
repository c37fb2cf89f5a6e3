"""AdamW with layer decay and a cosine schedule with warm-up, all from timm."""

from __future__ import annotations

from typing import Protocol

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn


class Recipe(Protocol):
    """How the parameters are optimised."""

    @property
    def learning_rate(self) -> float: ...
    @property
    def min_learning_rate(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def betas(self) -> tuple[float, float]: ...
    @property
    def layer_decay(self) -> float: ...
    @property
    def epochs(self) -> int: ...
    @property
    def warmup_epochs(self) -> float: ...
    @property
    def ema(self) -> float | None: ...


def optimiser(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW over the parameters that require gradients; none decays biases and norms."""
    return create_optimizer_v2(
        model,
        opt="adamw",
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        betas=recipe.betas,
        layer_decay=recipe.layer_decay if recipe.layer_decay < 1 else None,
        fused=True,
    )


def schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps_per_epoch: int) -> CosineLRScheduler:
    """Linear warm-up, then half a cosine to `min_learning_rate`, by step."""
    total = recipe.epochs * steps_per_epoch
    warmup = min(round(recipe.warmup_epochs * steps_per_epoch), total - 1)
    return CosineLRScheduler(
        optimizer,
        t_initial=total - warmup,
        lr_min=recipe.min_learning_rate,
        warmup_t=warmup,
        warmup_lr_init=0.0,
        warmup_prefix=True,
        t_in_epochs=False,
    )
