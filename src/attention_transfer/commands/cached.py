"""A finished cache against the study that it was made for: its recipe, and a sample of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from attention_transfer import plan
from attention_transfer.assembly import CachedSet, Parts
from attention_transfer.config import Study
from attention_transfer.errors import StudyError
from attention_transfer.layout import Layout
from attention_transfer.transfer.cache import CacheReader
from attention_transfer.transfer.quantisation import rounded
from attention_transfer.transfer.teacher_source import teacher_attention

LUCK = 4.0
"""Rounding that fell otherwise than in the recomputation may cost so many times its divergence."""

NOISE = {"float32": 2.0**-16, "bfloat16": 2.0**-6}
"""By training.precision, how far two machines' queries and keys may lie apart, as a share of their length:
the rounding of one operation (2^-24, 2^-9) with room for what it grows to over the layers."""


@dataclass(frozen=True)
class Divergence:
    """KL divergence, in nats, from recomputed maps to cached ones, over sampled rows, layers, heads, queries.

    Attributes:
        rows: views in the sample.
        mean, maximum: of the divergence.
        explained_mean, explained_maximum: what number format and precision can account for.
    """

    rows: int
    mean: float
    maximum: float
    explained_mean: float
    explained_maximum: float

    @property
    def explained(self) -> bool:
        return self.mean <= self.explained_mean and self.maximum <= self.explained_maximum


def difference(study: Study, layout: Layout, teacher: str, which: str) -> str | None:
    """Why a cached set is not the present study's; None where it is, or where that cannot be told."""
    parts = Parts(study, layout, torch.device("cpu"))
    try:
        recipe = parts.cache_recipe(teacher, cached_set(which))
    except StudyError:
        return None  # the present teacher or images are not made yet
    try:
        reader = CacheReader(layout.cache(teacher) / which, expect=None)
    except StudyError:
        return None  # unfinished or damaged: the stage goes on from its shards
    if reader.layout != plan.teacher_layout(study, teacher):
        return "cache of another architecture or number format"
    try:
        CacheReader(layout.cache(teacher) / which, expect=recipe)
    except StudyError as error:
        return error.problem
    return None


def cached_set(name: str) -> CachedSet:
    """A set's name as the type that has no other values."""
    found: CachedSet = next(which for which in get_args(CachedSet) if which == name)
    return found


def recompute(parts: Parts, teacher: str, which: CachedSet, folder: Path, *, count: int) -> Divergence:
    """Recomputes evenly spaced rows of a finished set from teacher and images, and compares the maps.

    What may be found: `LUCK` times the divergence of the recomputed maps from themselves rounded to the
    number format; and what arithmetic on another machine may add. The latter by Hoeffding's lemma: maps
    whose scaled logits differ by at most e diverge by at most e^2 / 2, and queries and keys that are off
    by a share u of their length change a logit by at most 2 u scale |q| |k|.

    Raises:
        StudyError: rows, images or teacher are damaged or missing, or the recipe is another one.
    """
    reader = CacheReader(folder, expect=parts.cache_recipe(teacher, which))
    rows = np.unique(np.linspace(0, len(reader) - 1, min(count, len(reader))).round().astype(np.int64))
    layers, precision = tuple(range(reader.layout.layers)), parts.study.training.precision
    attention = parts.study.attention
    network = parts.teacher(teacher)
    found: list[Tensor] = []
    rounding: list[Tensor] = []
    noise: list[Tensor] = []
    for view in np.unique(reader.keys[rows, 1]):
        chosen = rows[reader.keys[rows, 1] == view]
        images, examples = _images(parts, which, reader.keys, chosen), reader.keys[chosen, 0]
        with torch.autocast(parts.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            exact = teacher_attention(network, images, layers).float()
        if attention.content == "maps":
            own, stored = maps(exact), reader.read_maps(examples, int(view))
            found.append(map_divergence(own, stored))
            rounding.append(map_divergence(own, rounded(own.float(), attention.dtype)))
        else:
            found.append(divergence(exact, reader.read(examples, int(view)).to(exact)))
            rounding.append(divergence(exact, rounded(exact, attention.dtype).float()))
        noise.append(noise_bound(exact, NOISE[precision]))
    values, rounded_values, noise_values = (
        torch.cat([piece.flatten() for piece in pieces]) for pieces in (found, rounding, noise)
    )
    return Divergence(
        rows=len(rows),
        mean=float(values.mean()),
        maximum=float(values.max()),
        explained_mean=float(LUCK * rounded_values.mean() + noise_values.mean()),
        explained_maximum=float(LUCK * rounded_values.max() + noise_values.max()),
    )


def _images(parts: Parts, which: CachedSet, keys: np.ndarray, rows: np.ndarray) -> Tensor:
    """The images of these rows, which all show the same view."""
    if which != "views":
        return parts.clean(parts.evaluated(which)[0].images)(rows)  # the set's rows are in its own order
    return parts.labelled.render(rows % len(parts.labelled), int(keys[rows[0], 1]))


def divergence(exact: Tensor, given: Tensor) -> Tensor:
    """KL(exact || given) of each attention row, in float64: (batch, layers, heads, tokens).

    Args:
        exact, given: queries and keys, (batch, 2, layers, heads, tokens, head_dim).
    """
    # Layer by layer: the maps of all layers would not always fit into memory.
    return torch.stack(
        [_layer_divergence(exact[:, :, layer], given[:, :, layer]) for layer in range(exact.shape[2])], dim=1
    )


def maps(attention: Tensor) -> Tensor:
    """Queries and keys (batch, 2, layers, ..) to maps (batch, layers, heads, tokens, tokens), float64."""
    return torch.stack([_logits(layer.double()).softmax(dim=-1) for layer in attention.unbind(dim=2)], dim=1)


def map_divergence(exact: Tensor, stored: Tensor) -> Tensor:
    """KL(exact || stored) of each row, in float64: (batch, layers, heads, tokens).

    A weight that the format rounds to zero counts as half of float16's smallest number.
    """
    given = stored.to(exact.device, torch.float64).clamp(min=2.0**-25)
    given = given / given.sum(dim=-1, keepdim=True)
    return torch.special.xlogy(exact, exact / given).sum(dim=-1).clamp(min=0)


def _layer_divergence(exact: Tensor, given: Tensor) -> Tensor:
    own, other = (_logits(part.double()).log_softmax(dim=-1) for part in (exact, given))
    return (own.exp() * (own - other)).sum(dim=-1).clamp(min=0)


def _logits(attention: Tensor) -> Tensor:
    queries, keys = attention.unbind(dim=1)
    return queries @ keys.mT * attention.shape[-1] ** -0.5


def noise_bound(exact: Tensor, share: float) -> Tensor:
    """The bound of `recompute` for each attention row: (batch, layers, heads, tokens)."""
    queries, keys = exact.double().norm(dim=-1).unbind(dim=1)
    longest = keys.max(dim=-1, keepdim=True).values
    logit = 2 * share * exact.shape[-1] ** -0.5 * queries * longest
    return logit.square() / 2
