"""What tests of the pre-training methods share: one encoder of every kind, and images that have structure."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from timm.models import VisionTransformer
from timm.models.beit import Beit
from timm.models.eva import Eva
from torch import Tensor, nn

Floats = npt.NDArray[np.float64]
Batch = Callable[[int], tuple[Tensor, ...]]  # what the model is called with at a step

PATCH, GRID, WIDTH, WARM_UP = 4, 2, 16, 10
SIZE = PATCH * GRID
TINY: dict[str, Any] = {
    "img_size": SIZE,
    "patch_size": PATCH,
    "in_chans": 1,
    "num_classes": 0,
    "embed_dim": WIDTH,
    "depth": 1,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "global_pool": "avg",
}
ENCODERS: dict[str, Callable[..., nn.Module]] = {
    "plain": lambda **arguments: VisionTransformer(**arguments, fc_norm=True),
    "rotary, registers": lambda **arguments: Eva(
        **arguments, use_fc_norm=True, use_rot_pos_emb=True, use_abs_pos_emb=False, num_reg_tokens=2
    ),
    "relative positions": lambda **arguments: Beit(**arguments, use_fc_norm=True, use_rel_pos_bias=True),
}


def make_encoder(kind: str = "plain", seed: int = 0, **changed: Any) -> Any:
    """A tiny encoder in training mode; equal seeds give equal weights.

    Norms, biases and relative positions start at ones and zeros: here they do not, or no test would see them.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = ENCODERS[kind](**{**TINY, **changed})
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return encoder


def make_images(count: int = 6, seed: int = 0, channels: int = 1) -> Tensor:
    return torch.randn(count, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def structured(count: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noisy images of eight patterns, in turn, and which pattern each shows."""
    ramp = torch.linspace(-1.5, 1.5, SIZE)
    row, column = ramp[:, None].expand(SIZE, SIZE), ramp.expand(SIZE, SIZE)
    half = torch.stack([row, column, row * column, (row + column) / 2])
    patterns = torch.cat([half, -half])
    labels = torch.arange(count) % len(patterns)
    return patterns[labels][:, None] + 0.2 * make_images(count, seed), labels


def two_views(step: int) -> tuple[Tensor, Tensor]:
    """Two noises on the same patterns in the same order, others at every step."""
    return structured(seed=2 * step)[0], structured(seed=2 * step + 1)[0]


def make_optimizer(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)


def train(
    model: nn.Module,
    batch: Batch,
    steps: range,
    *,
    learning_rate: float,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[float]:
    """Losses of steps as the training loop takes them: seeded one by one, by AdamW, with a warm-up."""
    optimizer = optimizer or make_optimizer(model, learning_rate)
    losses = []
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / WARM_UP)
        model.train()
        torch.manual_seed(step)
        loss = model(*batch(step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def assert_resumes_to_the_bit(make: Callable[[], nn.Module], batch: Batch) -> None:
    """Six steps are three steps, a checkpoint, and three steps of a model that brings nothing else."""
    rate = 3e-3
    straight, first, second = make(), make(), make()
    losses = train(straight, batch, range(6), learning_rate=rate)
    optimizer = make_optimizer(first, rate)
    train(first, batch, range(3), learning_rate=rate, optimizer=optimizer)
    file = io.BytesIO()
    torch.save([first.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, moments = torch.load(file, weights_only=True)
    for value in second.state_dict().values():
        value.fill_(7)
    second.load_state_dict(weights)
    optimizer = make_optimizer(second, rate)
    optimizer.load_state_dict(moments)
    assert train(second, batch, range(3, 6), learning_rate=rate, optimizer=optimizer) == losses[3:]
    expected, found = straight.state_dict(), second.state_dict()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def without_gradient(model: nn.Module, loss: Tensor) -> set[str]:
    """Trainable parameters that a loss does not reach, or reaches with a gradient of zeros."""
    model.zero_grad()
    loss.backward()
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.abs().max() > 0)
    }


def array(tensor: Tensor) -> Floats:
    return tensor.detach().double().numpy()


def naive_pool(encoder: Any, images: Tensor) -> Floats:
    """Mean of the patch tokens, then layer norm; (batch, width)."""
    with torch.no_grad():
        tokens = array(encoder.forward_features(images))
    patches = tokens[:, tokens.shape[1] - GRID * GRID :].mean(axis=1)
    return naive_layer_norm(patches, encoder.fc_norm)


def naive_layer_norm(rows: Floats, norm: Any) -> Floats:
    centred = rows - rows.mean(axis=-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + norm.eps)
    return centred / deviation * array(norm.weight) + array(norm.bias)


def spread(embeddings: Tensor) -> float:
    """Deviation of normalised embeddings over a batch, times the root of their width: 1 at best, 0 in collapse.

    As in Chen, He, Exploring Simple Siamese Representation Learning, CVPR 2021, section 4.1.
    """
    directions = nn.functional.normalize(embeddings.double(), dim=1)
    return float(directions.std(dim=0).mean()) * embeddings.shape[1] ** 0.5


def effective_rank(embeddings: Tensor) -> float:
    """Exponential of the entropy of the centred embeddings' singular values (Roy, Vetterli, 2007)."""
    values = torch.linalg.svdvals(embeddings.double() - embeddings.double().mean(dim=0))
    return float(torch.special.entr(values / values.sum()).sum().exp())
