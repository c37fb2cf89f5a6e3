"""How claims are told to readers, where the words that were written down with their rules need more.

Those words stay as they were, since git tells by them when a rule was fixed; none of these changes what is claimed.
"""

from __future__ import annotations

from collections.abc import Mapping

from attention_transfer.reporting.contrasts import Contrast
from attention_transfer.reporting.experiment_claims import DEPTH

WORDS = {"copy": "copied", "distill": "distilled"}
"""What is done with the maps, by method."""
_COMPONENTS = {
    "layer_scale": ("LayerScale", "does", "it"),
    "registers": ("register tokens", "do", "them"),
    "rotary": ("a rotary embedding", "does", "it"),
    "relative_bias": ("a relative position bias", "does", "it"),
    "swiglu": ("SwiGLU", "does", "it"),
    "pre_norm": ("a norm in front of the blocks", "does", "it"),
    "qk_norm": ("a norm of queries and keys", "does", "it"),
}
"""By component: its name, and the words that go with it."""
_WAYS = {"moco_v3": "by MoCo v3", "dino": "by DINO", "supervised": "with merged classes as labels"}
_SETTINGS = {
    "teachers": ("With two other teachers of the same recipe", "the two"),
    "draw_1": ("With another draw of the labels", "three teachers"),
    "draw_2": ("With a third draw of the labels", "three teachers"),
}

CLAIMS: Mapping[str, str] = {
    **{
        f"families/{component}_plain_{method}": (
            f"Maps of a teacher with {name}, {word} by a plain student, fall below scratch."
        )
        for component, (name, _, _) in _COMPONENTS.items()
        for method, word in WORDS.items()
    },
    **{
        f"families/{component}_matched_{method}": (
            f"Maps of a teacher with {name}, {word}: a student that has {it} too does better than a plain one."
        )
        for component, (name, _, it) in _COMPONENTS.items()
        for method, word in WORDS.items()
    },
    **{
        f"families/{component}_alone": f"Without transfer, {name} {does} not help training from scratch."
        for component, (name, does, _) in _COMPONENTS.items()
    },
    **{
        f"pretraining/{way}_{method}": f"The maps of a teacher pre-trained {how}, {word}, beat scratch."
        for way, how in _WAYS.items()
        for method, word in WORDS.items()
    },
    **{
        f"{name}/copy": f"{setting}, Attention Copy recovers more than half of the gap, as a mean over {teachers}."
        for name, (setting, teachers) in _SETTINGS.items()
    },
    **{
        f"{name}/distill": f"{setting}, Attention Distill equals fine-tuning, as a mean over {teachers}."
        for name, (setting, teachers) in _SETTINGS.items()
    },
}
"""By claim; the others are told as they were written down."""

EFFECTS: Mapping[str, str] = {
    "main/copy": "what copy gains over scratch",
    "main/pretraining_helps": "finetune minus scratch",
    "main/distill": "distill minus finetune",
    "ensemble/beats_members": "the gain over the better member",
    "ensemble/beats_finetune_pair": "finetune + distill minus finetune + finetune",
    "ensemble/beats_distill_pair": "finetune + distill minus distill + distill",
    "shift/distill_falls_below": "the change of accuracy under shift of distill, minus that of finetune,",
    "shift/below_at_matched_accuracy": "accuracy under shift beyond the line of all models, distill minus finetune,",
    **{f"layers/more_{method}": "the gain with each further layer" for method in WORDS},
    "layers_rate/more": "the gain with each further layer",
    **{f"heads/more_{method}": "the gain with each further head" for method in WORDS},
    **dict.fromkeys(
        (*(f"layers/near_output_{method}" for method in WORDS), "layers_rate/near_output"),
        f"the last n layers minus the first n, mean over n up to {DEPTH - 1},",
    ),
    "layers_rate/few": "distilling one or two layers minus scratch, mean of both ends,",
    **{
        f"averaging/{over}_{method}": f"{method}_mean_{over} minus the midpoint of scratch and {method}"
        for over in ("examples", "queries")
        for method in WORDS
    },
    **{f"{name}/copy": "copy minus the midpoint of scratch and finetune" for name in _SETTINGS},
    **{f"{name}/distill": "distill minus finetune" for name in _SETTINGS},
    "similarity/features_differ": "the CKA of distill with finetune, minus that of two finetune students,",
    "similarity/query_maps": "the divergence of copy_query’s maps from the teacher’s, minus half of that of scratch,",
    "maps/objects": "the attention that copy, whose maps are the teacher’s, gives the object, minus that of scratch,",
    "cost/finetune_cheapest": "the time that a step of distill takes beyond one of finetune",
    "cost/like_distillation": "the time that a step of distill saves against one of distill_logits",
    "labels/copy": "copy_labels minus the midpoint of scratch_labels and finetune_labels",
}
"""By claim, what its effect is."""


def claim(name: str, written: str) -> str:
    """A claim as readers read it; `written` is how it was written down with its rule."""
    return CLAIMS.get(name, written)


def effect(contrast: Contrast) -> str:
    """Such as `copy_query minus copy`."""
    return EFFECTS.get(contrast.id, contrast.formula.replace("−", "minus"))
