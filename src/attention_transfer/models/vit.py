"""Students and teachers: plain Vision Transformers from timm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import VisionTransformer

from attention_transfer.config import Architecture
from attention_transfer.errors import StudyError, repro
from attention_transfer.files import atomic, read_sealed, write_sealed, xxh3

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
CHECKSUM = "weights_xxh3"  # key of config.json


def model_arguments(
    architecture: Architecture, *, image_size: int, channels: int, classes: int
) -> dict[str, Any]:
    """Arguments of timm's VisionTransformer: mean pool of patch tokens, LayerNorm, linear head (paper A)."""
    return {
        "img_size": image_size,
        "in_chans": channels,
        "num_classes": classes,
        "patch_size": architecture.patch_size,
        "embed_dim": architecture.width,
        "depth": architecture.depth,
        "num_heads": architecture.heads,
        "mlp_ratio": architecture.mlp_ratio,
        "global_pool": "avg",
        "fc_norm": True,
    }


def create(arguments: dict[str, Any], *, seed: int, drop_path: float = 0.0) -> VisionTransformer:
    """A randomly initialised model; equal seeds give equal weights, and no other random state is touched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VisionTransformer(**arguments, drop_path_rate=drop_path)


def save(
    folder: Path, model: torch.nn.Module, arguments: dict[str, Any], more: Mapping[str, Any] | None = None
) -> None:
    """Writes weights as safetensors, then what timm needs to build the model, and their checksum.

    Load them with `timm.create_model("vit_tiny_patch16_224", checkpoint_path=..., num_classes=...,
    **model_args)`, with both from config.json, or `timm.create_model("local-dir:<folder>", pretrained=True)`.

    Args:
        more: further entries of config.json, which timm leaves alone.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with atomic(folder / WEIGHTS) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    model_args = {key: value for key, value in arguments.items() if key != "num_classes"}
    write_sealed(
        folder / CONFIG,
        {
            "architecture": "vit_tiny_patch16_224",  # any plain ViT entry: model_args say the rest
            "num_classes": arguments["num_classes"],
            "model_args": model_args,
            "pretrained_cfg": {  # without it timm opens no folder
                "input_size": [arguments["in_chans"], arguments["img_size"], arguments["img_size"]],
                "num_classes": arguments["num_classes"],
                "first_conv": "patch_embed.proj",
                "classifier": "head",
            },
            CHECKSUM: xxh3(folder / WEIGHTS),
            **(more or {}),
        },
    )


def load_weights(path: Path, *, made_by: str) -> dict[str, torch.Tensor]:
    """Reads a safetensors file, and nothing else: no file is ever unpickled.

    Raises:
        StudyError: missing, damaged, or another format.
    """
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise StudyError("does not exist", where=str(path), remedy=made_by) from error
    except (SafetensorError, OSError, ValueError) as error:
        raise StudyError(
            f"is not a whole safetensors file ({error}); other formats are refused, because loading "
            "them can run code",
            where=str(path),
            remedy=made_by,
        ) from error


def load(
    folder: Path, *, made_by: str, change: Callable[[VisionTransformer, dict[str, Any]], None] | None = None
) -> VisionTransformer:
    """The model that `save` wrote, in eval mode.

    Args:
        change: gives the new model, by config.json, the form in which it was saved.

    Raises:
        StudyError: one of its files is missing or damaged, or not of the other.
    """
    path, remedy = folder / WEIGHTS, f"make it anew: {repro(made_by, again=True)}"
    config = read_sealed(folder / CONFIG, made_by=made_by)
    weights = load_weights(path, made_by=remedy)
    if xxh3(path) != config[CHECKSUM]:
        raise StudyError(
            f"is damaged: its checksum is not the one in {CONFIG}", where=str(path), remedy=remedy
        )
    model = VisionTransformer(**config["model_args"], num_classes=config["num_classes"])
    if change is not None:
        change(model, config)
    insert(model, weights, where=path)
    return model.eval()


def insert(model: torch.nn.Module, weights: dict[str, torch.Tensor], *, where: Path) -> None:
    """Loads all weights into the model, every one of them, or says which do not fit."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if expected != found:
        different = sorted(
            name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
        )
        name = different[0]
        raise StudyError(
            f"{len(different)} weights do not fit; {name}: expected {expected.get(name, 'no such weight')}, "
            f"found {found.get(name, 'none')}",
            where=str(where),
            remedy="give params.yaml the architecture of this file, or another file",
        )
    model.load_state_dict(weights)
