"""Students and teachers: Vision Transformers from timm, plain or with the components of other families."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from attention_transfer.config import Architecture, Study
from attention_transfer.errors import StudyError, repro
from attention_transfer.files import atomic, read_sealed, write_sealed, xxh3
from attention_transfer.models import timm_entries
from attention_transfer.models.stochastic_depth import replace_drop_path
from attention_transfer.models.tokens import TokenLayout

ViT: TypeAlias = timm_entries.ViT

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
CHECKSUM = "weights_xxh3"  # key of config.json

LAYER_SCALE = 0.1  # initial value; Touvron et al., 2021, for shallow models
_PLAIN, _EVA, _BEIT = "vit_tiny_patch16_224", "eva_giant_patch14_224", "beit_base_patch16_224"
"""By these entries config.json names timm's classes; the entries' own sizes are all overridden."""


@dataclass(frozen=True)
class Arguments:
    """What timm needs to build a model.

    Attributes:
        entry: of timm.
        values: keyword arguments, over those of the entry.
    """

    entry: str
    values: dict[str, Any]


def model_arguments(architecture: Architecture, *, image_size: int, channels: int, classes: int) -> Arguments:
    """A model with mean pool of patch tokens, LayerNorm and linear head (paper A), and these components:

    - layer_scale: a learned factor for every channel behind attention and MLP (Touvron et al., 2021);
    - registers: learned tokens between class token and patches (Darcet et al., 2024);
    - pre_norm: LayerNorm before the first block (CLIP);
    - qk_norm: LayerNorm of queries and keys;
    - rotary: rotary embedding of the patches' places in queries and keys, beside the learned one (EVA-02);
    - swiglu: gated MLP, two thirds as wide, so that it has as many weights (Shazeer, 2020);
    - relative_bias: learned bias of the logits by relative place, in every layer (BEiT).

    With `timm` it is that entry's model, with the same pool and head, see timm_entries.py.

    Raises:
        StudyError: there is no such entry, it cannot be served, or it builds other sizes than are stated.
    """
    if architecture.timm is not None:
        pooled = timm_entries.arguments(architecture)
        size = {"img_size": image_size, "in_chans": channels, "num_classes": classes}
        return Arguments(architecture.timm, {**size, **pooled})
    parts = set(architecture.components)
    values: dict[str, Any] = {
        "img_size": image_size,
        "in_chans": channels,
        "num_classes": classes,
        "patch_size": architecture.patch_size,
        "embed_dim": architecture.width,
        "depth": architecture.depth,
        "num_heads": architecture.heads,
        "mlp_ratio": architecture.mlp_ratio * (timm_entries.GATED_SHARE if "swiglu" in parts else 1),
        "global_pool": "avg",
    }
    if not architecture.class_token:
        values["class_token"] = False
    if not parts:
        return Arguments(_PLAIN, {**values, "fc_norm": True})
    # Both heads start as the plain one does: timm scales those of Eva and Beit down.
    values["init_values"] = LAYER_SCALE if "layer_scale" in parts else None
    if "relative_bias" in parts:
        values["init_values"] = values["init_values"] or 0.0  # for None timm would take the entry's
        more: dict[str, Any] = {
            "use_abs_pos_emb": True,
            "use_rel_pos_bias": True,
            "swiglu_mlp": "swiglu" in parts,
            "use_fc_norm": True,
            "head_init_scale": 1.0,
        }
        return Arguments(_BEIT, {**values, **more})
    if parts & {"rotary", "swiglu"}:
        more = {
            "use_rot_pos_emb": "rotary" in parts,
            "swiglu_mlp": "swiglu" in parts,
            "num_reg_tokens": architecture.registers,
            "use_pre_transformer_norm": "pre_norm" in parts,
            "qk_norm": "qk_norm" in parts,
            "attn_type": "rope",  # the plain attention, with biases of queries, keys and values
            "use_fc_norm": True,
            "head_init_scale": 1.0,
        }
        return Arguments(_EVA, {**values, **more})
    more = {
        "reg_tokens": architecture.registers,
        "pre_norm": "pre_norm" in parts,
        "qk_norm": "qk_norm" in parts,
        "fc_norm": True,
    }
    return Arguments(_PLAIN, {**values, **more})


def tokens(study: Study, run: str) -> tuple[TokenLayout, TokenLayout]:
    """Those of a run's teacher, and those of its student."""

    def layout(architecture: Architecture) -> TokenLayout:
        side = study.data.image_size // architecture.patch_size
        return TokenLayout(architecture.class_token, architecture.registers, (side, side))

    return layout(study.teachers[study.runs[run].teacher].architecture), layout(study.architecture(run))


def create(arguments: Arguments, *, seed: int, drop_path: float = 0.0) -> ViT:
    """A randomly initialised model; equal seeds give equal weights, and no other random state is touched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _build(arguments.entry, arguments.values, drop_path_rate=drop_path)


def _build(entry: str, values: Mapping[str, Any], **more: Any) -> ViT:
    model: ViT = timm.create_model(entry, **values, **more)
    replace_drop_path(model)
    return model


def save(
    folder: Path, model: torch.nn.Module, arguments: Arguments, more: Mapping[str, Any] | None = None
) -> None:
    """Writes weights as safetensors, then what timm needs to build the model, and their checksum.

    Load them with `timm.create_model(architecture, checkpoint_path=..., num_classes=..., **model_args)`, with
    all three from config.json, or `timm.create_model("local-dir:<folder>", pretrained=True)`.

    Args:
        more: further entries of config.json, which timm leaves alone.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with atomic(folder / WEIGHTS) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    values = arguments.values
    model_args = {key: value for key, value in values.items() if key != "num_classes"}
    write_sealed(
        folder / CONFIG,
        {
            "architecture": arguments.entry,
            "num_classes": values["num_classes"],
            "model_args": model_args,
            "pretrained_cfg": {  # without it timm opens no folder
                "input_size": [values["in_chans"], values["img_size"], values["img_size"]],
                "num_classes": values["num_classes"],
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


def load(folder: Path, *, made_by: str, change: Callable[[ViT, dict[str, Any]], None] | None = None) -> ViT:
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
    model = _build(config["architecture"], config["model_args"], num_classes=config["num_classes"])
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
