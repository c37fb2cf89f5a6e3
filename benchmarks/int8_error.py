"""Divergence of the maps of 8-bit queries and keys from the exact ones, for a teacher that was trained here.

    python benchmarks/int8_error.py [--quick]

The default study's teacher on its first test images, which `dvc repro cache` makes: KL(exact || stored) of every
attention row, mean and maximum over images, layers, heads and queries; the maps' mean entropy beside it.
"""

from __future__ import annotations

from pathlib import Path

import measure
import numpy as np
import torch

from attention_transfer import config
from attention_transfer.assembly import Parts
from attention_transfer.commands.cached import divergence, maps
from attention_transfer.layout import Layout
from attention_transfer.training.machine import prepare
from attention_transfer.transfer.quantisation import rounded
from attention_transfer.transfer.teacher_source import teacher_attention

TARGET = 5e-4


def main() -> None:
    options = measure.arguments(__doc__)
    device = prepare()
    study = config.load("params.yaml")
    name = next(iter(study.teachers))
    if not Layout(study.name).teacher_weights(name).exists():
        if options.quick:
            print("no teacher is here: nothing to try")
            return
        raise SystemExit(
            f"error: the teacher of {Path('params.yaml')} is not here\n  What to do: dvc repro cache"
        )
    parts = Parts(study, Layout(study.name), device)
    images = parts.clean(parts.test.images)(np.arange(8 if options.quick else 1000))
    layers = tuple(range(study.teachers[name].architecture.depth))
    exact = teacher_attention(parts.teacher(name), images, layers).float()
    values = divergence(exact, rounded(exact, "int8"))
    entropy = torch.special.entr(maps(exact)).sum(dim=-1).mean()
    print(
        f"KL mean {values.mean():.3g}, maximum {values.max():.3g}; mean entropy of the maps {entropy:.3g} nats"
    )
    kind = device.type
    measure.write(
        [
            measure.Result(f"int8 error: mean KL ({kind})", float(values.mean()), TARGET, "lower", "nats"),
            measure.Result(f"int8 error: maximum KL ({kind})", float(values.max()), None, "lower", "nats"),
            measure.Result(
                f"int8 error: mean entropy of the maps ({kind})", float(entropy), None, "higher", "nats"
            ),
        ],
        options,
    )


if __name__ == "__main__":
    main()
