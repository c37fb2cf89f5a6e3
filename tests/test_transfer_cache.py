"""The attention cache: what is written comes back, or an error says which file is at fault."""

from __future__ import annotations

import gc
import json
import os
import pickle
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import safetensors.numpy
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_transfer.errors import StudyError
from attention_transfer.transfer import shards
from attention_transfer.transfer.cache import CacheReader, CacheWriter, Layout, plan, verify
from attention_transfer.transfer.quantisation import rounded

LAYOUT = Layout(layers=3, heads=2, tokens=5, head_dim=4, dtype="float16")  # 480 bytes a row
RECIPE = {"teacher": {"sha256": "aa", "layers": 3}, "data": "bb", "views": {"crop_scale": (0.2, 1.0)}}
SHARD_BYTES = 10 * LAYOUT.row_bytes


def make_keys(rows: int, views: int = 4) -> np.ndarray:
    """Examples 0, 7, 14 ... with views -1 .. views - 2, in an order that is not sorted."""
    keys = np.array([(7 * (row // views), row % views - 1) for row in range(rows)], dtype=np.int64)
    return keys.reshape(-1, 2)[np.random.default_rng(rows).permutation(rows)]


def make_rows(keys: np.ndarray, layout: Layout = LAYOUT) -> torch.Tensor:
    """The row of each key is a function of the key alone, as for a real teacher."""
    rows = [
        torch.randn(
            layout.shape, generator=torch.Generator().manual_seed(1000 * int(example) + int(view) + 1)
        )
        for example, view in keys
    ]
    return torch.stack(rows) if rows else torch.empty(0, *layout.shape)


def write(folder: Path, keys: np.ndarray, recipe: dict = RECIPE, layout: Layout = LAYOUT) -> list[slice]:
    """Writes what is pending, and returns it."""
    with CacheWriter(folder, layout=layout, recipe=recipe, keys=keys, shard_bytes=SHARD_BYTES) as writer:
        pending = list(writer.pending())
        for piece in pending:
            writer.write(make_rows(keys[piece], layout))
    return pending


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and modification time: a file that was written anew has others."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("shard-*")}


def read_all(folder: Path) -> torch.Tensor:
    reader = CacheReader(folder, expect=None)
    return reader.read(reader.keys[:, 0], reader.keys[:, 1])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 47 rows in 5 shards; tests copy it before they touch it."""
    folder = tmp_path_factory.mktemp("finished") / "cache"
    write(folder, make_keys(47))
    return folder


@pytest.fixture
def cache(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "cache"))


# --- what is written comes back


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.tuples(*[st.integers(1, 4)] * 4),
    kind=st.sampled_from(
        [
            ("queries_and_keys", "float16"),
            ("queries_and_keys", "float32"),
            ("queries_and_keys", "int8"),
            ("maps", "float16"),
            ("maps", "float32"),
        ]
    ),
    rows=st.integers(0, 23),
    rows_per_shard=st.integers(1, 9),
    data=st.data(),
)
def test_any_shape_order_and_pieces_come_back(
    sizes: tuple[int, int, int, int],
    kind: tuple[str, Any],
    rows: int,
    rows_per_shard: int,
    data: st.DataObject,
) -> None:
    content, dtype = kind
    maps = content == "maps"
    layout = Layout(*sizes[:3], None if maps else sizes[3], dtype, content)  # type: ignore[arg-type]
    pairs = st.tuples(
        st.integers(0, 2**31 - 1) | st.integers(0, 5), st.integers(-1, 2**31 - 1) | st.integers(-1, 4)
    )
    keys = np.array(data.draw(st.lists(pairs, min_size=rows, max_size=rows, unique=True)), dtype=np.int64)
    keys = keys.reshape(-1, 2)
    given_rows = torch.randn(rows, *layout.shape, dtype=torch.float32)
    given_rows[rows // 2 :: 3] *= 1e-7  # to subnormal numbers of float16
    expected = rounded(given_rows, dtype)
    if dtype != "int8":
        np.testing.assert_array_equal(expected.numpy(), given_rows.numpy().astype(dtype))
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), max_size=5)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "cache"
        shard_bytes = rows_per_shard * layout.row_bytes
        with CacheWriter(folder, layout=layout, recipe=RECIPE, keys=keys, shard_bytes=shard_bytes) as writer:
            pending = np.concatenate([np.arange(rows)[piece] for piece in writer.pending()] or [np.arange(0)])
            np.testing.assert_array_equal(pending, np.arange(rows))
            for start, stop in zip([0, *cuts], [*cuts, rows], strict=True):
                writer.write(given_rows[start:stop])
        assert len(list(folder.glob("shard-*"))) == plan_shards(rows, layout, shard_bytes)
        reader = CacheReader(folder, expect=RECIPE)
        asked = np.array(
            data.draw(st.lists(st.integers(0, rows - 1), max_size=12)) if rows else [], dtype=np.int64
        )
        layers = data.draw(st.none() | st.lists(st.integers(0, layout.layers - 1), unique=True))
        read = reader.read_maps if maps else reader.read
        found = read(keys[asked, 0], keys[asked, 1], layers)
        wanted = expected[asked]
        if layers is not None:
            wanted = wanted[:, layers] if maps else wanted[:, :, layers]
        assert found.is_contiguous()
        assert found.dtype == expected.dtype
        assert found.shape == wanted.shape
        assert found.numpy().tobytes() == wanted.numpy().tobytes()  # to the bit: zeros have signs


def plan_shards(rows: int, layout: Layout, shard_bytes: int) -> int:
    return plan(
        rows, layout, budget_bytes=None, free_bytes=10**9, where=Path("c"), shard_bytes=shard_bytes
    ).shards


def test_one_view_number_serves_the_whole_batch(finished: Path) -> None:
    reader = CacheReader(finished, expect=None)
    examples = np.array([14, 0, 7])
    keys = np.stack([examples, np.full(3, -1)], axis=1)
    assert torch.equal(reader.read(examples, -1), make_rows(keys).half())


def test_shards_are_plain_safetensors_with_xxh3_of_each_row(finished: Path) -> None:
    tensors = safetensors.numpy.load_file(finished / "shard-00001.safetensors")
    assert tensors["rows"].shape == (10, *LAYOUT.shape)
    assert tensors["xxh3"].dtype == np.uint64
    assert tensors["xxh3"].tolist() == [xxhash.xxh3_64(row.tobytes()).intdigest() for row in tensors["rows"]]


@pytest.mark.slow
def test_two_runs_write_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    keys = make_keys(47)
    write(tmp_path / "again", keys)
    assert contents(tmp_path / "again") == contents(finished)
    # In one process a hash map may keep its order by luck: another process has another hash seed.
    run_child("write", tmp_path / "other")
    assert contents(tmp_path / "other") == contents(finished)


def test_a_pickled_reader_opens_the_files_again(cache: Path) -> None:
    reader = CacheReader(cache, expect=RECIPE)
    first = reader.read(reader.keys[:, 0], reader.keys[:, 1])
    pickled = pickle.dumps(reader)
    assert len(pickled) < 2000
    assert torch.equal(pickle.loads(pickled).read(reader.keys[:, 0], reader.keys[:, 1]), first)


@pytest.mark.slow
def test_two_processes_read_at_once_from_a_folder_that_is_read_only(cache: Path) -> None:
    for path in cache.iterdir():
        path.chmod(stat.S_IRUSR)
    cache.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        reader = CacheReader(cache, expect=RECIPE)
        halves = np.array_split(reader.keys, 2)
        first = reader.read(*halves[0].T)
        in_child = run_child("read", cache)
        rows = torch.cat([first, reader.read(*halves[1].T)])
        assert torch.equal(rows, make_rows(make_keys(47)).half())
        assert in_child == xxhash.xxh3_64_hexdigest(rows.numpy().tobytes())
    finally:
        cache.chmod(0o700)


# --- sizes


def test_row_bytes_of_the_small_study() -> None:
    assert (
        Layout(layers=4, heads=3, tokens=17, head_dim=32, dtype="float16").row_bytes
        == 2 * 4 * 3 * 17 * 32 * 2
    )
    assert (
        Layout(layers=4, heads=3, tokens=17, head_dim=32, dtype="float32").row_bytes
        == 2 * 4 * 3 * 17 * 32 * 4
    )


def test_the_plan_covers_what_is_written(finished: Path) -> None:
    written = sum(map(len, contents(finished).values()))
    planned = plan(47, LAYOUT, budget_bytes=None, free_bytes=10**9, where=finished, shard_bytes=SHARD_BYTES)
    assert planned.shards == 5
    assert written <= planned.bytes <= written + 5 * 1024 + 65536


@pytest.mark.parametrize(("rows", "shards"), [(0, 0), (1, 1), (10, 1), (11, 2)])
def test_the_plan_counts_shards(rows: int, shards: int) -> None:
    assert plan_shards(rows, LAYOUT, SHARD_BYTES) == shards


def test_over_budget_or_free_room_is_refused_and_the_limit_itself_is_not(tmp_path: Path) -> None:
    where = tmp_path / "cache"
    exact = plan(20000, LAYOUT, budget_bytes=None, free_bytes=10**12, where=where).bytes
    assert plan(20000, LAYOUT, budget_bytes=exact, free_bytes=exact, where=where).bytes == exact
    with pytest.raises(StudyError) as budget:
        plan(20000, LAYOUT, budget_bytes=exact - 1, free_bytes=10**12, where=where)
    with pytest.raises(StudyError) as disk:
        plan(20000, LAYOUT, budget_bytes=None, free_bytes=exact - 1, where=where)
    for error, key in ((budget, "attention.budget_gb"), (disk, "the disk has room")):
        for part in (
            str(exact),
            str(exact - 1),
            key,
            "views.per_image",
            "attention.source: online",
            str(where),
        ):
            assert part in str(error.value)


# --- faults on disk


@settings(deadline=None, max_examples=120)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), shard=st.integers(0, 4))
def test_a_flipped_bit_anywhere_in_a_shard_is_found_and_named(
    finished: Path, tmp_path_factory: pytest.TempPathFactory, place: float, bit: int, shard: int
) -> None:
    folder = tmp_path_factory.getbasetemp() / "flipped shards"
    if not folder.exists():
        shutil.copytree(finished, folder)
    path = folder / f"shard-{shard:05d}.safetensors"
    sound = path.read_bytes()
    damaged = bytearray(sound)
    damaged[int(place * len(sound))] ^= 1 << bit
    path.write_bytes(damaged)
    try:
        with pytest.raises(StudyError, match=path.name) as error:
            read_all(folder)
        assert "python -m attention_transfer remake cache" in str(error.value)
        report = verify(folder)
        assert report.problems
        assert report.intact < report.rows == 47
        assert all(path.name in problem for problem in report.problems)
    finally:
        path.write_bytes(sound)


def flip_row(path: Path, row_from_end: int) -> None:
    content = bytearray(path.read_bytes())
    content[-row_from_end * LAYOUT.row_bytes + 17] ^= 4
    path.write_bytes(content)


def test_a_damaged_row_is_named_by_row_example_and_view_and_spares_the_others(cache: Path) -> None:
    keys = make_keys(47)
    flip_row(cache / "shard-00002.safetensors", 3)  # row 7 of 10, row 27 of all
    reader = CacheReader(cache, expect=RECIPE)
    sound = np.delete(np.arange(47), 27)
    assert torch.equal(reader.read(keys[sound, 0], keys[sound, 1]), make_rows(keys[sound]).half())
    example, view = keys[27]
    with pytest.raises(StudyError) as error:
        # One layer, which the flipped bit does not touch: the row as a whole must be sound.
        reader.read(keys[[26, 27], 0], keys[[26, 27], 1], [2])
    for part in (
        "shard-00002.safetensors",
        "row 7",
        f"example {example}",
        f"view {view}",
        "python -m attention_transfer remake cache",
    ):
        assert part in str(error.value)
    report = verify(cache)
    assert (report.rows, report.intact, len(report.problems)) == (47, 46, 1)
    with pytest.raises(StudyError, match="row 7"):
        CacheReader(cache, expect=RECIPE, verify="all")


def test_every_row_is_verified_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, hashed = shards.xxh3_64_intdigest, []

    def counting(row: np.ndarray) -> int:
        hashed.append(row.nbytes)
        return plain(row)

    monkeypatch.setattr(shards, "xxh3_64_intdigest", counting)
    reader = CacheReader(cache, expect=None)
    for _ in range(3):
        reader.read(reader.keys[:, 0], reader.keys[:, 1])
    assert hashed == [LAYOUT.row_bytes] * 47


@pytest.mark.parametrize("layers", [None, (1,)], ids=["all layers", "one layer"])
def test_a_shard_that_is_cut_short_while_it_is_open_is_an_error(
    cache: Path, layers: tuple[int, ...] | None
) -> None:
    """A mapped file would end the process here."""
    reader = CacheReader(cache, expect=None)
    last = reader.keys[-1]
    reader.read(last[:1], last[1:])  # verified
    path = cache / "shard-00004.safetensors"
    os.truncate(path, path.stat().st_size - LAYOUT.row_bytes)
    with pytest.raises(StudyError, match=r"shard-00004\.safetensors.* truncated since it was opened"):
        reader.read(last[:1], last[1:], layers)


def test_systems_without_preadv_read_the_same(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = read_all(cache)
    monkeypatch.delattr(os, "preadv")
    assert torch.equal(read_all(cache), expected)
    reader = CacheReader(cache, expect=None)
    for _ in range(2):  # with and without checksums
        found = reader.read(reader.keys[:, 0], reader.keys[:, 1], (1, 0))
        assert torch.equal(found, expected[:, :, [1, 0]])


def test_a_short_read_goes_on(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may give less than is asked for, as when a signal comes."""
    expected, plain = read_all(cache), os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda descriptor, targets, offset: plain(descriptor, [targets[0][:7]], offset)
    )
    assert torch.equal(read_all(cache), expected)


@pytest.mark.slow
def test_readers_close_their_files(cache: Path) -> None:
    def opened() -> int:
        gc.collect()  # of those that other tests have left
        return psutil.Process().num_fds()

    before = opened()
    reader = CacheReader(cache, expect=None)
    reader.read(reader.keys[:, 0], reader.keys[:, 1])
    assert opened() == before + 5
    del reader
    assert opened() == before


@pytest.mark.parametrize("size", [0, 5, 100, 1000, -1])
def test_a_truncated_shard_is_named(cache: Path, size: int) -> None:
    path = cache / "shard-00003.safetensors"
    os.truncate(path, size if size >= 0 else path.stat().st_size - 1)
    with pytest.raises(StudyError, match=r"shard-00003\.safetensors.*truncated"):
        read_all(cache)
    assert [line.split(":")[0] for line in verify(cache).problems] == [path.name]


def test_a_shard_with_something_behind_it_is_refused(cache: Path) -> None:
    with (cache / "shard-00003.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(StudyError, match=r"shard-00003\.safetensors: is too long"):
        read_all(cache)


@pytest.mark.parametrize("name", ["shard-00003.safetensors", "keys.safetensors"])
def test_a_deleted_file_is_named(cache: Path, name: str) -> None:
    (cache / name).unlink()
    with pytest.raises(StudyError, match=rf"{name}: is missing"):
        read_all(cache)


def test_shards_that_changed_places_are_refused(cache: Path) -> None:
    first, second = cache / "shard-00000.safetensors", cache / "shard-00001.safetensors"
    first.rename(cache / "x")
    second.rename(first)
    (cache / "x").rename(second)
    with pytest.raises(StudyError, match="shard-0000"):
        read_all(cache)


@pytest.mark.parametrize("name", ["keys.safetensors", "manifest.json"])
def test_a_flipped_bit_in_keys_or_manifest_is_found(cache: Path, name: str) -> None:
    sound = (cache / name).read_bytes()
    for place in range(0, len(sound), 3):
        damaged = bytearray(sound)
        damaged[place] ^= 1 << place % 8
        (cache / name).write_bytes(damaged)
        with pytest.raises(StudyError, match=str(cache)):
            read_all(cache)


def test_a_folder_without_a_manifest_is_refused(cache: Path, tmp_path: Path) -> None:
    (cache / "manifest.json").unlink()
    for folder in (cache, tmp_path / "nowhere"):
        with pytest.raises(StudyError, match="manifest, written last, is missing"):
            CacheReader(folder, expect=None)


def test_another_recipe_is_refused_and_the_entry_named(cache: Path) -> None:
    other = json.loads(json.dumps(RECIPE))
    CacheReader(cache, expect=other)  # a tuple and a list are the same in JSON
    other["teacher"]["sha256"] = "cc"
    with pytest.raises(StudyError, match=r"teacher\.sha256 is 'aa', and 'cc' is expected") as error:
        CacheReader(cache, expect=other)
    assert "data" not in error.value.problem
    with pytest.raises(StudyError, match=r"views is absent|views\.crop_scale"):
        CacheReader(cache, expect={**RECIPE, "views": {"crop_scale": (0.2, 0.9)}})
    with pytest.raises(StudyError, match="dtype is absent"):
        CacheReader(cache, expect={**RECIPE, "dtype": "float16"})


def test_shards_of_another_teacher_under_this_manifest_are_refused(cache: Path, tmp_path: Path) -> None:
    write(tmp_path / "other", make_keys(47), recipe={**RECIPE, "data": "cc"})
    shutil.copy(tmp_path / "other" / "shard-00001.safetensors", cache)
    with pytest.raises(StudyError, match=r"shard-00001\.safetensors.*another cache"):
        read_all(cache)


@pytest.mark.parametrize(
    ("example", "view"),
    [(0, 3), (1, 0), (85, 0), (-1, 0), (0, -2), (1, -1 - 2**32), (2**32, 0), (2**62, 2**62)],
)
def test_a_key_that_is_not_there_is_an_error(finished: Path, example: int, view: int) -> None:
    reader = CacheReader(finished, expect=None)
    with pytest.raises(StudyError) as error:
        reader.read(np.array([7, example]), np.array([0, view]))
    for part in (f"example {example}, view {view}", "47 rows", "12 examples", "from 0 to 77", "from -1 to 2"):
        assert part in str(error.value)


def test_an_empty_cache_holds_nothing(tmp_path: Path) -> None:
    write(tmp_path / "empty", make_keys(0))
    with pytest.raises(StudyError, match="it holds no rows"):
        CacheReader(tmp_path / "empty", expect=RECIPE).read(np.array([0]), -1)


def test_a_layer_that_the_teacher_lacks_is_an_error(finished: Path) -> None:
    for layer in (3, -1):
        with pytest.raises(ValueError, match="layers 0 to 2"):
            CacheReader(finished, expect=None).read(np.array([0]), -1, [0, layer])


# --- writing


@pytest.mark.parametrize(
    ("value", "dtype", "given_dtype", "parts"),
    [
        (65520.0, torch.float32, "float16", ("65520", "65504", "attention.dtype: float32")),
        (-1e30, torch.bfloat16, "float16", ("attention.dtype: float32",)),
        (float("nan"), torch.float32, "float16", ("NaN", "attention.dtype: float32")),
        (float("inf"), torch.float16, "float32", ("infinite", "weights")),
        (-8.4e6, torch.float32, "int8", ("8.4e+06", "8.31901e+06", "attention.dtype: float32")),
        (float("nan"), torch.bfloat16, "int8", ("NaN", "attention.dtype: float32")),
    ],
)
def test_a_value_that_does_not_fit_is_an_error_that_names_the_key(
    tmp_path: Path, value: float, dtype: torch.dtype, given_dtype: str, parts: tuple[str, ...]
) -> None:
    layout = Layout(3, 2, 5, 4, dtype=given_dtype)  # type: ignore[arg-type]
    keys = make_keys(47)
    rows = make_rows(keys).to(dtype)
    rows[33, 1, 2, 0, 3, 1] = value
    with (  # noqa: PT012 - writing in pieces is the point
        pytest.raises(StudyError) as error,
        CacheWriter(
            tmp_path / "c", layout=layout, recipe=RECIPE, keys=keys, shard_bytes=SHARD_BYTES
        ) as writer,
    ):
        for piece in (rows[:6], rows[6:]):
            writer.write(piece)
    for part in (f"example {keys[33, 0]}, view {keys[33, 1]}", *parts):
        assert part in str(error.value)
    assert not (tmp_path / "c" / "manifest.json").exists()


def test_the_largest_float16_is_stored(tmp_path: Path) -> None:
    rows = torch.full((1, *LAYOUT.shape), 65504.0)
    with CacheWriter(tmp_path / "c", layout=LAYOUT, recipe=RECIPE, keys=make_keys(1)) as writer:
        writer.write(rows)
    assert torch.equal(read_all(tmp_path / "c").float(), rows)


@pytest.mark.parametrize(
    "keys",
    [
        np.zeros((2, 3), np.int64),
        np.zeros((2, 2), np.int32),
        np.array([[0, 1], [0, 1]]),
        np.array([[-1, 0]]),
        np.array([[0, -2]]),
        np.array([[2**31, 0]]),
    ],
)
def test_keys_that_make_no_sense_are_refused(tmp_path: Path, keys: np.ndarray) -> None:
    with pytest.raises(ValueError, match="keys"):
        CacheWriter(tmp_path / "c", layout=LAYOUT, recipe=RECIPE, keys=keys)


def test_rows_of_another_shape_or_too_many_or_too_few_are_refused(tmp_path: Path) -> None:
    keys = make_keys(12)
    with CacheWriter(tmp_path / "c", layout=LAYOUT, recipe=RECIPE, keys=keys) as writer:
        with pytest.raises(ValueError, match="rows are"):
            writer.write(torch.zeros(2, *LAYOUT.shape[1:]))
        with pytest.raises(ValueError, match="rows are"):
            writer.write(torch.zeros(2, *LAYOUT.shape, dtype=torch.int64))
        with pytest.raises(ValueError, match="3 rows more"):
            writer.write(torch.zeros(15, *LAYOUT.shape))
    with (
        pytest.raises(StudyError, match="2 of 12 rows are not on disk"),
        CacheWriter(
            tmp_path / "d", layout=LAYOUT, recipe=RECIPE, keys=keys, shard_bytes=SHARD_BYTES
        ) as writer,
    ):
        writer.write(torch.zeros(11, *LAYOUT.shape))
    assert not (tmp_path / "d" / "manifest.json").exists()


def test_a_finished_cache_is_left_as_it_is(cache: Path) -> None:
    before = identities(cache), contents(cache)
    assert write(cache, make_keys(47)) == []
    assert (identities(cache), contents(cache)) == before


def test_only_damaged_shards_are_written_anew(cache: Path, finished: Path) -> None:
    flip_row(cache / "shard-00001.safetensors", 1)
    os.truncate(cache / "shard-00004.safetensors", 600)
    (cache / "shard-00009.safetensors").write_bytes(b"left by a longer list of keys")
    (cache / ".tmp-1-shard-00004.safetensors").write_bytes(b"left by a killed process")
    before = identities(cache)
    assert write(cache, make_keys(47)) == [slice(10, 20), slice(40, 47)]
    after = identities(cache)
    assert {name for name in after if after[name] == before[name]} == {
        f"shard-0000{n}.safetensors" for n in (0, 2, 3)
    }
    assert contents(cache) == contents(finished)


def test_another_recipe_or_order_of_keys_keeps_nothing(cache: Path) -> None:
    keys = make_keys(47)
    assert len(write(cache, keys, recipe={**RECIPE, "data": "cc"})) == 5
    assert len(write(cache, keys[::-1].copy(), recipe={**RECIPE, "data": "cc"})) == 5
    assert torch.equal(read_all(cache), make_rows(keys[::-1]).half())


def test_the_manifest_goes_before_a_shard_is_replaced(cache: Path) -> None:
    other = {**RECIPE, "data": "cc"}
    with (
        pytest.raises(KeyboardInterrupt),
        CacheWriter(cache, layout=LAYOUT, recipe=other, keys=make_keys(47), shard_bytes=SHARD_BYTES),
    ):
        raise KeyboardInterrupt
    with pytest.raises(StudyError, match="manifest, written last, is missing"):
        CacheReader(cache, expect=None)


# --- processes: killed, rivals, full disks. The child is this file, run as a script.


def command(task: str, folder: Path) -> dict[str, Any]:
    """Arguments of subprocess for a child that imports the same package."""
    environment = {**os.environ, "PYTHONPATH": str(Path(shards.__file__).parents[2])}
    return {"args": [sys.executable, __file__, task, str(folder)], "env": environment, "text": True}


def run_child(task: str, folder: Path) -> str:
    return str(
        subprocess.run(**command(task, folder), check=True, stdout=subprocess.PIPE, timeout=60).stdout
    ).strip()


def child(task: str, folder: Path) -> None:
    if task == "read":
        print(xxhash.xxh3_64_hexdigest(read_all(folder).numpy().tobytes()))
    elif task == "write":
        write(folder, make_keys(47))
    else:
        hang_in_the_third_shard(folder)


def hang_in_the_third_shard(folder: Path) -> None:
    """Stops for good while the third shard lies half written under its temporary name."""
    plain = safetensors.numpy.save_file

    def save_file(tensors: dict[str, np.ndarray], path: Path, metadata: dict[str, str]) -> None:
        plain(tensors, path, metadata)
        if "shard-00002" not in path.name:
            return
        os.truncate(path, path.stat().st_size // 2)
        print("hanging", flush=True)
        signal.pause()
        raise AssertionError("a signal that was not SIGKILL")

    safetensors.numpy.save_file = save_file
    write(folder, make_keys(47))


@pytest.mark.slow
def test_a_killed_writer_is_resumed_and_rivals_wait(tmp_path: Path, finished: Path) -> None:
    folder = tmp_path / "cache"
    with subprocess.Popen(**command("hang", folder), stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "hanging\n"
            with pytest.raises(StudyError, match="another process is writing this cache"):
                write(folder, make_keys(47))
        finally:
            process.kill()
    names = sorted(path.name for path in folder.iterdir())
    assert names[1:] == ["shard-00000.safetensors", "shard-00001.safetensors"]
    assert names[0].startswith(".tmp-")
    with pytest.raises(StudyError, match="manifest, written last, is missing"):
        CacheReader(folder, expect=RECIPE)
    before = identities(folder)
    assert write(folder, make_keys(47)) == [slice(20, 30), slice(30, 40), slice(40, 47)]
    assert before.items() <= identities(folder).items()
    assert contents(folder) == contents(finished)


def test_a_second_writer_in_the_same_process_is_refused_and_the_lock_is_given_back(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    with CacheWriter(folder, layout=LAYOUT, recipe=RECIPE, keys=make_keys(3)) as writer:
        with pytest.raises(StudyError, match="another process is writing"):
            write(folder, make_keys(3))
        writer.write(make_rows(make_keys(3)))
    assert write(folder, make_keys(3)) == []
    assert {path.name for path in folder.iterdir()} == {
        "shard-00000.safetensors",
        "keys.safetensors",
        "manifest.json",
    }


def test_a_full_disk_is_an_error_and_finished_shards_are_kept(tmpfs: Path) -> None:
    folder, keys = tmpfs / "cache", make_keys(4000)
    rows = torch.zeros(100, *LAYOUT.shape)
    with (  # noqa: PT012 - the disk fills in one of many writes
        pytest.raises(
            StudyError, match=r"shard-000\d\d\.safetensors: cannot be written: No space left"
        ) as error,
        CacheWriter(
            folder, layout=LAYOUT, recipe=RECIPE, keys=keys, shard_bytes=100 * LAYOUT.row_bytes
        ) as writer,
    ):
        for _ in range(40):
            writer.write(rows)
    assert "free disk room" in error.value.remedy
    kept = identities(folder)
    assert {path.name for path in folder.iterdir()} == set(kept)
    assert len(kept) > 10
    subprocess.run(["mount", "-o", "remount,size=8m", str(tmpfs)], check=True)
    with CacheWriter(
        folder, layout=LAYOUT, recipe=RECIPE, keys=keys, shard_bytes=100 * LAYOUT.row_bytes
    ) as writer:
        for _ in writer.pending():
            writer.write(rows)
    assert kept.items() <= identities(folder).items()
    assert verify(folder).intact == 4000


def test_a_file_system_that_is_read_only_can_be_read_and_not_written(tmpfs: Path) -> None:
    write(tmpfs / "cache", make_keys(47))
    subprocess.run(["mount", "-o", "remount,ro", str(tmpfs)], check=True)
    assert torch.equal(read_all(tmpfs / "cache"), make_rows(make_keys(47)).half())
    for folder in (tmpfs / "cache", tmpfs / "new"):
        with pytest.raises(StudyError, match="cannot be written: Read-only file system"):
            write(folder, make_keys(47))


def test_a_limit_of_file_size_is_an_error(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SHARD_BYTES // 2, hard))
    try:
        with pytest.raises(StudyError, match="cannot be written: File too large"):
            write(tmp_path / "cache", make_keys(47))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "cache").iterdir()) == []


if __name__ == "__main__":
    child(sys.argv[1], Path(sys.argv[2]))
