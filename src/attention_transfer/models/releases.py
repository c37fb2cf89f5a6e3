"""Files in which projects release their pre-trained Vision Transformers: how they are read, and what is the encoder.

A file is safetensors, or PyTorch's format where it can be loaded without running code. What is in it goes by the
project that made it; the names inside of the encoder are then left to timm, see published.py.
"""

from __future__ import annotations

import argparse
import math
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from torch import Tensor

from attention_transfer.config import Release
from attention_transfer.errors import StudyError

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel, of pixels from 0 to 1."""
IMAGENET: Normalisation = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
INCEPTION: Normalisation = (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD)

_POSITIONS = ("pos_embed", "visual.pos_embed", "visual.trunk.pos_embed", "visual.positional_embedding")
NOT_ENCODER = ("head.", "head_dist.", "fc_norm.", "norm.", "attn_pool.", "pre_logits.")
"""What stands behind the blocks: students have their own pool, norm and head."""


@dataclass(frozen=True)
class Format:
    """The layout of a project's releases.

    Attributes:
        wrappers: keys of the file under which the weights lie; the first that is there counts, if any.
        prefixes: in front of the encoder's names; the first that is there counts. Names without it are dropped.
        dropped: beginnings of names that belong to the method of pre-training.
        images: how the encoder's images were normalised; None where no one way is the format's.
        heads: of the models that were released, by width.
        entries: those of timm that build them, by width, where the plain one does not.
    """

    wrappers: tuple[str, ...]
    images: Normalisation | None
    heads: Mapping[int, int]
    prefixes: tuple[str, ...] = ("",)
    dropped: tuple[str, ...] = ()
    entries: Mapping[int, str] | None = None


_PLAIN_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
_BEIT_DROPPED = ("mask_token", "lm_head.", "cls_pt_layers.")

FORMATS: dict[Release, Format] = {
    # timm's own files, its training checkpoints, and others with these names.
    "timm": Format(("state_dict", "model"), None, {}, ("module.", "")),
    # He et al., 2022: the encoder, or with decoder; facebookresearch/mae
    "mae": Format(("model",), IMAGENET, _PLAIN_HEADS, dropped=("mask_token", "decoder_")),
    # Chen et al., 2021: the encoder that gradients train, as its linear evaluation has it; facebookresearch/moco-v3
    "moco_v3": Format(
        ("state_dict",), IMAGENET, {384: 12, 768: 12}, ("module.base_encoder.", "base_encoder.")
    ),
    # Caron et al., 2021: the teacher, which the paper evaluates, or the backbone alone; facebookresearch/dino
    "dino": Format(("teacher",), IMAGENET, _PLAIN_HEADS, ("module.backbone.", "backbone.", "")),
    # Oquab et al., 2023; facebookresearch/dinov2. timm reads mask_token as their sign.
    "dinov2": Format(
        ("model",),
        IMAGENET,
        {384: 6, 768: 12, 1024: 16, 1536: 24},
        entries={
            384: "vit_small_patch14_dinov2",
            768: "vit_base_patch14_dinov2",
            1024: "vit_large_patch14_dinov2",
            1536: "vit_giant_patch14_dinov2",
        },
    ),
    # Bao et al., 2022; microsoft/unilm/beit
    "beit": Format(
        ("model", "module"),
        INCEPTION,
        {768: 12, 1024: 16},
        dropped=_BEIT_DROPPED,
        entries={768: "beit_base_patch16_224", 1024: "beit_large_patch16_224"},
    ),
    # Peng et al., 2022; microsoft/unilm/beit2
    "beit_v2": Format(
        ("model", "module"),
        IMAGENET,
        {768: 12, 1024: 16},
        dropped=_BEIT_DROPPED,
        entries={768: "beitv2_base_patch16_224", 1024: "beitv2_large_patch16_224"},
    ),
    # Touvron et al., 2021 and 2022; facebookresearch/deit
    "deit": Format(("model",), IMAGENET, _PLAIN_HEADS),
}


@dataclass(frozen=True)
class Released:
    """What a file holds.

    Attributes:
        format: whose layout it has.
        encoder: its weights, under the names of the project.
    """

    format: Release
    encoder: dict[str, Tensor]


def load(path: Path, stated: Release | None, *, where: str) -> Released:
    """Reads a file in the layout that is stated, or that its content shows.

    Args:
        where: file and key of params.yaml, for error messages.

    Raises:
        StudyError: the file is missing, damaged, would run code, or is of another layout.
    """
    content = read(path, made_by=f"correct the path in {where}, or convert the file to safetensors")
    chosen = stated or detected(path, content, where=where)
    layout = FORMATS[chosen]
    weights = _unwrapped(content, layout.wrappers)
    prefix = next((each for each in layout.prefixes if any(name.startswith(each) for name in weights)), None)
    encoder = {
        name.removeprefix(prefix or ""): value
        for name, value in weights.items()
        if prefix is not None and name.startswith(prefix)
    }
    encoder = {
        name: value for name, value in encoder.items() if not name.startswith((*layout.dropped, *NOT_ENCODER))
    }
    if "patch_embed.proj.weight" not in encoder:
        raise StudyError(
            f"has no encoder in the layout of {chosen}: no {prefix or layout.prefixes[0]}patch_embed.proj.weight"
            f"{f' under {layout.wrappers[0]!r}' if layout.wrappers else ''}",
            where=str(path),
            remedy=f"set format to another of {', '.join(FORMATS)}, or bring another file",
        )
    return Released(chosen, encoder)


def read(path: Path, *, made_by: str) -> dict[str, Any]:
    """The whole content of a file with weights, without running any code that is in it.

    Args:
        made_by: what to do where it cannot be read.

    Raises:
        StudyError: missing, damaged, or it asks for code to be run.
    """
    try:
        if _is_safetensors(path):
            return dict(load_file(path))
        # argparse's container of options, which many training scripts save beside the weights, is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old formats, which are read all the same
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise StudyError("does not exist", where=str(path), remedy=made_by) from error
    except pickle.UnpicklingError as error:
        raise StudyError(
            "is refused: it is neither safetensors nor a file of PyTorch's that can be read without running code "
            f"that is in it ({_reason(error)})",
            where=str(path),
            remedy=made_by,
        ) from error
    except (SafetensorError, OSError, ValueError, RuntimeError, EOFError, KeyError) as error:
        raise StudyError(
            f"is not a whole file of weights, of safetensors or PyTorch ({_reason(error)})",
            where=str(path),
            remedy=made_by,
        ) from error
    if not isinstance(content, dict):
        raise StudyError(
            f"holds a {type(content).__name__}, no weights by name", where=str(path), remedy=made_by
        )
    return content


def detected(path: Path, content: Mapping[str, Any], *, where: str) -> Release:
    """The layout that a file's content shows.

    Raises:
        StudyError: it fits several, which differ in how their images are normalised; the error lists them.
    """
    if any(
        name.startswith(("module.base_encoder.", "base_encoder.")) for name in _names(content, "state_dict")
    ):
        return "moco_v3"
    if any("backbone." in name for name in _names(content, "teacher")) and "student" in content:
        return "dino"
    names = set(_unwrapped(content, ("model", "module", "state_dict")))
    if "mask_token" in names and any(name.startswith("decoder_") for name in names):
        return "mae"
    if "mask_token" in names and any(name.endswith("ls1.gamma") for name in names):
        return "dinov2"
    if any(name.startswith("cls_pt_layers.") for name in names):
        return "beit_v2"
    if _is_safetensors(path) and "blocks.0.norm1.weight" in names and "mask_token" not in names:
        return "timm"
    raise StudyError(
        "does not tell whose layout it has, on which depends how its images were normalised",
        where=str(path),
        remedy=f"say whose, as format beside {where}: one of {', '.join(FORMATS)}",
    )


def places(weights: Mapping[str, Any], *, prefix: int = 1) -> int | None:
    """Patches along a side that an encoder's positions are for; None where no weight tells.

    Args:
        prefix: places of other tokens in its position embedding.
    """
    positions = next((weights[name] for name in _POSITIONS if name in weights), None)
    if positions is not None:
        if "register_tokens" in weights:
            prefix = 1  # DINOv2 has a place for its class token, and none for its registers
        return math.isqrt(positions.shape[-2] - prefix)
    table = next(
        (value for name, value in weights.items() if name.endswith("relative_position_bias_table")), None
    )
    # A table has (2 n - 1)^2 places, and three for the class token.
    return None if table is None else (math.isqrt(table.shape[0]) + 1) // 2


def _names(content: Mapping[str, Any], key: str) -> list[str]:
    inside = content.get(key)
    return [str(name) for name in inside] if isinstance(inside, dict) else []


def _unwrapped(content: Mapping[str, Any], wrappers: tuple[str, ...]) -> dict[str, Tensor]:
    """The weights, wherever they lie in the file; whatever is none is left out."""
    inside = next((content[key] for key in wrappers if isinstance(content.get(key), dict)), content)
    return {str(name): value for name, value in inside.items() if isinstance(value, Tensor)}


def _is_safetensors(path: Path) -> bool:
    """By its content: PyTorch's files are archives or pickles."""
    with path.open("rb") as file:
        start = file.read(9)
    return path.suffix == ".safetensors" or (start[8:9] == b"{" and not start.startswith(b"PK"))


def _reason(error: Exception) -> str:
    """The gist of torch's long explanations."""
    text = str(error)
    if wanted := re.search(r"(?:Unsupported global: GLOBAL|Unsupported class) (\S+)", text):
        return f"it asks for {wanted[1]}"
    if inner := re.search(r"WeightsUnpickler error: (.+)", text):
        return inner[1].strip()
    return re.split(r"\. |\n", text)[0] or type(error).__name__
