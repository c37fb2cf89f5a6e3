"""Passes over tensors that every training step of ViT-S/16 makes beside its matrix products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flops
import torch
from steps import Setting
from torch import Tensor
from torch.nn import functional as F

ADAMW = "AdamW"


def of_a_block(setting: Setting) -> dict[str, Callable[[], Any]]:
    """Those of one block, forward and backward: two norms, GELU and residual sums."""
    rows = setting.batch * flops.tokens(setting.size)
    options: dict[str, Any] = {"device": setting.device, "dtype": setting.precision}
    narrow, wide = (torch.randn(rows, width, **options) for width in (flops.WIDTH, 4 * flops.WIDTH))
    scale, shift = (torch.ones(flops.WIDTH, **options).requires_grad_() for _ in range(2))

    def norm(tokens: Tensor) -> Tensor:
        return F.layer_norm(tokens, (flops.WIDTH,), scale, shift)

    def backward(function: Callable[[Tensor], Tensor], given: Tensor, *weights: Tensor) -> Callable[[], Any]:
        tokens, gradient = given.clone().requires_grad_(), torch.randn_like(given)
        return lambda: torch.autograd.grad(function(tokens), (tokens, *weights), gradient)

    return {
        "norm 1": backward(norm, narrow, scale, shift),
        "norm 2": backward(norm, narrow, scale, shift),
        "gelu": backward(F.gelu, wide),
        # Two on the way forward, and two where the gradients of both branches meet.
        "residual sums": lambda: [narrow + narrow for _ in range(4)],
    }


def of_a_teacher_block(setting: Setting) -> dict[str, Callable[[], Any]]:
    """Those of one block's forward pass."""
    rows = setting.batch * flops.tokens(setting.size)
    options: dict[str, Any] = {"device": setting.device, "dtype": setting.precision}
    narrow, wide = (torch.randn(rows, width, **options) for width in (flops.WIDTH, 4 * flops.WIDTH))
    scale = torch.ones(flops.WIDTH, **options)

    def forward() -> None:
        for _ in range(2):
            F.layer_norm(narrow, (flops.WIDTH,), scale, scale)
            narrow + narrow
        F.gelu(wide)

    return {"teacher's passes": forward}


def of_the_optimiser(setting: Setting, weights: int) -> dict[str, Callable[[], Any]]:
    """AdamW on so many weights, in one tensor."""
    weight = torch.zeros(weights, device=setting.device, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    return {ADAMW: torch.optim.AdamW([weight], lr=1e-4, fused=True).step}
