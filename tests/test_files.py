"""Atomic files under faults, checksums, and fingerprints that are equal on every machine."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_transfer import files
from attention_transfer.errors import StudyError, repro

OLD, NEW = "old\n" * 1000, "new\n" * 2000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with old content, in a folder of its own."""
    target = tmp_path / "folder" / "file.txt"
    files.write_text(target, OLD)
    return target


def untouched(path: Path) -> bool:
    return path.read_text(encoding="utf-8") == OLD and list(path.parent.iterdir()) == [path]


def test_a_file_is_replaced_whole(path: Path) -> None:
    with files.atomic(path) as temporary:
        assert temporary.parent == path.parent
        assert temporary.name.startswith(files.TEMPORARY)
        temporary.write_text(NEW, encoding="utf-8")
        assert path.read_text(encoding="utf-8") == OLD
    assert path.read_text(encoding="utf-8") == NEW
    assert list(path.parent.iterdir()) == [path]


def test_content_is_on_the_disk_before_it_has_its_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync of the file, then rename, then fsync of the folder: the order that survives a power cut."""
    events: list[str] = []
    fsync, rename = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")  # noqa: PTH112
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    files.write_text(path, NEW)
    assert events == ["file", "rename", "folder"]


def test_a_table_reads_back_as_pandas_would_write_it(path: Path) -> None:
    columns = ["epoch", "loss", "validation_accuracy"]
    rows = [{"epoch": 1, "loss": 0.1 + 0.2, "unasked": 1.0}, {"epoch": 2, "loss": 1e-17, columns[2]: 0.5}]
    files.write_csv(path, columns, rows)
    assert path.read_text(encoding="utf-8") == pd.DataFrame(rows).reindex(columns=columns).to_csv(index=False)
    files.write_csv(path, columns, [])
    assert path.read_text(encoding="utf-8") == "epoch,loss,validation_accuracy\n"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_an_exception_leaves_the_old_file(error: type[BaseException], path: Path) -> None:
    def work() -> None:
        with files.atomic(path) as temporary:
            temporary.write_text(NEW, encoding="utf-8")
            raise error

    with pytest.raises(error):
        work()
    assert untouched(path)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_full_disk_leaves_the_old_file(
    call: str, number: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fails)
    with pytest.raises(StudyError) as caught:
        files.write_text(path, NEW)
    assert untouched(path)
    assert str(path) in str(caught.value)
    assert os.strerror(number) in str(caught.value)
    assert "free disk room" in caught.value.remedy


def test_a_write_cut_short_leaves_the_old_file(path: Path) -> None:
    """A real failing write: the kernel refuses files of more than 5000 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(StudyError, match="File too large"):
            files.write_text(path, NEW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert untouched(path)


def test_a_folder_that_cannot_be_made(path: Path) -> None:
    with pytest.raises(StudyError) as caught:
        files.write_text(path / "below-a-file" / "file.txt", NEW)
    assert "below-a-file" in caught.value.where
    assert untouched(path)


def test_a_name_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "name" / "inside").mkdir(parents=True)
    with pytest.raises(StudyError, match="Is a directory"):
        files.write_text(tmp_path / "name", NEW)
    assert [path.name for path in tmp_path.iterdir()] == ["name"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_writer_leaves_a_whole_file(number: signal.Signals, tmp_path: Path) -> None:
    """Killed at several moments; only after SIGKILL may a temporary remain, under the name that says so."""
    path = tmp_path / "file"
    script = (
        "import itertools, signal, sys\nfrom pathlib import Path\nfrom attention_transfer import files\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        "for i in itertools.count():\n    files.write_text(Path(sys.argv[1]), str(i % 10) * 3_000_000)\n"
    )
    for pause in (0.0, 0.003, 0.011):
        writer = subprocess.Popen([sys.executable, "-c", script, str(path)], stderr=subprocess.DEVNULL)
        while not path.exists() and writer.poll() is None:
            time.sleep(0.005)
        time.sleep(pause)
        writer.send_signal(number)
        try:
            writer.wait(timeout=30)
        finally:
            writer.kill()
        content = path.read_text()
        assert len(content) == 3_000_000
        assert len(set(content)) == 1
        rest = [other for other in tmp_path.iterdir() if other != path]
        if number is signal.SIGINT:
            assert not rest
        assert all(other.name.startswith(files.TEMPORARY) for other in rest)
        path.unlink()


def test_json_reads_well_in_a_diff(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"b": [1, 2], "a": 0.5})
    assert path.read_text() == '{\n "a": 0.5,\n "b": [\n  1,\n  2\n ]\n}\n'
    assert files.read_json(path, made_by="data") == {"a": 0.5, "b": [1, 2]}


def test_json_refuses_nan_and_keeps_the_old_file(path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, {"loss": float("nan")})
    assert untouched(path)


def test_a_missing_json_file_names_its_stage(tmp_path: Path) -> None:
    with pytest.raises(StudyError) as caught:
        files.read_json(tmp_path / "a.json", made_by="cache@mae")
    assert caught.value.problem == "does not exist"
    assert caught.value.where == str(tmp_path / "a.json")
    assert caught.value.remedy.endswith("dvc repro cache@mae")


@pytest.mark.parametrize("content", [b"", b'{"a": ', b'{"a": 1}}', b"\xff\xfe", b"nothing"])
def test_a_damaged_json_file_names_its_stage(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(StudyError, match="is damaged") as caught:
        files.read_json(path, made_by="data")
    assert caught.value.where == str(path)
    assert caught.value.remedy.endswith("python -m attention_transfer remake data")


@pytest.mark.parametrize(
    ("at_work", "command"),
    [
        (None, "python -m attention_transfer remake split"),
        ("train@copy-0", "python -m attention_transfer remake split"),
        (
            "studies/smoke/dvc.yaml:train@copy-0",
            "python -m attention_transfer remake studies/smoke/dvc.yaml:split",
        ),
    ],
)
def test_a_remedy_names_the_graph_at_work(
    at_work: str | None, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DVC_STAGE", raising=False)
    if at_work:
        monkeypatch.setenv("DVC_STAGE", at_work)
    assert repro("split", again=True) == command
    assert repro("split") == command.replace("python -m attention_transfer remake", "dvc repro")


def test_a_folder_is_no_json_file(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="Is a directory"):
        files.read_json(tmp_path, made_by="data")


def test_sha256_is_that_of_the_standard_library(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    assert files.sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_sha256_of_a_missing_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="cannot be read: No such file") as caught:
        files.sha256(tmp_path / "file")
    assert caught.value.where == str(tmp_path / "file")


# Pinned: a change of these hashes makes every cache and checkpoint of every user stale.
FINGERPRINTS: list[tuple[Any, str]] = [
    ({}, "44136fa355b3678a"),
    ({"b": [1, 2.5, None, True], "a": "é"}, "0b8cc543e984d4d7"),
]


@pytest.mark.parametrize(("value", "expected"), FINGERPRINTS)
def test_fingerprints_do_not_change(value: Any, expected: str) -> None:
    assert files.fingerprint(value) == expected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=60, deadline=None)
@given(JSON, JSON)
def test_fingerprints_are_equal_exactly_for_equal_values(first: Any, second: Any) -> None:
    def canonical(value: Any) -> str:
        return json.dumps(value, sort_keys=True)

    equal = files.fingerprint(first) == files.fingerprint(second)
    assert equal == (canonical(first) == canonical(second))
    assert files.fingerprint(json.loads(json.dumps(first))) == files.fingerprint(first)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(), st.integers(), min_size=2), st.randoms(use_true_random=False))
def test_fingerprints_do_not_depend_on_the_order_of_keys(value: dict[str, int], order: Any) -> None:
    items = list(value.items())
    order.shuffle(items)
    assert files.fingerprint(dict(items)) == files.fingerprint(value)


def test_fingerprints_refuse_nan() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.fingerprint({"a": float("nan")})


def test_no_flipped_bit_of_a_sealed_file_goes_unnoticed(tmp_path: Path) -> None:
    """Each of them: the values are the same, as after a change of white space, or the file is refused."""
    path, values = tmp_path / "a.json", {"rate": 0.25, "name": "copy", "layers": [0, 1], "none": None}
    files.write_sealed(path, values)
    whole, refused = path.read_bytes(), 0
    for bit in range(8 * len(whole)):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            assert files.read_sealed(path, made_by="data") == values, bit
        except StudyError as error:
            refused += 1
            assert error.where == str(path)  # noqa: PT017
            assert "remake data" in error.remedy  # noqa: PT017
    assert refused > 7 * len(whole)


@pytest.mark.parametrize("content", ["[]", "{}", '"a"', '{"a": 1}', '{"digest": "0"}'])
def test_a_file_without_a_seal_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(StudyError, match="digest"):
        files.read_sealed(tmp_path / "a.json", made_by="data")


@given(content=st.binary(max_size=2**12), size=st.sampled_from([0, 1, 2**20, 2**20 + 1]))
def test_xxh3_is_that_of_the_whole_content(
    content: bytes, size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "content"
    path.write_bytes(bytes(size) + content)
    assert files.xxh3(path) == xxhash.xxh3_64_hexdigest(bytes(size) + content)


def test_what_a_killed_writer_left_goes_with_the_next_write_of_that_file(path: Path) -> None:
    """And nothing else: not another file's, not that of a writer that lives."""
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    living, here = os.getppid(), path.parent
    names = [f".tmp-{killed.pid}-{path.name}", f".tmp-{killed.pid}-other.txt", f".tmp-{living}-{path.name}"]
    for name in names:
        (here / name).touch()
    files.write_text(path, NEW)
    assert path.read_text() == NEW
    assert sorted(file.name for file in here.iterdir()) == sorted([path.name, *names[1:]])
