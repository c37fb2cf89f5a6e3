"""The manifest of the attention cache: what the shards hold, and for which recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from xxhash import xxh3_64_hexdigest

from attention_transfer import files
from attention_transfer.errors import StudyError, repro
from attention_transfer.transfer.cache_layout import Layout
from attention_transfer.transfer.shards import (
    BIAS,
    KEYS,
    MANIFEST,
    REMEDY,
    STAGE,
    cache_fingerprint,
    digest,
    json_like,
)

Integers = np.ndarray[Any, np.dtype[np.int64]]
Bias = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Entry:
    """A shard in the manifest; `xxh3` is the digest of its rows' checksums."""

    file: str
    rows: int
    xxh3: str


@dataclass(frozen=True)
class Manifest:
    """What a finished cache holds.

    Attributes:
        keys: (rows, 2).
        shards: in the order of their rows.
        bias: what the teacher adds to its logits, the same for every image; None where it adds nothing.
    """

    fingerprint: str
    recipe: dict[str, Any]
    layout: Layout
    keys: Integers
    shards: tuple[Entry, ...]
    bias: Bias | None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes keys, bias and then the manifest, which makes the folder a cache; equal caches, equal bytes."""
    keys = np.ascontiguousarray(manifest.keys)
    with files.atomic(folder / KEYS) as temporary:
        temporary.write_bytes(safetensors.numpy.save({"keys": keys}))
    values: dict[str, Any] = {
        "fingerprint": manifest.fingerprint,
        "recipe": manifest.recipe,
        "layout": manifest.layout.entries(),
        "rows": len(keys),
        "keys": {"file": KEYS, "xxh3": digest(keys)},
        "shards": [asdict(entry) for entry in manifest.shards],
    }
    if manifest.bias is not None:
        with files.atomic(folder / BIAS) as temporary:
            temporary.write_bytes(_bias_file(manifest.bias))
        values["bias"] = {"file": BIAS, "xxh3": bias_digest(manifest.bias)}
    files.write_json(folder / MANIFEST, values)


def bias_digest(bias: Bias) -> str:
    """Digest of the bias's whole file: no flipped bit of it, nor of its header, goes unnoticed."""
    return xxh3_64_hexdigest(_bias_file(bias))


def _bias_file(bias: Bias) -> bytes:
    content: bytes = safetensors.numpy.save({"bias": bias})
    return content


def read_manifest(folder: Path) -> Manifest:
    """Reads manifest and keys; StudyError when the cache is unfinished or either is damaged."""
    path = folder / MANIFEST
    if not path.is_file():
        raise StudyError(
            "holds no finished attention cache: the manifest, written last, is missing",
            where=str(folder),
            remedy=f"run the stage that writes it, which keeps finished shards: {repro(STAGE)}",
        )
    values = files.read_json(path, made_by=STAGE)
    try:
        layout = Layout(**values["layout"])
        keys_path = folder / values["keys"]["file"]
        shards = tuple(Entry(**entry) for entry in values["shards"])
        bias = values.get("bias")
        manifest = Manifest(
            fingerprint=values["fingerprint"],
            recipe=values["recipe"],
            layout=layout,
            keys=_read_keys(keys_path, xxh3=values["keys"]["xxh3"]),
            shards=shards,
            bias=None if bias is None else _read_bias(folder / bias["file"], xxh3=bias["xxh3"]),
        )
        rows = sum(entry.rows for entry in shards)
        consistent = rows == values["rows"] == len(manifest.keys)
        expected = cache_fingerprint(manifest.recipe, layout, None if bias is None else bias["xxh3"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StudyError(f"is damaged: {error!r}", where=str(path), remedy=REMEDY) from error
    if not consistent or manifest.fingerprint != expected:
        raise StudyError("is damaged: its entries contradict each other", where=str(path), remedy=REMEDY)
    return manifest


def _read_keys(path: Path, *, xxh3: str) -> Integers:
    try:
        keys: Integers = safetensors.numpy.load(path.read_bytes())["keys"]
    except FileNotFoundError as error:
        raise StudyError("is missing", where=str(path), remedy=REMEDY) from error
    except (KeyError, safetensors.SafetensorError) as error:
        raise StudyError(f"is damaged: {error}", where=str(path), remedy=REMEDY) from error
    if keys.ndim != 2 or keys.shape[1] != 2 or keys.dtype != np.int64 or digest(keys) != xxh3:
        raise _differs(path)
    return keys


def _read_bias(path: Path, *, xxh3: str) -> Bias:
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise StudyError("is missing", where=str(path), remedy=REMEDY) from error
    if xxh3_64_hexdigest(content) != xxh3:
        raise _differs(path)
    bias: Bias = safetensors.numpy.load(content)["bias"]
    return bias


def _differs(path: Path) -> StudyError:
    return StudyError("is damaged: its checksum is not the manifest's", where=str(path), remedy=REMEDY)


def require_recipe(folder: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """StudyError naming the entries in which the recipe of the cache, `found`, is not the expected one."""
    differences = _differences("", found, json_like(expected))
    if differences:
        raise StudyError(
            "was made from another recipe: " + "; ".join(differences[:5]),
            where=str(folder / MANIFEST),
            remedy=f"make the cache for the present teacher and params.yaml: {repro(STAGE)}",
        )


def _differences(name: str, found: Any, expected: Any) -> list[str]:
    """Every entry that differs, with its dotted name and both values."""
    if isinstance(found, dict) and isinstance(expected, dict):
        lines = []
        for key in sorted(found.keys() | expected.keys()):
            inner = f"{name}.{key}" if name else key
            if key not in found:
                lines.append(f"{inner} is absent, and {expected[key]!r} is expected")
            elif key not in expected:
                lines.append(f"{inner} is {found[key]!r}, and none is expected")
            else:
                lines += _differences(inner, found[key], expected[key])
        return lines
    if files.fingerprint(found) == files.fingerprint(expected):
        return []
    return [f"{name} is {found!r}, and {expected!r} is expected"]
