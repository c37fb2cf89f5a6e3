"""Stochastic depth (Huang et al., Deep Networks with Stochastic Depth, ECCV 2016) in passes over parts of a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from timm.layers import DropPath, calculate_drop_path_rates
from torch import Tensor, nn

from attention_transfer import draws


class StochasticDepth(nn.Module):
    """timm's DropPath, whose random numbers belong to the examples of the whole step: see `draws`."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, residual: Tensor) -> Tensor:
        """residual: (batch, ..); that of some examples becomes zero, the others make up for it."""
        if not self.training:
            return residual
        keep = 1 - self.drop_prob
        ones = (1,) * (residual.ndim - 1)
        kept = draws.of_examples(
            len(residual), lambda count: residual.new_empty(count, *ones).bernoulli_(keep)
        )
        return residual * (kept / keep)


def replace_drop_path(model: nn.Module) -> None:
    """Puts it in the place of each of timm's own."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, DropPath):
                assert child.scale_by_keep
                setattr(module, name, StochasticDepth(child.drop_prob))


def insert(model: Any, drop_path: float) -> None:
    """Makes a frozen timm model drop branches, in eval mode too, at the rates of one that is trained with `drop_path`.

    Args:
        model: built without stochastic depth.
    """
    rates = calculate_drop_path_rates(drop_path, len(model.blocks))
    for block, rate in zip(model.blocks, rates, strict=True):
        if rate > 0:
            block.drop_path1, block.drop_path2 = StochasticDepth(rate), StochasticDepth(rate)


@contextlib.contextmanager
def same_as_next(device: torch.device) -> Iterator[None]:
    """In the `with` block, a model drops what the next one to run will drop: it draws the same numbers.

    Args:
        device: where both run.
    """
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
        yield
