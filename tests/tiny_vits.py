"""One small model of every timm family whose attention is served, and what tests of attention share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from timm.layers import SwiGLUPacked
from timm.models import VisionTransformer
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from attention_transfer.models.attention import Attention, read
from attention_transfer.models.interception import Intercepted

WIDTH, DEPTH, HEADS, TOKENS = 16, 3, 2, 5
TINY: dict[str, Any] = {
    "img_size": 8,
    "patch_size": 4,
    "in_chans": 1,
    "embed_dim": WIDTH,
    "depth": DEPTH,
    "num_heads": HEADS,
    "num_classes": 3,
}
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "MAE": lambda: VisionTransformer(**TINY, global_pool="avg", fc_norm=True),
    "DINO, DeiT, AugReg": lambda: VisionTransformer(**TINY),
    "DeiT distilled": lambda: VisionTransformerDistilled(**TINY),
    "DeiT-III": lambda: VisionTransformer(**TINY, init_values=0.1, no_embed_class=True),
    "CLIP": lambda: VisionTransformer(**TINY, pre_norm=True, act_layer="quick_gelu"),
    # SigLIP's pool calls the same function as the blocks.
    "SigLIP": lambda: VisionTransformer(**TINY, class_token=False, global_pool="map"),
    "DINOv2": lambda: VisionTransformer(**TINY, init_values=0.1),
    "DINOv2 giant": lambda: VisionTransformer(**TINY, init_values=0.1, mlp_layer=SwiGLUPacked),
    "DINOv2 with registers": lambda: VisionTransformer(
        **TINY, init_values=0.1, reg_tokens=2, no_embed_class=True
    ),
    "ViT with q/k norm": lambda: VisionTransformer(**TINY, qk_norm=True),
    "ViT with attention norm": lambda: VisionTransformer(**TINY, scale_attn_norm=True),
    "EVA": lambda: Eva(**TINY, init_values=0.1),
    "EVA02": lambda: Eva(
        **TINY, use_rot_pos_emb=True, qkv_fused=False, swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True
    ),
    "DINOv3": lambda: Eva(
        **TINY, use_rot_pos_emb=True, use_abs_pos_emb=False, rope_type="dinov3", rope_rotate_half=True,
        num_reg_tokens=2, init_values=0.1, qkv_bias=False, use_fc_norm=False,
    ),
    "RoPE-ViT axial": lambda: Eva(**TINY, use_rot_pos_emb=True, attn_type="rope"),
    "RoPE-ViT mixed": lambda: Eva(**TINY, use_rot_pos_emb=True, rope_type="mixed", attn_type="rope"),
    "BEiT, BEiTv2": lambda: Beit(**TINY, use_rel_pos_bias=True, init_values=0.1),
    "BEiT with a shared bias": lambda: Beit(**TINY, use_shared_rel_pos_bias=True),
    "ViT with relative positions": lambda: VisionTransformerRelPos(**TINY, rel_pos_type="bias"),
    "ViT with relative positions by MLP": lambda: VisionTransformerRelPos(**TINY, rel_pos_type="mlp"),
}  # fmt: skip


def make(family: str = "MAE", seed: int = 0) -> Any:
    """A tiny model, in eval mode, whose maps are far from uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = FAMILIES[family]()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "attn." in name and "norm" not in name and "attn.proj." not in name:
                    parameter.normal_(std=0.7)  # queries, keys, values, their biases, relative positions
                if "rel_pos_bias" in name or name.startswith("head"):
                    parameter.normal_(std=0.5)
    return model.eval()


def make_images(count: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def capture(model: nn.Module, images: Tensor, layers: Iterable[int] = range(DEPTH)) -> dict[int, Attention]:
    with torch.no_grad(), read(model, layers) as found:
        model(images)
    return found


def untouched(model: Any) -> bool:
    """Whether nothing of reading and handing over is left in the model."""
    return not any(
        isinstance(module, Intercepted) or getattr(module, "handed_over", None) is not None
        for module in model.modules()
    )
