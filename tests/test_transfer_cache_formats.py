"""What the cache can hold beside queries and keys as floats: 8-bit integers, maps, and a model's bias."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention_transfer.errors import StudyError
from attention_transfer.transfer.cache import CacheReader, CacheWriter, Layout, plan, verify
from attention_transfer.transfer.quantisation import rounded

RECIPE = {"teacher": "aa"}
KEYS = np.stack([np.arange(6), np.tile([-1, 2], 3)], axis=1)
LAYOUTS = {
    "int8": Layout(2, 2, 3, 5, "int8"),  # 42 bytes a unit, 168 a row
    "maps": Layout(2, 2, 3, None, "float16", "maps"),
    "float16": Layout(2, 2, 3, 5, "float16"),
}


def make_rows(layout: Layout) -> Tensor:
    values = torch.randn(len(KEYS), *layout.shape, generator=torch.Generator().manual_seed(1))
    return values.softmax(dim=-1) if layout.content == "maps" else values


def make_bias(heads: int = 2) -> Tensor:
    return torch.randn(2, heads, 3, 3, generator=torch.Generator().manual_seed(2))


def write(folder: Path, layout: Layout, *, bias: Tensor | None = None, recipe: dict = RECIPE) -> list[slice]:
    """Writes what is pending, three rows a shard, and returns it."""
    rows = make_rows(layout)
    with CacheWriter(
        folder, layout=layout, recipe=recipe, keys=KEYS, shard_bytes=3 * layout.row_bytes, bias=bias
    ) as writer:
        pending = list(writer.pending())
        for piece in pending:
            writer.write(rows[piece])
    return pending


def read_all(folder: Path) -> Tensor:
    reader = CacheReader(folder, expect=RECIPE)
    read = reader.read_maps if reader.layout.content == "maps" else reader.read
    return read(KEYS[:, 0], KEYS[:, 1])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def make_cache(folder: Path, kind: str) -> Path:
    """With a bias wherever there can be one."""
    write(folder, LAYOUTS[kind], bias=None if kind == "maps" else make_bias())
    return folder


@pytest.fixture(scope="module", params=LAYOUTS)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of each kind; tests copy it before they touch it."""
    return make_cache(tmp_path_factory.mktemp("finished") / request.param, request.param)


# --- a cache written before stays valid


GOLDEN = {
    "float16": "53edbb02a717eac39a914bc59ce6e57f4ed7ffece480d049e96561c59b6ae196",
    "float32": "8202fb48ea656409f78286777c6d847f70c989abe64615765c11ff19816a6f6f",
}


@pytest.mark.parametrize("dtype", GOLDEN)
def test_files_of_the_first_format_are_what_they_were(tmp_path: Path, dtype: str) -> None:
    """SHA-256 of all files together, as written before there were integers, maps and biases."""
    layout = Layout(layers=2, heads=3, tokens=4, head_dim=5, dtype=dtype)  # type: ignore[arg-type]
    keys = np.stack([np.arange(7), np.arange(7) % 3 - 1], axis=1)
    rows = torch.arange(7 * 240).reshape(7, *layout.shape) / 8
    with CacheWriter(
        tmp_path / "c",
        layout=layout,
        recipe={"teacher": "aa", "crop": (0.5, 1.0)},
        keys=keys,
        shard_bytes=3 * layout.row_bytes,
    ) as writer:
        writer.write(rows)
    found = contents(tmp_path / "c")
    assert len(found) == 5
    digest = hashlib.sha256(b"".join(found[name] for name in sorted(found))).hexdigest()
    assert digest == GOLDEN[dtype]


# --- every kind


def test_an_int8_shard_is_plain_safetensors_of_integers_and_scales(tmp_path: Path) -> None:
    layout = LAYOUTS["int8"]
    write(tmp_path / "c", layout)
    tensors = safetensors.numpy.load_file(tmp_path / "c" / "shard-00001.safetensors")
    assert tensors["rows"].shape == (3, 2, 2, 2 * 3 * 5 + 2 * 3 * 2)
    assert tensors["rows"].dtype == np.uint8
    assert tensors["xxh3"].tolist() == [xxhash.xxh3_64(row.tobytes()).intdigest() for row in tensors["rows"]]
    integers = tensors["rows"][..., :30].copy().view(np.int8).reshape(3, 2, 2, 2, 3, 5)
    scales = tensors["rows"][..., 30:].copy().view("<f2").reshape(3, 2, 2, 2, 3, 1)
    expected = rounded(make_rows(layout)[3:], "int8").numpy()
    np.testing.assert_array_equal(integers.astype(np.float32) * scales.astype(np.float32), expected)
    assert np.abs(integers).max(axis=-1).min() == 127


@pytest.mark.parametrize(
    ("layout", "row_bytes"),
    [
        (Layout(12, 6, 197, 64, "int8"), 2 * 12 * 6 * 197 * (64 + 2)),
        (Layout(12, 6, 197, None, "float16", "maps"), 12 * 6 * 197 * 197 * 2),
    ],
)
def test_bytes_of_a_vit_small(layout: Layout, row_bytes: int) -> None:
    assert layout.row_bytes == row_bytes


@pytest.mark.parametrize("heads", [0, 1, 2])
def test_the_plan_covers_every_kind_with_its_bias(tmp_path: Path, heads: int) -> None:
    for kind in ("int8", "float16") if heads else LAYOUTS:
        layout, folder = LAYOUTS[kind], tmp_path / kind
        write(folder, layout, bias=make_bias(heads) if heads else None)
        arguments = {"budget_bytes": None, "free_bytes": 10**9, "where": folder}
        planned = plan(6, layout, shard_bytes=3 * layout.row_bytes, bias_heads=heads, **arguments)  # type: ignore[arg-type]
        written = sum(map(len, contents(folder).values()))
        assert written <= planned.bytes <= written + 2 * 1024 + 65536
    large = Layout(24, 16, 577, 64, "int8")
    sizes = [
        plan(9, large, budget_bytes=None, free_bytes=10**12, where=tmp_path, bias_heads=h).bytes
        for h in (0, heads)
    ]
    assert sizes[1] - sizes[0] == 24 * heads * 577 * 577 * 4


@settings(deadline=None, max_examples=150)
@given(
    kind=st.sampled_from(list(LAYOUTS)),
    file=st.sampled_from(["shard-00000", "shard-00001", "keys", "bias"]),
    place=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
)
def test_a_flipped_bit_anywhere_is_found_and_its_file_named(
    tmp_path_factory: pytest.TempPathFactory, kind: str, file: str, place: float, bit: int
) -> None:
    folder = tmp_path_factory.getbasetemp() / f"flipped {kind}"
    if not folder.exists():
        make_cache(folder, kind)
    path = folder / f"{file}.safetensors"
    if not path.exists():
        assert (kind, file) == ("maps", "bias")
        return
    sound = path.read_bytes()
    damaged = bytearray(sound)
    damaged[int(place * len(sound))] ^= 1 << bit
    path.write_bytes(damaged)
    try:
        with pytest.raises(StudyError, match=path.name) as error:
            read_all(folder)
        assert "python -m attention_transfer remake cache" in str(error.value)
        if file.startswith("shard"):
            assert all(path.name in problem for problem in verify(folder).problems)
            assert verify(folder).intact < 6
        else:
            with pytest.raises(StudyError, match=path.name):
                verify(folder)
    finally:
        path.write_bytes(sound)


def test_a_flipped_bit_in_the_manifest_is_found(finished: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "cache"))
    sound = (folder / "manifest.json").read_bytes()
    for place in range(len(sound)):
        damaged = bytearray(sound)
        damaged[place] ^= 1 << place % 8
        (folder / "manifest.json").write_bytes(damaged)
        with pytest.raises(StudyError, match=str(folder)):
            read_all(folder)


def test_a_reader_in_another_process_reads_the_same(finished: Path) -> None:
    reader = CacheReader(finished, expect=RECIPE)
    other = pickle.loads(pickle.dumps(reader))
    read = "read_maps" if reader.layout.content == "maps" else "read"
    assert torch.equal(getattr(other, read)(KEYS[:, 0], KEYS[:, 1]), read_all(finished))
    assert (other.bias is None) == (reader.bias is None)


# --- maps


def test_a_cache_gives_only_what_it_holds(finished: Path) -> None:
    reader = CacheReader(finished, expect=RECIPE)
    holds_maps = reader.layout.content == "maps"
    wrong, wanted = (reader.read, "queries_and_keys") if holds_maps else (reader.read_maps, "maps")
    with pytest.raises(StudyError) as error:
        wrong(KEYS[:, 0], KEYS[:, 1])
    for part in ("holds attention maps" if holds_maps else "holds queries and keys", "manifest.json"):
        assert part in str(error.value)
    assert f"set attention.content: {wanted}" in error.value.remedy
    assert "dvc repro cache" in error.value.remedy


@settings(deadline=None, max_examples=60)
@given(tokens=st.integers(1, 300), spread=st.floats(0, 30), seed=st.integers(0, 99))
def test_a_row_of_a_stored_map_sums_to_one_within_rounding(tokens: int, spread: float, seed: int) -> None:
    logits = spread * torch.randn(4, tokens, generator=torch.Generator().manual_seed(seed)).double()
    stored = rounded(logits.softmax(dim=-1), "float16").double()
    assert (stored.sum(dim=-1) - 1).abs().max() <= 2**-11 + tokens * 2**-25


@pytest.mark.parametrize(
    "values",
    [
        (2, 2, 3, 5, "float16", "maps"),
        (2, 2, 3, None, "int8", "maps"),
        (2, 2, 3, None, "float16"),
        (2, 2, 0, None, "float16", "maps"),
        (2, 2, 3, 0, "int8"),
        (2, 2, 3, 5, "int4"),
        (2, 2, 3, 5, "float16", "values"),
    ],
)
def test_a_layout_that_makes_no_sense_is_refused(values: tuple) -> None:
    with pytest.raises(ValueError, match=r"got Layout|no such dtype or content"):
        Layout(*values)


# --- bias


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("given_dtype", [torch.float16, torch.float32])
def test_the_bias_is_stored_once_and_comes_back(tmp_path: Path, heads: int, given_dtype: torch.dtype) -> None:
    bias = make_bias(heads).to(given_dtype)
    # A view with strides of its own, as an expanded or transposed table has.
    write(tmp_path / "c", LAYOUTS["int8"], bias=bias.transpose(-1, -2))
    found = CacheReader(tmp_path / "c", expect=RECIPE).bias
    assert found is not None
    assert found.dtype == torch.float32
    assert torch.equal(found, bias.float().transpose(-1, -2))
    assert safetensors.numpy.load_file(tmp_path / "c" / "bias.safetensors").keys() == {"bias"}


def test_a_teacher_without_bias_has_none(tmp_path: Path) -> None:
    write(tmp_path / "c", LAYOUTS["float16"])
    assert CacheReader(tmp_path / "c", expect=RECIPE).bias is None
    assert not (tmp_path / "c" / "bias.safetensors").exists()


def test_a_missing_bias_is_named(tmp_path: Path) -> None:
    folder = make_cache(tmp_path / "c", "int8")
    (folder / "bias.safetensors").unlink()
    with pytest.raises(StudyError, match=r"bias\.safetensors: is missing"):
        CacheReader(folder, expect=RECIPE)


def test_rows_of_another_bias_are_written_anew_and_equal_ones_are_kept(tmp_path: Path) -> None:
    folder, layout, bias = tmp_path / "c", LAYOUTS["float16"], make_bias()
    assert len(write(folder, layout, bias=bias)) == 2
    first = contents(folder)
    assert write(folder, layout, bias=bias.clone()) == []
    assert contents(folder) == first
    assert len(write(folder, layout, bias=bias + 2**-20)) == 2
    assert contents(folder)["bias.safetensors"] != first["bias.safetensors"]
    assert len(write(folder, layout)) == 2
    assert CacheReader(folder, expect=RECIPE).bias is None
    assert "bias.safetensors" not in contents(folder)


def test_the_bias_is_under_the_fingerprint(tmp_path: Path) -> None:
    """Another bias under this manifest, with its own right checksum, is still found."""
    folder = make_cache(tmp_path / "c", "int8")
    write(tmp_path / "other", LAYOUTS["int8"], bias=make_bias() + 1)
    shutil.copy(tmp_path / "other" / "bias.safetensors", folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["bias"] = json.loads((tmp_path / "other" / "manifest.json").read_text())["bias"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StudyError, match="its entries contradict each other"):
        CacheReader(folder, expect=RECIPE)


def test_a_bias_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    def writer(layout: Layout, bias: Tensor) -> CacheWriter:
        return CacheWriter(tmp_path / "c", layout=layout, recipe=RECIPE, keys=KEYS, bias=bias)

    for shape in ((2, 3, 3, 3), (1, 2, 3, 3), (2, 2, 3, 4), (2, 3, 3)):
        with pytest.raises(ValueError, match="a bias is floats of shape"):
            writer(LAYOUTS["int8"], torch.zeros(shape))
    with pytest.raises(ValueError, match=r"not torch\.int64"):
        writer(LAYOUTS["int8"], torch.zeros(2, 2, 3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="maps hold the bias already"):
        writer(LAYOUTS["maps"], make_bias())
    for value in (float("nan"), -float("inf")):
        bias = make_bias()
        bias[1, 0, 2, 1] = value
        with pytest.raises(StudyError, match="bias that the teacher adds to its logits is NaN or infinite"):
            writer(LAYOUTS["int8"], bias)
