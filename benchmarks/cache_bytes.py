"""Bytes on disk of the cached queries and keys, against the maps of the same images in float16.

    python benchmarks/cache_bytes.py [--quick]

ViT-S/16 at 224 and at 384 pixels, random weights. A cache of several shards is written and its files are
measured: shards with their checksums, keys, manifest. The maps are made from the cached rows, rounded to
float16, and their bytes are counted without any file around them.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import measure
import timm
import torch
from steps import MODEL, write_cache

from attention_transfer.models.attention import Attention
from attention_transfer.transfer.cache import CacheReader

TARGETS = {224: 0.67, 384: 0.24}
BATCH = 4


def ratio(size: int, views: int, depth: int, folder: Path) -> float:
    """Bytes of a cache of so many views, against those of its maps."""
    torch.manual_seed(0)
    teacher = timm.create_model(MODEL, num_classes=0, img_size=size, depth=depth).eval()
    write_cache(folder, teacher, torch.randn(BATCH, 3, size, size), tuple(range(depth)), views)
    stored = sum(path.stat().st_size for path in folder.iterdir())
    reader, maps = CacheReader(folder, expect=None), 0
    for example, view in reader.keys:
        queries, keys = reader.read(example[None], view[None]).float().unbind(dim=1)
        maps += sum(
            Attention(queries[:, layer], keys[:, layer]).map().half().nbytes for layer in range(depth)
        )
    print(f"{size} pixels, {views} views: cache {stored / 1e6:.3f} MB, maps {maps / 1e6:.3f} MB")
    return stored / maps


def main() -> None:
    options = measure.arguments(__doc__)
    results = []
    for size, views in ((32, 4),) if options.quick else ((224, 48), (384, 16)):
        with tempfile.TemporaryDirectory() as name:
            value = ratio(size, views, 2 if options.quick else 12, Path(name) / "cache")
        results.append(
            measure.Result(
                f"cache bytes: q and k in float16 against maps in float16 at {size} pixels (cpu)",
                value,
                TARGETS.get(size),
                "lower",
                "x",
            )
        )
    measure.write(results, options)


if __name__ == "__main__":
    main()
