"""DVC's lock file, cut off at every place where a kill can cut it."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from dvc.schema import COMPILED_LOCKFILE_SCHEMA

from attention_transfer import lock_file
from attention_transfer.errors import StudyError

STAGES = {
    f"train@copy-{seed}": {
        "cmd": f"python pipeline/train.py --run copy --seed {seed}",
        "deps": [{"path": "pipeline/train.py", "hash": "md5", "md5": f"{seed}" * 32, "size": 10}],
        "params": {"params.yaml": {"runs.copy": {"learning_rate": 0.1, "layers": [0, 1]}}},
        "outs": [{"path": f"runs/core/students/copy/{seed}", "md5": f"{seed}" * 32 + ".dir", "nfiles": 2}],
    }
    for seed in range(3)
}
TEXT = yaml.safe_dump({"schema": "2.0", "stages": STAGES}, sort_keys=False)
LINES = [place.end() for place in re.finditer("\n", TEXT)]
CUTS = sorted({size for end in [0, *LINES] for size in (end - 1, end, end + 3) if 0 <= size < len(TEXT)})


@pytest.fixture(autouse=True)
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a whole lock file, of which a stage has kept a copy."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.delenv("DVC_EXP_NAME", raising=False)
    monkeypatch.setenv("DVC_STAGE", "train@copy-2")
    Path("dvc.lock").write_text(TEXT)
    lock_file.keep("core")
    return tmp_path


def stages() -> dict[str, object]:
    found: dict[str, object] = yaml.safe_load(Path("dvc.lock").read_text())["stages"]
    return found


def test_a_lock_file_that_is_cut_off_anywhere_is_made_whole() -> None:
    for size in CUTS:
        Path("dvc.lock").write_text(TEXT[:size])
        assert lock_file.mend("core") > 0, TEXT[:size]
        assert stages() == STAGES, TEXT[:size]
        assert lock_file.mend("core") == 0


def test_of_an_entry_that_was_being_added_a_part_that_dvc_would_refuse_is_dropped() -> None:
    """No copy has this entry yet: its stage runs again. What remains must be what DVC itself accepts."""
    copy = yaml.safe_dump(
        {"schema": "2.0", "stages": {n: e for n, e in STAGES.items() if n != "train@copy-2"}}
    )
    for size in (cut for cut in CUTS if cut > TEXT.index("train@copy-2")):
        Path(".ckpt/core/dvc.lock").write_text(copy)
        Path("dvc.lock").write_text(TEXT[:size])
        lock_file.mend("core")
        COMPILED_LOCKFILE_SCHEMA(yaml.safe_load(Path("dvc.lock").read_text()))
        assert stages().keys() >= {"train@copy-0", "train@copy-1"}
        assert lock_file.mend("core") == 0


def test_a_whole_lock_file_is_left_as_it_is() -> None:
    before = Path("dvc.lock").stat().st_ino
    assert lock_file.mend("core") == 0
    assert (Path("dvc.lock").stat().st_ino, Path("dvc.lock").read_text()) == (before, TEXT)


def test_a_lock_file_that_is_gone_comes_back() -> None:
    Path("dvc.lock").unlink()
    assert lock_file.mend("core") == len(STAGES)
    assert stages() == STAGES


def test_what_was_cut_off_is_not_kept_and_what_was_added_is() -> None:
    Path("dvc.lock").write_text(TEXT[: len(TEXT) // 2])
    lock_file.keep("core")
    assert lock_file.mend("core") > 0
    assert stages() == STAGES
    more = {**STAGES, "report": {"cmd": "python pipeline/report.py"}}
    Path("dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": more}, sort_keys=False))
    lock_file.keep("core")
    Path("dvc.lock").write_text("")
    assert lock_file.mend("core") == len(more)
    assert stages() == more


def test_entries_of_stages_that_ran_since_the_copy_stay() -> None:
    """The copy is of the last stage's beginning: what that stage wrote is not in it."""
    newer = {"data": {"cmd": "python pipeline/data.py"}, **STAGES}
    del newer["train@copy-2"]
    Path("dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": newer}))
    assert lock_file.mend("core") == 1
    assert stages() == {**newer, **STAGES}


@pytest.mark.parametrize(("place", "mended"), [(".", False), ("runs", False), ("..", True)])
def test_nothing_is_mended_under_a_dvc_that_works_here(place: str, mended: bool, repository: Path) -> None:
    Path("dvc.lock").write_text(TEXT[: len(TEXT) // 2])
    Path("runs").mkdir()
    program = repository / "dvc"
    program.write_text("import time\ntime.sleep(60)\n")
    with subprocess.Popen([sys.executable, program, "repro"], cwd=repository / place) as running:
        while not psutil.Process(running.pid).cmdline():  # empty for a moment after it was started
            time.sleep(0.01)
        assert bool(lock_file.mend("core")) == mended
        running.kill()
    if not mended:
        assert lock_file.mend("core") > 0


@pytest.mark.parametrize(("content", "left"), [("", False), ('{"read": {"/x": [{"pi', False), ("{}", True)])
def test_half_a_note_of_locks_goes_and_a_whole_one_stays(content: str, left: bool) -> None:
    note = Path(".dvc/tmp/rwlock")
    note.parent.mkdir(parents=True)
    note.write_text(content)
    lock_file.mend("core")
    assert note.exists() == left


@pytest.mark.parametrize(("entry", "left"), [("recorded", False), ("of another result", True)])
def test_checkpoints_go_when_their_result_is_in_the_lock_file(entry: str, left: bool) -> None:
    record, done = Path("metrics/run.json"), Path(".ckpt/core/train-copy-0-f0/done")
    for path in (record, done):
        path.parent.mkdir(parents=True)
    record.write_text("result")
    done.write_text(str(record))
    digest = hashlib.md5(b"result" if entry == "recorded" else b"other").hexdigest()
    Path("dvc.lock").write_text(f"stages:\n  train@copy-0:\n    outs:\n    - md5: {digest}\n")
    lock_file.forget_checkpoints("core")
    assert done.parent.exists() == left


def test_damage_without_a_copy_is_named() -> None:
    Path(".ckpt/core/dvc.lock").unlink()
    Path("dvc.lock").write_text("stages: [")
    with pytest.raises(StudyError, match="is damaged") as caught:
        lock_file.mend("core")
    assert caught.value.where == "dvc.lock"


@pytest.mark.parametrize(("variable", "value"), [("DVC_EXP_NAME", "muddy-wolf"), ("DVC_STAGE", None)])
def test_experiments_and_scripts_by_hand_keep_no_copy(
    variable: str, value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(".ckpt/core/dvc.lock").unlink()
    if value is None:
        monkeypatch.delenv(variable)
    else:
        monkeypatch.setenv(variable, value)
    lock_file.keep("core")
    assert not Path(".ckpt/core/dvc.lock").exists()


def test_a_study_with_a_graph_of_its_own_has_its_own_lock_file() -> None:
    Path("studies/smoke").mkdir(parents=True)
    assert lock_file.path("smoke") == Path("dvc.lock")
    Path("studies/smoke/dvc.yaml").touch()
    assert lock_file.path("smoke") == Path("studies/smoke/dvc.lock")
