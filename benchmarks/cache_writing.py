"""Writing the attention cache, against the teacher's bare forward passes over the same images.

    python benchmarks/cache_writing.py [--quick]

ViT-S/16 at 224 pixels. Writing is everything from the images to a finished cache: the passes, whose queries
and keys are read, rounding, checksums, fsync and manifest. Each turn writes a new cache, of several shards,
where the environment variable TMPDIR says. Value: seconds of writing / seconds of the passes.

The floor: the same bytes written to one plain file and fsynced, beside the passes: no slower than the passes
if they overlap, as slow as the slower of the two if the disk is slower than the teacher.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from pathlib import Path

import measure
import numpy as np
import torch
from steps import Steps, default_setting

from attention_transfer.training.machine import prepare
from attention_transfer.transfer.cache import CacheWriter, Layout
from attention_transfer.transfer.teacher_source import teacher_attention


def main() -> None:
    options = measure.arguments(__doc__)
    device = prepare()
    setting = default_setting(device, quick=options.quick)
    batches = 2 if options.quick else 6
    views = batches * setting.batch
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        steps = Steps(setting, folder / "first")
        autocast = torch.autocast(device.type, setting.precision, enabled=setting.precision != torch.float32)
        with autocast:
            _, _, depth, heads, tokens, width = teacher_attention(
                steps.teacher, steps.images, steps.layers
            ).shape
        layout = Layout(layers=depth, heads=heads, tokens=tokens, head_dim=width, dtype="float16")
        keys = np.stack([np.arange(views), np.zeros(views, np.int64)], axis=1)
        block = np.random.default_rng(0).bytes(setting.batch * layout.row_bytes)
        numbers = itertools.count()

        def bare() -> None:
            with torch.no_grad(), autocast:
                for _ in range(batches):
                    steps.teacher.forward_features(steps.images)

        def written() -> None:
            cache = folder / str(next(numbers))
            with CacheWriter(cache, layout=layout, recipe={}, keys=keys) as writer:
                for _ in range(batches):
                    with autocast:
                        attention = teacher_attention(steps.teacher, steps.images, steps.layers)
                    writer.write(attention.cpu())

        def plain_file() -> None:
            with (folder / "plain").open("wb") as file:
                for _ in range(batches):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())

        actions = {"bare": bare, "written": written, "plain file": plain_file}
        taken = measure.medians(
            actions, repeats=1 if options.quick else 5, warm_up=0 if options.quick else 1, device=device
        )
    size = views * layout.row_bytes
    for action, seconds in taken.items():
        print(f"{action:12} {1e3 * seconds / views:8.1f} ms an image ({size / seconds / 1e9:.2f} GB/s)")
    results = [
        measure.Result(
            f"cache writing: time against the bare forward pass ({device.type})",
            taken["written"] / taken["bare"],
            1.15,
            "lower",
            "x",
        ),
        measure.Result(
            f"cache writing: time against the bare forward pass, floor ({device.type})",
            max(taken["bare"], taken["plain file"]) / taken["bare"],
            None,
            "lower",
            "x",
        ),
    ]
    measure.write(results, options)


if __name__ == "__main__":
    main()
