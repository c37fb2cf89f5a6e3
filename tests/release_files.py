"""Small models of families that are published, and files as their projects write them, from random weights."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]
SMALL = {"embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 4.0}
SIZE = 32  # pixels of the images that the small models were trained on


def native(entry: str, **changes: Any) -> Any:
    """A small model of timm's, as the family has it, with weights all of which matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = timm.create_model(entry, **{**SMALL, "img_size": SIZE, **changes})
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "norm" not in name and not name.startswith(("head.", "norm.")):
                    weight.normal_(std=0.3)
                else:
                    weight.add_(0.1 * torch.randn_like(weight))
    return model.eval()


def images(count: int = 2, size: int = SIZE, channels: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    """Pixels from 0 to 1."""
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def _options() -> argparse.Namespace:
    """What the projects' training scripts save beside the weights."""
    return argparse.Namespace(arch="vit", lr=1e-4, local_crops_scale=(0.05, 0.4))


def _under(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: value for name, value in weights.items()}


def _without(weights: Weights, *beginnings: str) -> Weights:
    return {name: value for name, value in weights.items() if not name.startswith(beginnings)}


def _mae(weights: Weights) -> dict[str, Any]:
    return {"model": _without(weights, "head.")}


def _mae_whole(weights: Weights) -> dict[str, Any]:
    decoder = {
        "mask_token": torch.randn(1, 1, 8), "decoder_pos_embed": torch.randn(1, 5, 8),
        "decoder_embed.weight": torch.randn(8, 16), "decoder_blocks.0.norm1.weight": torch.randn(8),
        "decoder_norm.weight": torch.randn(8), "decoder_pred.weight": torch.randn(768, 8),
    }  # fmt: skip
    return {"model": _without(weights, "head.") | decoder, "args": _options(), "epoch": 800}


def _moco_v3(weights: Weights) -> dict[str, Any]:
    encoder = _without(weights, "head.") | {
        "head.0.weight": torch.randn(8, 16), "head.1.running_mean": torch.randn(8),
        "head.1.num_batches_tracked": torch.tensor(3),
    }  # fmt: skip
    momentum = {name: value + 1 for name, value in encoder.items()}
    state = {
        **_under("module.base_encoder.", encoder), **_under("module.momentum_encoder.", momentum),
        "module.predictor.0.weight": torch.randn(8, 8),
    }  # fmt: skip
    return {
        "epoch": 300,
        "arch": "vit_small",
        "state_dict": state,
        "optimizer": {"state": {}, "param_groups": []},
    }


def _dino_backbone(weights: Weights) -> dict[str, Any]:
    return dict(_without(weights, "head."))


def _dino(weights: Weights) -> dict[str, Any]:
    backbone = _without(weights, "head.")
    student = {name: value - 1 for name, value in backbone.items()}
    head = {"head.mlp.0.weight": torch.randn(8, 16), "head.last_layer.weight_g": torch.randn(4, 1)}
    return {
        "student": _under("module.backbone.", student) | _under("module.", head),
        "teacher": _under("backbone.", backbone) | head,
        "epoch": 800, "args": _options(), "optimizer": {"state": {}}, "dino_loss": {"center": torch.zeros(1, 4)},
    }  # fmt: skip


def _dino_wrapped(weights: Weights) -> dict[str, Any]:
    whole = _dino(weights)
    return whole | {"teacher": _under("module.", whole["teacher"])}


def _dinov2(weights: Weights) -> dict[str, Any]:
    return _without(weights, "head.") | {"mask_token": torch.randn(1, 16)}


def _dinov2_registers(weights: Weights) -> dict[str, Any]:
    """Positions have a place for the class token, which timm adds to it."""
    released = _dinov2(weights)
    place = torch.randn_like(weights["cls_token"])
    released["register_tokens"] = released.pop("reg_token")
    released["cls_token"] = released["cls_token"] - place
    released["pos_embed"] = torch.cat([place, released["pos_embed"]], dim=1)
    return released


def _dinov2_swiglu(weights: Weights) -> dict[str, Any]:
    return {
        name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): value
        for name, value in _dinov2(weights).items()
    }


def _beit_finetuned(weights: Weights) -> dict[str, Any]:
    index = {"blocks.0.attn.relative_position_index": torch.zeros(5, 5, dtype=torch.int64)}
    return {"model": weights | index}


def _beit_v2(weights: Weights) -> dict[str, Any]:
    """Pre-training shares one table of relative positions among all blocks."""
    table = weights["blocks.0.attn.relative_position_bias_table"]
    kept = {name: value for name, value in weights.items() if not name.endswith("bias_table")}
    method = {
        "mask_token": torch.randn(1, 1, 16), "lm_head.weight": torch.randn(8, 16),
        "cls_pt_layers.0.norm1.weight": torch.randn(16), "norm.weight": torch.randn(16),
        "rel_pos_bias.relative_position_bias_table": table,
        "rel_pos_bias.relative_position_index": torch.zeros(5, 5, dtype=torch.int64),
    }  # fmt: skip
    return {"model": _without(kept, "head.", "fc_norm.") | method}


def _deit(weights: Weights) -> dict[str, Any]:
    return {"model": weights}


def _deit_3(weights: Weights) -> dict[str, Any]:
    return {
        "model": {
            name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): value
            for name, value in weights.items()
        }
    }


def _timm_training(weights: Weights) -> dict[str, Any]:
    return {"state_dict": _under("module.", weights), "args": _options()}


RELEASES: dict[str, tuple[str, str | None, Callable[[Weights], dict[str, Any]]]] = {
    "MAE, encoder": ("vit_base_patch16_224", "mae", _mae),
    "MAE, with decoder": ("vit_base_patch16_224", None, _mae_whole),
    "MoCo v3": ("vit_base_patch16_224", None, _moco_v3),
    "DINO, backbone": ("vit_base_patch16_224", "dino", _dino_backbone),
    "DINO, whole": ("vit_base_patch16_224", None, _dino),
    "DINO, teacher in DDP": ("vit_base_patch16_224", None, _dino_wrapped),
    "DINOv2": ("vit_base_patch14_dinov2", None, _dinov2),
    "DINOv2 with registers": ("vit_base_patch14_reg4_dinov2", None, _dinov2_registers),
    "DINOv2 giant": ("vit_giant_patch14_dinov2", None, _dinov2_swiglu),
    "BEiTv2, fine-tuned": ("beitv2_base_patch16_224", "beit_v2", _beit_finetuned),
    "BEiTv2": ("beitv2_base_patch16_224", None, _beit_v2),
    "BEiT, fine-tuned": ("beit_base_patch16_224", "beit", _beit_finetuned),
    "DeiT": ("deit_base_patch16_224", "deit", _deit),
    "DeiT-III": ("deit3_base_patch16_224", "deit", _deit_3),
    "timm": ("vit_base_patch16_224", "timm", dict),
    "timm, training checkpoint": ("vit_base_patch16_224", "timm", _timm_training),
}  # fmt: skip
"""By project: the entry of timm that builds it, the format where the file does not tell it, and what is saved."""


def share_relative_positions(model: Any) -> None:
    """As in pre-training, where all blocks have one table."""
    for block in model.blocks:
        block.attn.relative_position_bias_table.data.copy_(model.blocks[0].attn.relative_position_bias_table)


def write(path: Path, release: str, **changes: Any) -> Any:
    """Writes a release's file; gives timm's model with the same weights."""
    entry, _, layout = RELEASES[release]
    if "patch14" in entry:
        changes = {"img_size": 28, **changes}
    model = native(entry, **changes)
    if release == "BEiTv2":
        share_relative_positions(model)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        torch.save(layout({name: value.clone() for name, value in model.state_dict().items()}), path)
    return model
