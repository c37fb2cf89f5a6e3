"""Writes one teacher's attention for the students' training views and the clean evaluation images."""

from attention_transfer.stage import Stage, run_script, shared_out

from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from tqdm import tqdm

from attention_transfer import plan, processes
from attention_transfer.ahead import announced
from attention_transfer.assembly import CachedSet, Parts
from attention_transfer.evaluation.predictions import BATCH
from attention_transfer.files import sha256, write_sealed
from attention_transfer.training import machine
from attention_transfer.transfer.cache import CacheWriter
from attention_transfer.transfer.teacher_source import teacher_attention, teacher_bias, teacher_maps


def main(this: Stage) -> None:
    name, study = this.instance["teacher"], this.study
    parts = Parts(study, this.layout, machine.prepare())
    choice = plan.attention_source(study, name)
    sets: list[CachedSet] = []
    if choice.source == "cache":
        plan.check_room(study, this.layout, this.params_file)
        sets = [which for which in get_args(CachedSet) if which in plan.cached_sets(study, name)]
    if this.writes:
        print(f"{this.label}: attention.source is {choice}")

    def work() -> dict[str, Any]:
        caches = {which: write(parts, name, which) for which in sets}
        manifest: dict[str, Any] = {which: cache["fingerprint"] for which, cache in caches.items()}
        if this.writes:
            write_sealed(this.layout.cache_manifest(name), manifest)
        return {f"{which}_megabytes": cache["megabytes"] for which, cache in caches.items()}

    this.run(
        params={
            "attention": {
                **study.attention.model_dump(mode="json"),
                "source": choice.source,
                "because": choice.reason,
            },
            "views": study.views.model_dump(mode="json"),
            "training.precision": study.training.precision,
            "evaluation.sets": list(study.evaluation.sets),
            "data.seed": study.data.seed,
        },
        inputs={
            "teacher": sha256(this.layout.teacher_weights(name)),
            "images": parts.description.fingerprint,
            "labelled": sha256(this.layout.splits / "labelled.txt"),
            "validation": sha256(this.layout.splits / "validation.txt"),
        },
        work=work,
        live=True,
    )


def write(parts: Parts, name: str, which: CachedSet) -> dict[str, Any]:
    """Writes one set, from the shards that are there and verify; processes share out the others."""
    study = parts.study
    architecture = study.teachers[name].architecture
    layout = plan.cache_layout(architecture, study.data, study.attention)
    keys, teacher = parts.cache_keys(which), parts.teacher(name)
    images = Views(parts, keys) if which == "views" else parts.clean(parts.evaluated(which)[0].images)
    folder = parts.layout.cache(name) / which
    layers = tuple(range(architecture.depth))
    take = teacher_maps if study.attention.content == "maps" else teacher_attention
    recipe, bias = parts.cache_recipe(name, which), None
    if study.attention.content == "queries_and_keys":
        bias = teacher_bias(teacher, blank(parts), layers)
    helps = processes.number() > 0
    with CacheWriter(folder, layout=layout, recipe=recipe, keys=keys, bias=bias, helps=helps) as writer:
        missing = processes.told(writer.missing)
        writer.take(missing[processes.share(len(missing))])
        batches = [
            np.arange(start, min(start + BATCH, shard.stop))
            for shard in writer.pending()
            for start in range(shard.start, shard.stop, BATCH)
        ]
        bar = {"desc": f"cache {name} {which}", "unit": "batch", "mininterval": 5, "disable": helps}
        for rows in tqdm(announced(batches, images.begin), total=len(batches), **bar):
            with torch.autocast(
                parts.device.type, torch.bfloat16, enabled=study.training.precision == "bfloat16"
            ):
                attention = take(teacher, images(rows), layers)
            writer.write(attention.cpu())
        for written in processes.collected(writer.written):
            writer.accept(written)
    if helps:
        return {"fingerprint": "", "megabytes": 0.0}  # which the first process tells
    stored = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    return {"fingerprint": sha256(folder / "manifest.json"), "megabytes": round(stored / 1e6, 3)}


def blank(parts: Parts) -> torch.Tensor:
    """An image, for what does not depend on it: (1, channels, size, size)."""
    data = parts.study.data
    return torch.zeros(1, data.channels, data.image_size, data.image_size, device=parts.device)


@dataclass(frozen=True)
class Views:
    """Views of the labelled images for rows of the cache, which run view by view: a batch may touch several."""

    parts: Parts
    keys: np.ndarray

    def __call__(self, rows: np.ndarray) -> torch.Tensor:
        return torch.cat([self.parts.labelled.render(*one) for one in self._by_view(rows)])

    def begin(self, rows: np.ndarray) -> None:
        """Says that these will be asked for soon; of several views only the last, for more are not kept."""
        self.parts.labelled.begin(*self._by_view(rows)[-1])

    def _by_view(self, rows: np.ndarray) -> list[tuple[np.ndarray, int]]:
        """Rows among the labelled images, and their view."""
        numbers, count = self.keys[rows, 1], len(self.parts.labelled)
        return [(rows[numbers == view] % count, int(view)) for view in np.unique(numbers)]


if __name__ == "__main__":
    run_script("cache", main, __file__, shared_out, teacher=str)
