"""Time of a forward pass whose attention is read, against the same pass without.

    python benchmarks/attention_reading.py [--quick]

ViT-S/16 at 224 pixels, all layers, batch 8 (128 on a GPU, in bfloat16), without gradients, as a teacher runs.
Plain and read passes take turns.
"""

from __future__ import annotations

import measure
import timm
import torch

from attention_transfer.models.attention import read
from attention_transfer.training.machine import prepare

MODEL = "vit_small_patch16_224"


def main() -> None:
    options = measure.arguments(__doc__)
    device = prepare()
    gpu = device.type == "cuda"
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=0).to(device).eval()
    images = torch.randn(128 if gpu else 8, 3, 224, 224, device=device)

    def plain() -> None:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=gpu):
            model(images)

    def reading() -> None:
        with read(model, range(len(model.blocks))) as found:
            plain()
        assert len(found) == len(model.blocks)

    taken = measure.medians(
        {"plain": plain, "read": reading}, repeats=1 if options.quick else 30, warm_up=3, device=device
    )
    print("  ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in taken.items()))
    measure.write(
        [
            measure.Result(
                name=f"attention reading: forward pass read against plain ({device.type})",
                value=taken["read"] / taken["plain"],
                target=1.1,
                better="lower",
                unit="x",
            )
        ],
        options,
    )


if __name__ == "__main__":
    main()
