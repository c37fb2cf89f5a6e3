"""How alike two networks are: their features by CKA, their attention by Jensen-Shannon divergence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attention_transfer.blocks import blocks
from attention_transfer.evaluation import attention_statistics
from attention_transfer.evaluation.attention_statistics import check_maps, distributions, entropy

VANISHING = 1e-12  # of a layer's HSIC with itself, for features of norm 1: no more than rounding leaves


def linear_cka(first: Tensor, second: Tensor) -> float:
    """Linear centred kernel alignment of two layers' features on the same examples, without bias.

    HSIC(first, second) / sqrt(HSIC(first, first) HSIC(second, second)) (Kornblith et al., ICML 2019), with
    the unbiased estimator of HSIC (Song et al., JMLR 2012, HSIC_1) in all three places as in Nguyen et al.
    (ICLR 2021), but of all examples at once. The usual, biased estimator calls any two layers alike that are
    wide and seen on few examples; this one gives about 0 for independent features. Neither rotations of the
    features nor a shift or a common factor change it.

    Args:
        first, second: (examples, width of the layer), floating point, finite, at least 4 examples.

    Returns:
        1 for features that are alike; about 0, on either side of it, for independent ones; at least -1.

    Raises:
        ValueError: shapes or values are not as above, or CKA is undefined: features that are constant, or
            with which no pair of examples is more alike than another.
    """
    return float(_cka_matrix({"first": first}, {"second": second}))


def cka_matrix(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """`linear_cka` of every layer of one network with every layer of another: (layers1, layers2), float64.

    Args:
        first, second: each layer's features, (examples, width of the layer), all of the same examples.

    Raises:
        ValueError: no layer, or as in `linear_cka`; the message names the layer.
    """
    named = [
        {f"{name}[{layer}]": features for layer, features in enumerate(network)}
        for name, network in (("first", first), ("second", second))
    ]
    if not all(named):
        raise ValueError(f"expected at least one layer each, got {len(first)} and {len(second)}")
    return _cka_matrix(*named)


@torch.no_grad()
def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """Jensen-Shannon divergence between attention maps, row by row, in nats.

    H((p + q) / 2) - (H(p) + H(q)) / 2 with entropy H (Lin, 1991): 0 for equal rows, ln 2 for rows without a
    key in common.

    Args:
        first, second: (.., queries, keys), each row a distribution over the keys.

    Returns:
        (.., queries), float64, between 0 and ln 2.

    Raises:
        ValueError: shapes or values are not as above.
    """
    if first.shape != second.shape or first.ndim < 2 or first.numel() == 0:
        raise ValueError(
            f"expected two maps of one shape (.., queries, keys), not empty, "
            f"got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    p, q = distributions(first, "first"), distributions(second, "second")
    return _divergence(p, q, entropy(p), entropy(q))


@torch.no_grad()
def head_divergence(first: Tensor, second: Tensor) -> Tensor:
    """Jensen-Shannon divergence of every pair of heads, in nats, mean over examples and queries.

    Args:
        first, second: one layer's maps of the same examples, (examples, heads, queries, keys); the numbers of
            heads may differ.

    Returns:
        (heads1, heads2), float64, between 0 and ln 2.

    Raises:
        ValueError: shapes or values are not as above.
    """
    check_maps(first, "first")
    check_maps(second, "second")
    examples, heads, queries, keys = first.shape
    others = second.shape[1]
    if second.shape != (examples, others, queries, keys):
        raise ValueError(
            f"second: expected maps of {examples} examples, {queries} queries and {keys} keys, "
            f"got shape {tuple(second.shape)}"
        )
    total = torch.zeros(heads, others, dtype=torch.float64, device=first.device)
    for at, line in blocks(examples, queries, max(heads, others) * keys, attention_statistics.BLOCK):
        p, q = distributions(first[at, :, line], "first"), distributions(second[at, :, line], "second")
        p_entropy, q_entropy = entropy(p), entropy(q)
        for head in range(heads):
            one = slice(head, head + 1)
            total[head] += _divergence(p[:, one], q, p_entropy[:, one], q_entropy).sum(dim=(0, 2))
    return total / (examples * queries)


def matched(divergence: Tensor) -> tuple[float, list[int]]:
    """Mean divergence of the heads under their best one-to-one assignment.

    Heads have no order: two networks may hold the same heads at different places. The least mean over all
    permutations (Kuhn, 1955, by scipy) is 0 for these; being a minimum, it is at most that of `unmatched`,
    also for networks that have nothing to do with each other.

    Args:
        divergence: (heads, heads), from `head_divergence`.

    Returns:
        The mean, and for every head of the first network its partner in the second.

    Raises:
        ValueError: not square, empty or not finite.
    """
    from scipy.optimize import linear_sum_assignment  # 0.5 s, and nothing else here needs it

    _check_square(divergence)
    costs = divergence.double().cpu().numpy()
    heads, partners = linear_sum_assignment(costs)
    return float(costs[heads, partners].mean()), [int(partner) for partner in partners]


def unmatched(divergence: Tensor) -> float:
    """Mean divergence of each head from the head of the same number.

    Args:
        divergence: (heads, heads), from `head_divergence`.

    Raises:
        ValueError: not square, empty or not finite.
    """
    _check_square(divergence)
    return float(divergence.double().diagonal().mean())


class _Layer(NamedTuple):
    """Centred features of norm 1: themselves, or their Gram matrix, and its diagonal."""

    matrix: Tensor
    diagonal: Tensor


@torch.no_grad()
def _cka_matrix(first: dict[str, Tensor], second: dict[str, Tensor]) -> Tensor:
    everything = first | second
    for name, features in everything.items():
        _check_features(features, name, len(next(iter(everything.values()))))
    # Gram or covariance matrices, whichever are smaller at the widest layer; one form, to compare any two.
    grams = any(len(features) <= features.shape[1] for features in everything.values())
    layers = {name: _layer(features, grams) for name, features in everything.items()}
    own = {name: _hsic(layer, layer, grams) for name, layer in layers.items()}
    for name, value in own.items():
        if value < VANISHING:
            raise ValueError(
                f"{name}: expected pairs of examples that differ in how alike they are, got examples "
                "that are all equal but one, or all equally far apart"
            )
    rows = [[_hsic(layers[a], layers[b], grams) / (own[a] * own[b]).sqrt() for b in second] for a in first]
    return torch.stack([torch.stack(row) for row in rows])


def _check_features(features: Tensor, name: str, examples: int) -> None:
    if features.ndim != 2 or features.shape[1] == 0 or not features.is_floating_point():
        raise ValueError(
            f"{name}: expected floating point (examples, width), got {features.dtype} {tuple(features.shape)}"
        )
    if len(features) < 4:
        raise ValueError(f"{name}: expected at least 4 examples, got {len(features)}")
    if len(features) != examples:
        raise ValueError(f"{name}: expected {examples} examples like the first layer, got {len(features)}")
    if not features.isfinite().all():
        raise ValueError(f"{name}: expected finite features, got others")
    if (features == features[0]).all():
        raise ValueError(f"{name}: expected features that differ between examples, got constant ones")


def _layer(features: Tensor, gram: bool) -> _Layer:
    centred = features.double() - features.double().mean(dim=0)
    centred /= torch.linalg.vector_norm(centred)  # of no effect on CKA, and the fourth powers stay in range
    return _Layer(centred @ centred.mT if gram else centred, centred.square().sum(dim=1))


def _hsic(first: _Layer, second: _Layer, grams: bool) -> Tensor:
    """Unbiased HSIC of two layers, times n (n - 3), which CKA cancels.

    Song et al.'s formula, for Gram matrices whose diagonals are set to zero. The rows of a centred Gram
    matrix K have sum zero, so without their diagonals k they have sum -k, and with tr(K L) = |X'Y|^2 the
    formula needs no matrix but the one of that norm.
    """
    n = len(first.diagonal)
    if grams:
        product = torch.dot(first.matrix.flatten(), second.matrix.flatten())
    else:
        product = (first.matrix.mT @ second.matrix).square().sum()
    diagonals, traces = first.diagonal @ second.diagonal, first.diagonal.sum() * second.diagonal.sum()
    return product - diagonals * n / (n - 2) + traces / ((n - 1) * (n - 2))


def _divergence(p: Tensor, q: Tensor, p_entropy: Tensor, q_entropy: Tensor) -> Tensor:
    """Jensen-Shannon divergence of distributions of known entropy; only rounding leaves [0, ln 2]."""
    return (entropy((p + q).div_(2)) - (p_entropy + q_entropy) / 2).clamp(0, math.log(2))


def _check_square(divergence: Tensor) -> None:
    if divergence.ndim != 2 or divergence.shape[0] != divergence.shape[1] or divergence.numel() == 0:
        raise ValueError(f"divergence: expected as many heads as heads, got {tuple(divergence.shape)}")
    if not divergence.isfinite().all():
        raise ValueError(f"divergence: expected finite values, got {divergence.tolist()}")
