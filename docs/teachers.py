"""Writes docs/teachers.md: published teachers that have been tried, from what timm says of them.

python docs/teachers.py

A test tells when the page is not what the code says.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from attention_transfer.files import write_text  # noqa: E402
from attention_transfer.models import releases, timm_entries, weights_of_timm  # noqa: E402

PAGE = Path(__file__).with_suffix(".md")
BELOW = "below scratch"
FAMILIES = {
    "MAE": "vit_base_patch16_224.mae",
    "DINO": "vit_small_patch16_224.dino",
    "DINOv2": "vit_small_patch14_dinov2.lvd142m",
    "DINOv2 with registers": "vit_small_patch14_reg4_dinov2.lvd142m",
    "DINOv3": "vit_small_patch16_dinov3.lvd1689m",
    "CLIP": "vit_base_patch16_clip_quickgelu_224.openai",
    "OpenCLIP": "vit_base_patch16_clip_224.laion2b",
    "SigLIP": "vit_base_patch16_siglip_224.webli",
    "SigLIP 2": "vit_base_patch16_siglip_224.v2_webli",
    "BEiT": "beit_base_patch16_224.in22k_ft_in22k",
    "BEiTv2": "beitv2_base_patch16_224.in1k_ft_in22k",
    "EVA": "eva_large_patch14_196.in22k_ft_in22k_in1k",
    "EVA-02": "eva02_tiny_patch14_224.mim_in22k",
    "I-JEPA": "vit_huge_patch14_gap_224.in1k_ijepa",
    "AIMv2": "aimv2_large_patch14_224.apple_pt",
    "Perception Encoder": "vit_pe_core_tiny_patch16_384.fb",
    "AugReg": "vit_tiny_patch16_224.augreg_in21k",
    "DeiT": "deit_tiny_patch16_224.fb_in1k",
    "DeiT-III": "deit3_small_patch16_224.fb_in1k",
    "RoPE-ViT": "vit_small_patch16_rope_mixed_224.naver_in1k",
    "ViT with relative positions": "vit_relpos_small_patch16_224.sw_in1k",
}
"""One published model of each family, by its name in timm."""
PUBLISHED = {
    "DINOv2": BELOW,
    "CLIP": BELOW,
    "BEiTv2": BELOW,
    "MAE": "as good as fine-tuning (ViT-L)",
    "DINO": "works",
    "MoCo v3": "works",
}
"""What has been published of the transfer to a plain student, of those families that are named there."""

HEAD = """# Published teachers

Written by `python docs/teachers.py` from the configurations of timm {version}. Each family is tried in
tests/test_published_families.py, small and with random weights: attention is read and handed back, a matched and a
plain student take steps of Attention Copy and of Attention Distill. The published weights are not part of the tests.

```yaml
teachers:
  dinov2:
    kind: timm
    name: vit_small_patch14_dinov2.lvd142m # or hf-hub:<owner>/<model>, in timm's format
    architecture: {example}
```

`python -m attention_transfer new NAME --images FOLDER --teacher timm:vit_small_patch14_dinov2.lvd142m` writes such a
study. `architecture.timm` names the entry of timm that builds the model, with what stands in the columns components and
details and all else that no other key says. A student of the same architecture, the default, is *matched*: randomly
initialised, with all of the family's components. A *plain* student has, in its run, an `architecture` without `timm`
and components; where the teacher has no class token, with `class_token: false`. All students have mean pool of patch
tokens, LayerNorm and linear head. A student that copies maps has neither queries nor keys of its own: a norm of
them (`qk_norm`) is nothing to it, and the plain and the matched one are the same to the bit.

The weights are fitted when the stage `pretrain` obtains the teacher, and its record says how: positions are resampled
by timm to the study's patches; the mean and deviation that the teacher's images had are folded, against the study's,
into its patch projection, exactly. run.json names the SHA-256 of the file, the key `sha256` makes another one an error.

## Families

Licence: as timm states it, which has one default for each of its files; the model card counts. Transfer: Qin et al.
(2026) report of 11 families that 7 transfer to a plain student, and that 4 fall up to 5.1 points below scratch, DINOv2,
CLIP and BEiTv2 among them; of MAE, DINO and MoCo v3, Li et al. (2024) report that it works.

"""
TAIL = """
## Not served

Attention that is not one map over all tokens a head ([attention-access.md](attention-access.md)); distilled DeiT, whose
head timm ties to two tokens; the larger Sapiens2, whose heads share keys; FlexiViT and RADIO, whose positions timm
resamples by rules of their own.

## Files

`kind: file` takes safetensors, or a file of PyTorch's that loads without running code that is in it. Its key `format`
says whose layout it has; where it is left out, the content has to tell.

| format | where the encoder lies | image normalisation | told by the content |
|:--|:--|:--|:--|
"""
TOLD = {
    "timm": "safetensors without a wrapper",
    "mae": "the release with decoder",
    "moco_v3": "yes",
    "dino": "checkpoints of student and teacher",
    "dinov2": "yes",
    "beit_v2": "the pre-trained release",
}


def page() -> str:
    example = timm_entries.described("vit_small_patch14_dinov2").architecture.flow()
    lines = [
        "| family | in timm | licence | image, patch | components | details | transfer to a plain student |",
        "|:--|:--|:--|:--|:--|:--|:--|",
        *(row(family, name) for family, name in FAMILIES.items()),
        "| MoCo v3 | not there: `kind: file`, `format: moco_v3` | see model card | 224, 16 | none | | "
        f"{PUBLISHED['MoCo v3']} |",
    ]
    return (
        HEAD.format(version=timm_entries.timm.__version__, example=example)
        + "\n".join(lines)
        + "\n"
        + TAIL
        + "\n".join(map(layout, releases.FORMATS))
        + "\n"
    )


def row(family: str, name: str) -> str:
    """A family as timm has it."""
    found = weights_of_timm.tagged(name, where=family)
    entry = timm_entries.described(found.entry)
    cells = (
        family,
        f"`{name}`",
        found.license or "see model card",
        f"{found.image_size}, {entry.architecture.patch_size}",
        ", ".join(entry.architecture.components) or "none",
        ", ".join(entry.details),
        PUBLISHED.get(family, "not measured"),
    )
    return f"| {' | '.join(cells)} |"


def layout(name: releases.Release) -> str:
    """Where a format keeps what is wanted."""
    form = releases.FORMATS[name]
    under = " or ".join(f"`{key}`" for key in form.wrappers)
    prefix = " or ".join(f"`{each}`" for each in form.prefixes if each)
    images = {
        None: "the study's, or `mean` and `std`",
        releases.IMAGENET: "ImageNet's",
        releases.INCEPTION: "0.5, 0.5",
    }
    place = f"under {under}, or without" + (f"; names begin with {prefix}" if prefix else "")
    return f"| `{name}` | {place} | {images[form.images]} | {TOLD.get(name, 'no')} |"


if __name__ == "__main__":
    write_text(PAGE, page())
