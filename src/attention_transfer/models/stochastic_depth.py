"""Stochastic depth (Huang et al., Deep Networks with Stochastic Depth, ECCV 2016) in passes over parts of a batch."""

from __future__ import annotations

from timm.layers import DropPath
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
