"""Entries of timm as architectures of teachers and students: what they build, and how they get our pool and head."""

from __future__ import annotations

import difflib
import functools
import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import timm
import torch
from timm.layers import GluMlp, PatchEmbed, SwiGLU
from timm.models import VisionTransformer
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import nn

from attention_transfer.config import Architecture
from attention_transfer.errors import StudyError
from attention_transfer.models.attention_families import attention_modules

ViT: TypeAlias = VisionTransformer | Eva | Beit | VisionTransformerRelPos

POOLED: dict[type[nn.Module], dict[str, Any]] = {
    VisionTransformer: {
        "global_pool": "avg",
        "fc_norm": True,
        "final_norm": True,
        "pool_include_prefix": False,
        "dynamic_img_size": False,
    },
    # The heads of Eva and Beit start as the plain one does: timm scales them down.
    Eva: {
        "global_pool": "avg",
        "use_fc_norm": True,
        "use_post_transformer_norm": False,
        "head_init_scale": 1.0,
        "dynamic_img_size": False,
    },
    Beit: {"global_pool": "avg", "use_fc_norm": True, "head_init_scale": 1.0},
    VisionTransformerRelPos: {"global_pool": "avg", "fc_norm": True},
}
"""Arguments for mean pool of patch tokens, LayerNorm and linear head (paper A), by timm's class, no class below it."""

RESAMPLED_OTHERWISE = ("flexivit_", "_radio_")
"""Parts of entries whose positions timm resamples by other rules than those of their class."""

GATED_SHARE = 2 / 3
"""Width of a gated MLP over that of a plain one with as many weights: what `mlp_ratio` speaks of."""


@dataclass(frozen=True)
class Entry:
    """What an entry of timm builds.

    Attributes:
        kind: timm's class.
        architecture: as params.yaml has to state it.
        details: what it has beside that, in words.
    """

    kind: type[nn.Module]
    architecture: Architecture
    details: tuple[str, ...]


def described(name: str) -> Entry:
    """What the entry builds, from a model without storage.

    Raises:
        StudyError: there is no such entry, or a student with readable attention cannot be built like it.
    """
    if not timm.is_model(name):
        close = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=3)) or "none is alike"
        raise _refused(name, f"is no entry of timm {timm.__version__}", f"choose a nearer one: {close}")
    if any(part in name for part in RESAMPLED_OTHERWISE):
        raise _refused(
            name, "has positions that timm resamples by rules of their own", "choose another teacher"
        )
    try:
        return _described(name)
    except TypeError as error:
        raise _refused(name, str(error), "choose a teacher of docs/teachers.md") from error


def arguments(architecture: Architecture) -> dict[str, Any]:
    """Arguments by which the architecture's entry gets our pool and head.

    Raises:
        StudyError: as `described`; or the entry builds other sizes than the architecture states.
    """
    assert architecture.timm is not None
    entry = described(architecture.timm)
    if different := _differences(architecture, entry.architecture):
        raise _refused(
            architecture.timm,
            f"builds {', '.join(different)}",
            f"write architecture: {entry.architecture.flow()}",
        )
    return POOLED[entry.kind]


def hidden_width(architecture: Architecture) -> float:
    """Of the MLP between its two layers, behind the gate where it has one."""
    share = GATED_SHARE if "swiglu" in architecture.components else 1.0
    return architecture.width * architecture.mlp_ratio * share


def _differences(stated: Architecture, built: Architecture) -> list[str]:
    """Where what params.yaml states is not what is built."""
    return [
        f"{key} {getattr(built, key)}, not {getattr(stated, key)}"
        for key in Architecture.model_fields
        if _comparable(stated, key) != _comparable(built, key)
    ]


def _comparable(architecture: Architecture, key: str) -> Any:
    """A value of an architecture, equal where equal models are meant."""
    match key:
        case "components":
            return set(architecture.components)
        case "register_tokens":
            return architecture.registers
        case "mlp_ratio":
            return round(hidden_width(architecture))
    return getattr(architecture, key)


def _refused(name: str, problem: str, remedy: str) -> StudyError:
    return StudyError(problem, where=f"architecture.timm: {name}", remedy=remedy)


@functools.cache
def _described(name: str) -> Entry:
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        try:
            native: Any = timm.create_model(name, depth=1)  # one block says of which class all is
        except (
            TypeError,
            AssertionError,
        ):  # it has no such argument, or lists that are as long as it is deep
            native = timm.create_model(name)
        if type(native) not in POOLED:
            raise TypeError(f"{type(native).__name__} cannot get a mean pool of patch tokens in timm")
        attention_modules(native)
        model: Any = timm.create_model(name, num_classes=0, **POOLED[type(native)])
    modules: list[Any] = attention_modules(model)
    _is_supported(model, modules)
    attention, mlp = modules[0], model.blocks[0].mlp
    gated = isinstance(mlp, GluMlp | SwiGLU)
    registers = model.num_prefix_tokens - (model.cls_token is not None)
    components = {
        "layer_scale": hasattr(getattr(model.blocks[0], "ls1", None), "gamma")
        or getattr(model.blocks[0], "gamma_1", None) is not None,
        "registers": registers > 0,
        "rotary": getattr(model, "rope", None) is not None,
        "relative_bias": _has_relative_bias(model, attention),
        "swiglu": gated,
        "pre_norm": not isinstance(getattr(model, "norm_pre", nn.Identity()), nn.Identity),
        "qk_norm": not isinstance(getattr(attention, "q_norm", nn.Identity()), nn.Identity),
    }
    architecture = Architecture(
        patch_size=model.patch_embed.patch_size[0],
        width=model.embed_dim,
        depth=len(model.blocks),
        heads=attention.num_heads,
        mlp_ratio=_ratio(mlp.fc2.in_features, model.embed_dim * (GATED_SHARE if gated else 1.0)),
        components=tuple(key for key, has in components.items() if has),  # type: ignore[misc]
        class_token=model.cls_token is not None,
        register_tokens=registers if registers not in (0, 4) else None,
        timm=name,
    )
    return Entry(type(native), architecture, _details(native, model, attention))


def _ratio(hidden: int, width: float) -> float:
    """The shortest number that makes so many hidden units."""
    return next(
        ratio
        for ratio in (round(hidden / width, n) for n in range(1, 16))
        if abs(ratio * width - hidden) < 0.5
    )


def _has_relative_bias(model: Any, attention: Any) -> bool:
    shared = any(getattr(model, name, None) is not None for name in ("rel_pos_bias", "shared_rel_pos"))
    own = any(
        getattr(attention, name, None) is not None for name in ("rel_pos", "relative_position_bias_table")
    )
    return shared or own


def _is_supported(model: Any, modules: list[Any]) -> None:
    """TypeError with the reason where the study's contracts do not hold."""
    patches = model.patch_embed
    if type(patches) is not PatchEmbed or patches.proj.kernel_size != patches.proj.stride:
        raise TypeError(
            f"its patches are made by {type(patches).__name__}, not by one convolution of a patch each"
        )
    if len(set(patches.patch_size)) != 1:
        raise TypeError(f"its patches are no squares, but {patches.patch_size}")
    heads = {module.num_heads for module in modules}
    if len(heads) != 1 or model.embed_dim % min(heads):
        raise TypeError(f"its layers have {sorted(heads)} heads for {model.embed_dim} channels")
    if any(getattr(module, "num_kv_heads", None) not in (None, module.num_heads) for module in modules):
        raise TypeError("its heads share keys and values (grouped queries), which a copy student cannot")
    if any(
        getattr(module, "head_dim", None) not in (None, model.embed_dim // min(heads)) for module in modules
    ):
        raise TypeError("its heads do not share its width between them")
    if not hasattr(getattr(model.blocks[0], "mlp", None), "fc2"):
        raise TypeError("its blocks have no MLP of two layers")


def _details(native: Any, model: Any, attention: Any) -> tuple[str, ...]:
    """What of the entry no key of `architecture` says."""
    mlp, norm = model.blocks[0].mlp, model.fc_norm
    found = {
        "no class token": model.cls_token is None,
        "no learned positions": getattr(model, "pos_embed", None) is None,
        "attention pool (not in students)": getattr(native, "attn_pool", None) is not None,
        "quick GELU": "quick" in type(getattr(mlp, "act", None)).__name__.lower(),
        "tanh GELU": "tanh" in type(getattr(mlp, "act", None)).__name__.lower(),
        "norm within attention": not isinstance(getattr(attention, "norm", nn.Identity()), nn.Identity),
        "norm within MLP": not isinstance(getattr(mlp, "norm", nn.Identity()), nn.Identity),
        "no bias of keys": getattr(attention, "q_bias", None) is not None
        or (getattr(attention, "k_proj", None) is not None and attention.k_proj.bias is None),
        "no biases of queries, keys and values": getattr(attention, "qkv", None) is not None
        and attention.qkv.bias is None
        and getattr(attention, "q_bias", None) is None,
        "no bias of patches": model.patch_embed.proj.bias is None,
        "RMSNorm": "rms" in type(norm).__name__.lower(),
        f"epsilon {getattr(norm, 'eps', 1e-6):g}": not math.isclose(getattr(norm, "eps", 1e-6), 1e-6),
    }
    return tuple(words for words, has in found.items() if has)
