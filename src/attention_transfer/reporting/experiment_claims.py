"""The claims of the experiments beyond the main comparison, written before the runs that they judge."""

from __future__ import annotations

from collections.abc import Mapping

from attention_transfer.reporting.contrasts import Contrast, Rule, difference, mean_of, slope

DEPTH, HEADS = 6, 4  # of presets/full.yaml


def _both(
    name: str, claim: str, published: str, rule: Rule, weights: Mapping[str, float], *, part: str = ""
) -> list[Contrast]:
    """The same claim of copying and of distilling.

    Args:
        claim: with `{word}` for what is done with the maps.
        weights: by run, with `{method}` in its name.
    """
    return [
        Contrast(
            f"{name}_{method}",
            claim.replace("{word}", word),
            published,
            {run.replace("{method}", method): weight for run, weight in weights.items()},
            rule,
            part,
        )
        for method, word in (("copy", "copied"), ("distill", "distilled"))
    ]


TEACHERS = ("mae", "mae_1", "mae_2")  # one recipe, three seeds
DRAWS = (0, 1, 2)


def replicated(method: str, teacher: str, draw: int) -> str:
    """The run of a method with one of TEACHERS on one of DRAWS; scratch has no teacher."""
    parts = [method]
    if method != "scratch" and (teacher, draw) != ("mae", 0):
        parts.append(teacher)
    return "_".join([*parts, f"draw_{draw}"] if draw else parts)


_REPLICATIONS = {
    name: [
        tuple(replicated(method, teacher, draw) for method in ("scratch", "finetune", "copy", "distill"))
        for teacher in TEACHERS
        if (teacher, draw) != ("mae", 0)
    ]
    for name, draw in (("teachers", 0), ("draw_1", 1), ("draw_2", 2))
}
COMPONENTS = {
    "layer_scale": "families_norm",
    "registers": "families_block",
    "rotary": "families_position",
    "relative_bias": "families_position",
    "swiglu": "families_block",
    "pre_norm": "families_norm",
    "qk_norm": "families_norm",
}
"""Of teachers of other families, and the experiment that each is tried in."""

CONTRASTS: tuple[Contrast, ...] = (
    Contrast(
        "qkv/query",
        "Copying queries alone is at least as good as copying the whole map.",
        "direction only: queries alone at least as good",
        difference("copy_query", "copy"),
        "not below",
    ),
    Contrast(
        "qkv/value",
        "Copying values alone is worse than copying the map.",
        "direction only: values do not help as maps do",
        difference("copy_value", "copy"),
        "below",
    ),
    *_both(
        "layers/more",
        "The more layers are {word}, from the input on, the better.",
        "direction only: more is better",
        "above",
        slope([*(f"{{method}}_first_{n}" for n in range(1, DEPTH)), "{method}"]),
    ),
    *_both(
        "layers/near_output",
        "The last n layers, {word}, help more than the first n.",
        "direction only: layers near the output matter more",
        "above",
        mean_of([difference(f"{{method}}_last_{n}", f"{{method}}_first_{n}") for n in range(1, DEPTH)]),
    ),
    # Written after `layers` was run: at the rate chosen for all layers, few of them ended far below scratch.
    Contrast(
        "layers_rate/few",
        "At the learning rate of scratch, distilling one or two layers is no worse than training from scratch.",
        "direction only: any layer helps",
        mean_of(
            [difference(f"distill_{end}_{n}_rate", "scratch") for end in ("first", "last") for n in (1, 2)]
        ),
        "not below",
    ),
    Contrast(
        "layers_rate/more",
        "At the learning rate of scratch, the more layers are distilled, from the input on, the better.",
        "direction only: more is better",
        slope([*(f"distill_first_{n}_rate" for n in range(1, DEPTH)), "distill_rate"]),
        "above",
    ),
    Contrast(
        "layers_rate/near_output",
        "At the learning rate of scratch, the last n layers, distilled, help more than the first n.",
        "direction only: layers near the output matter more",
        mean_of([difference(f"distill_last_{n}_rate", f"distill_first_{n}_rate") for n in range(1, DEPTH)]),
        "above",
    ),
    *_both(
        "heads/more",
        "The more heads of each layer are {word}, the better.",
        "direction only: better with more heads",
        "above",
        slope([*(f"{{method}}_heads_{n}" for n in range(1, HEADS)), "{method}"]),
    ),
    *_both(
        "heads/saturates",
        "Three quarters of the heads, {word}, are as good as all.",
        "saturates at about 3/4 of the heads",
        "equal",
        difference(f"{{method}}_heads_{3 * HEADS // 4}", "{method}"),
    ),
    *(
        contrast
        for over in ("examples", "queries")
        for contrast in _both(
            f"averaging/{over}",
            f"Maps averaged over {over}, {{word}}, keep less than half of the maps' benefit over scratch.",
            "direction only: averaging destroys most of the benefit",
            "below",
            {f"{{method}}_mean_{over}": 1.0, "{method}": -0.5, "scratch": -0.5},
        )
    ),
    Contrast(
        "feature/residual_stream",
        "Distilling the residual stream is worse than distilling attention.",
        "features 81.3 %, attention 85.7 %",
        difference("distill_features", "distill"),
        "below",
    ),
    Contrast(
        "feature/predictions",
        "Distilling a fine-tuned teacher's predictions is worse than distilling attention.",
        "direction only: much worse than distilling attention",
        difference("distill_logits", "distill"),
        "below",
    ),
    *_both(
        "teacher_init/teacher_decides",
        "Whose maps are {word} matters more than whose weights the student starts from.",
        "direction only: the teacher's maps decide",
        "above",
        # Other maps, the student fresh, against other weights, the maps untrained.
        {"{method}": 1.0, "{method}_untrained_onto_mae": -1.0},
    ),
    *_both(
        "teacher_init/untrained",
        "The maps of an untrained teacher, {word}, fall below scratch.",
        "direction only: the teacher's maps decide",
        "below",
        difference("{method}_untrained", "scratch"),
    ),
    *(
        contrast
        for way in ("moco_v3", "dino", "supervised")
        for contrast in _both(
            f"pretraining/{way}",
            f"The maps of a teacher pre-trained by {way}, {{word}}, beat scratch.",
            "direction only: transfer works across pre-training methods",
            "above",
            difference(f"{{method}}_{way}", "scratch"),
        )
    ),
    *(
        contrast
        for data in ("digits", "fractals")
        for contrast in _both(
            f"pretraining_data/{data}",
            f"With a teacher pre-trained on {data}, attention that is {{word}} falls below fine-tuning.",
            "direction only: transfer drops below fine-tuning where the data differ",
            "below",
            difference(f"{{method}}_mae_{data}", f"finetune_mae_{data}"),
        )
    ),
    Contrast(
        "size/scratch_saturates",
        "A larger model trained from scratch is no better.",
        "direction only: scratch saturates with size",
        difference("scratch", "scratch_large"),
        "not below",
    ),
    *_both(
        "size/transfer_keeps_up",
        "At the largest size, attention that is {word} keeps up with fine-tuning.",
        "direction only: transfer keeps up with fine-tuning",
        "not below",
        difference("{method}_large", "finetune_large"),
    ),
    *_both(
        "families/simmim",
        "The maps of a plain teacher pre-trained by SimMIM, {word}, beat scratch.",
        "direction only: transfer works across pre-training methods",
        "above",
        difference("{method}_plain", "scratch"),
        part="families_plain",
    ),
    *(
        contrast
        for component, part in COMPONENTS.items()
        for contrast in _both(
            f"families/{component}_plain",
            f"Maps of a teacher with {component}, {{word}} by a plain student, fall below scratch.",
            "4 of 11 families fall below scratch, 7 do not",
            "below",
            difference(f"{{method}}_{component}_plain", "scratch"),
            part=part,
        )
    ),
    *(
        contrast
        for component, part in COMPONENTS.items()
        for contrast in _both(
            f"families/{component}_matched",
            f"Maps of a teacher with {component}, {{word}}: a student that has it too does better than a plain one.",
            "direction only: matched components reverse the failure",
            "above",
            difference(f"{{method}}_{component}_matched", f"{{method}}_{component}_plain"),
            part=part,
        )
    ),
    *(
        Contrast(
            f"families/{component}_alone",
            f"Without transfer, {component} does not help training from scratch.",
            "direction only: components alone do not help",
            difference("scratch", f"scratch_{component}"),
            "not below",
            part,
        )
        for component, part in COMPONENTS.items()
    ),
    *(
        contrast
        for name, groups in _REPLICATIONS.items()
        for contrast in (
            Contrast(
                f"{name}/copy",
                "Attention Copy recovers more than half of the gap, as a mean over these teachers.",
                "copy recovers 77.8 % of the gap",
                mean_of(
                    [{copy: 1.0, scratch: -0.5, finetune: -0.5} for scratch, finetune, copy, _ in groups]
                ),
                "above",
            ),
            Contrast(
                f"{name}/distill",
                "Attention Distill equals fine-tuning, as a mean over these teachers.",
                "distill 85.7 %, fine-tune 85.7 %",
                mean_of([difference(distill, finetune) for _, finetune, _, distill in groups]),
                "equal",
            ),
        )
    ),
    *_both(
        "task_data/other",
        "On digits, attention of a teacher pre-trained on clothes, {word}, falls below fine-tuning that teacher.",
        "direction only: transfer drops below fine-tuning where the task’s data are others",
        "below",
        difference("{method}_digits", "finetune_digits"),
    ),
    *_both(
        "task_data/own",
        "On digits, attention of a teacher pre-trained on digits, {word}, keeps up with fine-tuning that teacher.",
        "direction only: transfer keeps up where the data are the task’s",
        "not below",
        difference("{method}_digits_own", "finetune_digits_own"),
    ),
    # What falls otherwise than published with few labels.
    Contrast(
        "labels/residual_stream",
        "With ten times the labels, distilling the residual stream is worse than distilling attention.",
        "features 81.3 %, attention 85.7 %, all labels of ImageNet",
        difference("distill_features_labels", "distill_labels"),
        "below",
    ),
    Contrast(
        "labels/value",
        "With ten times the labels, copying values alone is worse than copying the map.",
        "direction only: values do not help as maps do",
        difference("copy_value_labels", "copy_labels"),
        "below",
    ),
    Contrast(
        "labels/copy",
        "With ten times the labels, Attention Copy recovers more than half of the gap.",
        "copy recovers 77.8 % of the gap, all labels of ImageNet",
        {"copy_labels": 1.0, "scratch_labels": -0.5, "finetune_labels": -0.5},
        "above",
    ),
    Contrast(
        "labels/distill",
        "With ten times the labels, Attention Distill equals fine-tuning.",
        "distill 85.7 %, fine-tune 85.7 %, all labels of ImageNet",
        difference("distill_labels", "finetune_labels"),
        "equal",
    ),
)
