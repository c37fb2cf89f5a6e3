"""Compares what students see with what their teacher and the fine-tuned student see: features and maps."""

from attention_transfer.stage import Stage, run_script

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from attention_transfer.ahead import announced
from attention_transfer.assembly import Parts
from attention_transfer.config import Study
from attention_transfer.data import views
from attention_transfer.evaluation import attention_statistics, foreground, similarity
from attention_transfer.evaluation.predictions import BATCH
from attention_transfer.files import fingerprint, sha256, write_text
from attention_transfer.models import students
from attention_transfer.models.attention import read
from attention_transfer.models.tokens import TokenLayout, token_layout
from attention_transfer.teaching import teacher_source
from attention_transfer.training import machine
from attention_transfer.transfer import methods
from attention_transfer.transfer.token_layout import align_maps

IMAGES = 500  # the first test images
LAYERS = [
    "run",
    "seed",
    "reference",
    "layer",
    "cka",
    "divergence",
    "matched_divergence",
    "distance",
    "entropy",
    "on_objects",
]
CKA = ["run", "seed", "reference", "layer", "reference_layer", "cka"]


@dataclass(frozen=True)
class Seen:
    """What one model makes of the images, layer by layer.

    Attributes:
        features: mean of the patch tokens behind each block, (images, width).
        maps: (images, heads, tokens, tokens).
    """

    features: list[Tensor]
    maps: list[Tensor]
    tokens: TokenLayout


def main(this: Stage) -> None:
    study, layout = this.study, this.layout
    parts = Parts(study, layout, machine.prepare())
    count = min(IMAGES, len(parts.test)) if "test" in study.evaluation.sets else 0

    def work() -> dict[str, Any]:
        layers: list[dict[str, Any]] = []
        pairs: list[dict[str, Any]] = []
        shares = {patch: object_shares(parts, count, patch) for patch in patch_sizes(study)} if count else {}
        names = {run.teacher for run in study.runs.values()} if count else set()
        teachers = {name: of_teacher(parts, name, count) for name in sorted(names)}
        finetune = study.report.finetune if study.report is not None else None
        for seed, other_seed in tqdm(
            pairs_of_seeds(study) if count else (), desc="similarity", unit="seed", mininterval=5, delay=2
        ):
            seen = {name: of_student(parts, name, seed, count) for name in study.runs}
            for name, run in study.runs.items():
                references = {"teacher": teachers[run.teacher]}
                if finetune is not None and name != finetune:
                    references["finetune"] = seen[finetune]
                elif finetune is not None and other_seed is not None:
                    # How unlike two fine-tuned students are by chance: the yardstick of the others.
                    references["finetune"] = of_student(parts, finetune, other_seed, count)
                for reference, other in references.items():
                    place = {"run": name, "seed": seed, "reference": reference}
                    patch = study.architecture(name).patch_size
                    compared = compare(seen[name], other, patch, shares[patch])
                    layers += [place | row for row in compared[0]]
                    pairs += [place | row for row in compared[1]]
        for file, rows, columns in (("layers", layers, LAYERS), ("cka", pairs, CKA)):
            frame = pd.DataFrame(rows, columns=columns)
            write_text(this.record / f"{file}.csv", frame.to_csv(index=False, float_format="%.6f"))
        return {"images": count, "pairs": len(pairs)}

    this.run(
        params={
            "runs": {name: run.model_dump(mode="json") for name, run in study.runs.items()},
            "seeds": list(study.seeds),
            "report": None if study.report is None else study.report.finetune,
            "evaluation.sets": list(study.evaluation.sets),
            "attention": study.attention.model_dump(mode="json"),
            "training.precision": study.training.precision,
        },
        inputs={
            "students": fingerprint(
                [sha256(layout.student(run, seed) / "model.safetensors") for run, seed in study.grid]
            ),
            "teachers": fingerprint(
                [sha256(layout.teacher_weights(run.teacher)) for run in study.runs.values()]
            ),
            "images": parts.description.fingerprint,
        },
        work=work,
        live=False,
    )


def patch_sizes(study: Study) -> set[int]:
    """Of the students."""
    return {study.architecture(name).patch_size for name in study.runs}


def object_shares(parts: Parts, count: int, patch_size: int) -> Tensor:
    """Of each patch of the first so many test images, the share that the object covers: (images, patches)."""
    return torch.from_numpy(foreground.shares(parts.test.images[:count], patch_size))


def pairs_of_seeds(study: Study) -> list[tuple[int, int | None]]:
    """Each seed and the one behind it, the first behind the last; None where there is no other."""
    seeds = study.seeds
    if len(seeds) == 1:
        return [(seeds[0], None)]
    return list(zip(seeds, (*seeds[1:], seeds[0]), strict=True))


def of_teacher(parts: Parts, name: str, count: int) -> Seen:
    """A teacher, on clean images."""
    model: Any = parts.teacher(name)

    def run(images: Tensor, rows: np.ndarray) -> dict[int, Tensor]:
        model.forward_features(images)
        return {}

    return look(parts, model, count, run)


def of_student(parts: Parts, name: str, seed: int, count: int) -> Seen:
    """A student as it predicts: with the attention of its teacher where its method hands that over."""
    study = parts.study
    model = students.load(parts.layout.student(name, seed), made_by=f"train@{name}-{seed}").to(parts.device)
    method = methods.build(study, name, model)
    source = teacher_source(parts, name, None, method.needs if method.teacher_at_inference else None)
    whole = methods.slimmed_layers(study, name)

    def run(images: Tensor, rows: np.ndarray) -> dict[int, Tensor]:
        given = source(images, rows, views.CLEAN) if source else None
        method.logits(model, images, given)
        attention = given.attention if given else ()
        handed = dict(zip(study.layers(name), attention, strict=True)) if attention else {}
        return {layer: handed[layer].map() for layer in whole}

    return look(parts, model, count, run)


@torch.no_grad()
def look(
    parts: Parts, model: Any, count: int, run: Callable[[Tensor, np.ndarray], dict[int, Tensor]]
) -> Seen:
    """Features and maps of the first so many test images.

    Args:
        run: passes a batch of images, with their numbers, through the model; gives the maps of those layers that
            have no queries and keys of their own.
    """
    depth, tokens = len(model.blocks), token_layout(model)
    features: list[list[Tensor]] = [[] for _ in range(depth)]
    maps: list[list[Tensor]] = [[] for _ in range(depth)]
    clean = parts.clean(parts.test.images)
    streams: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda *call: streams.append(call[2])) for block in model.blocks]
    for rows in announced(np.array_split(np.arange(count), -(-count // BATCH)), clean.begin):
        streams.clear()
        with (
            torch.autocast(parts.device.type, torch.bfloat16, enabled=parts.bfloat16),
            read(model, range(depth)) as found,
        ):
            handed = run(clean(rows), rows)
            for layer, stream in enumerate(streams):
                own = handed[layer] if layer in handed else found[layer].map()
                features[layer].append(stream[:, tokens.prefix :].float().mean(dim=1).cpu())
                maps[layer].append(own.float().cpu())
    for hook in hooks:
        hook.remove()
    return Seen([torch.cat(parts) for parts in features], [torch.cat(parts) for parts in maps], tokens)


def compare(
    seen: Seen, other: Seen, patch_size: int, shares: Tensor
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of layers.csv, layer against the same layer, and of cka.csv, each against each."""
    cka = similarity.cka_matrix(seen.features, other.features)
    pairs = [
        {"layer": layer, "reference_layer": second, "cka": float(value)}
        for layer, row in enumerate(cka)
        for second, value in enumerate(row)
    ]
    rows = []
    for layer, (own, theirs) in enumerate(zip(seen.maps, other.maps, strict=True)):
        divergence = similarity.head_divergence(own, align_maps(theirs, other.tokens, seen.tokens))
        distance = attention_statistics.mean_attention_distance(
            own, seen.tokens.grid, patch_size, seen.tokens.prefix
        )
        rows.append(
            {
                "layer": layer,
                "cka": float(cka[layer, layer]),
                "divergence": similarity.unmatched(divergence),
                "matched_divergence": similarity.matched(divergence)[0],
                "distance": float(distance.nanmean()),  # over the heads that look at patches
                "entropy": float(attention_statistics.mean_entropy(own).mean()),
                "on_objects": float(
                    attention_statistics.attention_on(own, shares, seen.tokens.prefix).nanmean()
                ),
            }
        )
    return rows, pairs


if __name__ == "__main__":
    run_script("similarity", main, __file__)
