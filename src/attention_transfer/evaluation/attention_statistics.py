"""Where heads look: how far, and how widely. Block by block and in float64, so that memory stays small."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attention_transfer.blocks import blocks

BLOCK = 2**17  # elements of maps at a time: in float64 a megabyte, which stays in a core's cache
ROUNDING = 0.01  # of a row's sum: bfloat16 maps, the coarsest in use, are off by less than half of it


@torch.no_grad()
def mean_attention_distance(maps: Tensor, grid: tuple[int, int], patch_size: int, prefix: int) -> Tensor:
    """How far each head looks, in pixels: a head's counterpart of a convolution's receptive field.

    The distance between the centres of query and key patch, weighted by attention, mean over patch queries
    and examples (Dosovitskiy et al., ICLR 2021, figure 7; Raghu et al., NeurIPS 2021). Prefix tokens lie
    nowhere: they are left out as queries, and the attention that a patch pays to patches is renormalised. A patch
    that pays them none, all of it being on prefix tokens, looks nowhere and is left out too: a softmax that saturates
    does that in models that were trained here.

    Args:
        maps: (examples, heads, tokens, tokens), each row a distribution over the keys.
        grid: rows and columns of patches, in reading order after the prefix.
        patch_size: side of a patch in pixels.
        prefix: tokens before the patches: class token and registers.

    Returns:
        (heads,), float64; between 0 and the distance of the outermost patches of the grid; NaN where all of a
        head's attention is on prefix tokens.

    Raises:
        ValueError: shapes or values are not as above.
    """
    check_maps(maps, "maps")
    if min(grid) < 1 or patch_size < 1 or prefix < 0:
        raise ValueError(
            f"expected grid and patch_size of at least 1 and prefix of at least 0, "
            f"got {grid}, {patch_size} and {prefix}"
        )
    _, heads, queries, keys = maps.shape
    patches = grid[0] * grid[1]
    if not queries == keys == prefix + patches:
        raise ValueError(
            f"maps: expected {prefix} + {grid[0]} * {grid[1]} queries and keys, got {queries} and {keys}"
        )
    places = torch.cartesian_prod(*(torch.arange(side, device=maps.device) for side in grid)) * patch_size
    distances = torch.linalg.vector_norm((places[:, None] - places).double(), dim=-1)
    total = torch.zeros(heads, dtype=torch.float64, device=maps.device)
    counted = torch.zeros_like(total)
    for _, line, weights, to_patches in _of_patches(maps, prefix):
        looking = to_patches > 0
        total += ((weights * distances[line]).sum(dim=-1) / to_patches.where(looking, 1)).sum(dim=(0, 2))
        counted += looking.sum(dim=(0, 2))
    return total / counted


@torch.no_grad()
def attention_on(maps: Tensor, shares: Tensor, prefix: int) -> Tensor:
    """How much each head looks at something, as a multiple of what equal attention to all patches would give it.

    The attention that patches pay to patches, renormalised, weighted by each patch's share: mean over queries (without
    those that pay patches none), divided by the mean share of the image's patches; over those examples in which that
    is not 0.

    Args:
        maps: (examples, heads, tokens, tokens), each row a distribution over the keys.
        shares: (examples, patches), of each patch the share that is looked for, between 0 and 1.
        prefix: tokens before the patches: class token and registers.

    Returns:
        (heads,), float64: 1 for equal attention; NaN if it is in no example, or all of a head's attention is on
        prefix tokens.

    Raises:
        ValueError: shapes or values are not as above.
    """
    check_maps(maps, "maps")
    examples, heads, queries, keys = maps.shape
    patches = keys - prefix
    if not (queries == keys and shares.shape == (examples, patches) and patches > 0):
        raise ValueError(
            f"expected maps of {prefix} + patches queries and keys and shares of each patch, got "
            f"{tuple(maps.shape)} and {tuple(shares.shape)}"
        )
    if not bool(((shares >= 0) & (shares <= 1)).all()):
        raise ValueError(
            f"shares: expected values from 0 to 1, got {float(shares.min())} to {float(shares.max())}"
        )
    equal = shares.double().mean(dim=-1)
    shown = equal > 0
    total = torch.zeros(heads, dtype=torch.float64, device=maps.device)
    counted = torch.zeros_like(total)
    for at, _, weights, to_patches in _of_patches(maps, prefix):
        looking = to_patches > 0
        looked = (weights * shares[at].double()[:, None, None]).sum(dim=-1) / to_patches.where(looking, 1)
        relative = looked / equal[at].clamp_min(torch.finfo(torch.float64).tiny)[:, None, None]
        total += relative[shown[at]].sum(dim=(0, 2))
        counted += looking[shown[at]].sum(dim=(0, 2))
    return total / counted


def _of_patches(maps: Tensor, prefix: int) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Blocks of patch queries: examples, queries, their attention to each patch and to all patches together."""
    examples, heads, _, keys = maps.shape
    for at, line in blocks(examples, keys - prefix, heads * keys, BLOCK):
        weights = distributions(maps[at, :, prefix:][:, :, line], "maps")[..., prefix:]
        yield at, line, weights, weights.sum(dim=-1)


@torch.no_grad()
def mean_entropy(maps: Tensor) -> Tensor:
    """How widely each head looks: entropy of its rows in nats, mean over queries and examples.

    Args:
        maps: (examples, heads, queries, keys), each row a distribution over the keys, prefix tokens included.

    Returns:
        (heads,), float64: 0 for one key a query, ln(keys) for equal attention to all.

    Raises:
        ValueError: shapes or values are not as above.
    """
    check_maps(maps, "maps")
    examples, heads, queries, keys = maps.shape
    total = torch.zeros(heads, dtype=torch.float64, device=maps.device)
    for at, line in blocks(examples, queries, heads * keys, BLOCK):
        total += entropy(distributions(maps[at, :, line], "maps")).sum(dim=(0, 2))
    return total / (examples * queries)


def entropy(rows: Tensor) -> Tensor:
    """Entropy in nats of distributions over the last axis, with 0 log 0 = 0: (..)."""
    terms: Tensor = torch.special.entr(rows)
    return terms.sum(dim=-1)


def check_maps(maps: Tensor, name: str) -> None:
    """Raises ValueError unless `maps` is floating point (examples, heads, queries, keys) and not empty."""
    if maps.ndim != 4 or maps.numel() == 0 or not maps.is_floating_point():
        raise ValueError(
            f"{name}: expected floating point (examples, heads, queries, keys), none of them 0, "
            f"got {maps.dtype} {tuple(maps.shape)}"
        )


def distributions(maps: Tensor, name: str) -> Tensor:
    """The maps in float64, each row divided by its sum, which rounding to a shorter format has moved from 1.

    Raises:
        ValueError: a value is negative or not finite, or a sum is not 1 within rounding.
    """
    rows = maps.double()
    sums = rows.sum(dim=-1, keepdim=True)
    # Written so that NaN fails.
    if not (bool((rows >= 0).all()) and bool(((sums - 1).abs() < ROUNDING).all())):
        raise ValueError(
            f"{name}: expected rows of probabilities, not negative and with sum 1, got values from "
            f"{float(rows.min()):.4g} and sums from {float(sums.min()):.4g} to {float(sums.max()):.4g}"
        )
    return rows / sums
