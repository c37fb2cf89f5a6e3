"""Teachers that others have trained: their weights, fitted to a study's images and to our pool and head."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor

from attention_transfer.errors import StudyError
from attention_transfer.models import vit
from attention_transfer.models.releases import NOT_ENCODER, Normalisation, places
from attention_transfer.models.timm_entries import ViT

PATCHES = "patch_embed.proj.weight"
_SHARED_BIAS = "rel_pos_bias.relative_position_bias_table"
_BIAS = "relative_position_bias_table"
_CANNOT = (RuntimeError, KeyError, AttributeError, ValueError, TypeError, IndexError)


@dataclass(frozen=True)
class Fitted:
    """A teacher, and what was done to its weights.

    Attributes:
        model: in the study's sizes, with a fresh norm behind its pool.
        grid: patches along a side that its positions were trained for; None where they have no grid.
        changes: in words, for the record.
    """

    model: ViT
    grid: int | None
    changes: str


def fit(
    weights: Mapping[str, Tensor],
    arguments: vit.Arguments,
    *,
    trained: Normalisation | None,
    study: Normalisation,
    where: Path,
) -> Fitted:
    """A model with these weights that takes the study's images.

    timm's function for the family maps the names, and resamples positions and tables of relative positions to the
    study's patches.

    Args:
        weights: of the encoder, in a layout that timm knows.
        arguments: of the model.
        trained: how its images were normalised; None: as the study's are.
        study: how the study's are.
        where: the file, for error messages.

    Raises:
        StudyError: they are not the weights of such a model.
    """
    model = vit.create(arguments, seed=0)
    side = model.patch_embed.proj.weight.shape[-1]
    found = _mapped(dict(weights), model, side, where=where)
    grid, own = _grid(weights, model), model.patch_embed.grid_size[0]
    changes = (
        [f"positions of {grid} x {grid} patches resampled to {own} x {own}"]
        if grid not in (None, own)
        else []
    )
    if trained is not None:
        found = _renormalised(found, model, trained, study, where=where)
        changes.append(
            f"images with mean {_listed(trained[0])} and deviation {_listed(trained[1])} folded into patches"
        )
    fresh = {name: value for name, value in model.state_dict().items() if name.startswith("fc_norm.")}
    vit.insert(model, {**found, **fresh}, where=where)
    return Fitted(model, grid, "; ".join(changes) or "none")


def _mapped(weights: dict[str, Tensor], model: ViT, side: int, *, where: Path) -> dict[str, Tensor]:
    """By timm's names and in the model's sizes, without what stands behind the blocks."""
    patches = weights.get(PATCHES)
    if patches is not None and patches.ndim == 4 and patches.shape[-1] != side:
        raise StudyError(  # timm would resample them
            f"{PATCHES}: expected patches of {side} pixels, found {patches.shape[-1]}",
            where=str(where),
            remedy="give params.yaml the architecture of this file, or another file",
        )
    module: Any = sys.modules[type(model).__module__]
    # DeiT-III calls its LayerScale otherwise than the class's other families do.
    options = {"adapt_layer_scale": True} if isinstance(model, VisionTransformer) else {}
    try:
        with warnings.catch_warnings():
            # PyTorch's, of the way in which timm resamples tables of relative positions.
            warnings.filterwarnings("ignore", message="Using a non-tuple sequence|torch.searchsorted")
            found = module.checkpoint_filter_fn(
                _with_a_table_for_each_block(weights, model), model, **options
            )
    except _CANNOT as error:
        raise StudyError(
            f"cannot be mapped to {type(model).__name__} by timm ({type(error).__name__}: {error})",
            where=str(where),
            remedy="state its format, and in architecture the entry of timm that builds it (key timm)",
        ) from error
    return {name: value for name, value in found.items() if not name.startswith(NOT_ENCODER)}


def _with_a_table_for_each_block(weights: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """BEiT shares one table of relative positions in pre-training; timm's models of it have one a block."""
    if _SHARED_BIAS not in weights or getattr(model, "rel_pos_bias", None) is not None:
        return weights
    table = weights.pop(_SHARED_BIAS)
    return weights | {f"blocks.{number}.attn.{_BIAS}": table for number in range(len(model.blocks))}


def _grid(weights: Mapping[str, Tensor], model: Any) -> int | None:
    """Patches along a side that the positions in a file are for, before timm has resampled them."""
    embedded = 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens
    return places(weights, prefix=embedded)


def _renormalised(
    weights: dict[str, Tensor], model: Any, trained: Normalisation, study: Normalisation, *, where: Path
) -> dict[str, Tensor]:
    """Weights that make of the study's images what they made of images normalised as in training.

    A pixel p is (p - m) / s there and x = (p - m') / s' here, so that (p - m) / s = x s'/s + (m' - m) / s. The
    patch projection has no padding: the factor goes into its weights, the rest, times them, into its bias, or, where
    it has none, into the positions of the patches. In float64, rounded once. Grey images are RGB of equal channels,
    whose weights add up.
    """
    projection, kept = weights[PATCHES].double(), torch.promote_types(weights[PATCHES].dtype, torch.float32)
    mean, deviation = (torch.tensor(values, dtype=torch.float64) for values in trained)
    if projection.ndim != 4 or projection.shape[1] != len(mean):
        raise StudyError(
            f"{PATCHES}: expected {len(mean)} channels, found {tuple(projection.shape)}",
            where=str(where),
            remedy="bring a model of RGB images",
        )
    own_mean, own_deviation = (
        torch.tensor(values, dtype=torch.float64).expand(len(mean)) for values in study
    )
    constant = torch.einsum("ocij,c->o", projection, (own_mean - mean) / deviation)
    projection = projection * (own_deviation / deviation).view(1, -1, 1, 1)
    if model.in_chans == 1:
        projection = projection.sum(dim=1, keepdim=True)
    changed = weights | {PATCHES: projection.to(kept)}
    bias = "patch_embed.proj.bias"
    if bias in weights:
        changed[bias] = (weights[bias].double() + constant).to(kept)
    elif (positions := weights.get("pos_embed")) is not None and isinstance(
        model.patch_embed.norm, torch.nn.Identity
    ):
        prefix = positions.shape[1] - model.patch_embed.num_patches
        moved = positions.double().clone()
        moved[:, prefix:] += constant
        changed["pos_embed"] = moved.to(kept)
    else:
        raise StudyError(
            "has neither a bias of patches nor positions that could take the normalisation of its images",
            where=str(where),
            remedy="choose a teacher of docs/teachers.md",
        )
    return changed


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
