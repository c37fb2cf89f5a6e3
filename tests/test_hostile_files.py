"""Files that carry code or lead elsewhere. Weights that are pickles: test_models_vit; the page: test_reporting_page."""

from __future__ import annotations

import ast
import json
import re
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from attention_transfer import config, lock_file, params_yaml
from attention_transfer.data import images, shifted
from attention_transfer.errors import StudyError
from attention_transfer.files import xxh3
from attention_transfer.reporting import figures
from attention_transfer.tracking import ui
from attention_transfer.training.checkpoint import Checkpoint

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("src", "pipeline") for path in (ROOT / folder).rglob("*.py"))


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (Path.touch, (self.trace,))


def refusal(call: ast.Call) -> str | None:
    """What is wrong with a call that might run what a file says, or write where an archive says."""
    text = ast.unparse(call)
    options = {option.arg: ast.unparse(option.value) for option in call.keywords}
    match ast.unparse(call.func):
        case "np.load" if options.get("allow_pickle") != "False":
            return text
        case "torch.load" if options.get("weights_only") != "True":
            return text
        case "yaml.load" if not text.endswith((", Loader)", ", Loader=yaml.CSafeLoader)")):
            return text
        case "eval" | "exec" | "os.system" | "torch.hub.load":
            return text
    parts = ast.unparse(call.func).split(".")
    risky = {"pickle", "joblib", "dill", "shelve", "marshal", "unpack_archive", "extractall", "unsafe_load"}
    return text if risky & set(parts) or options.get("shell") == "True" else None


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_call_runs_what_a_file_says_or_unpacks_an_archive(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert [found for found in map(refusal, calls) if found] == []


@pytest.mark.parametrize(
    "code",
    [
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, yaml.Loader)",
        "yaml.unsafe_load(text)",
        "pickle.load(file)",
        "tarfile.open(path).extractall()",
        "subprocess.run(command, shell=True)",
    ],
)
def test_such_a_call_would_be_found(code: str) -> None:
    (call, *_) = (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call))
    assert refusal(call)


@pytest.mark.parametrize("value", ["!!python/object/apply:os.mkdir [trace]", "!!python/name:os.mkdir"])
def test_yaml_makes_no_objects(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert issubclass(params_yaml.Loader, yaml.SafeLoader)
    assert issubclass(yaml.CSafeLoader, yaml.constructor.SafeConstructor)
    Path("params.yaml").write_text(f"name: {value}\n")
    with pytest.raises(StudyError, match="could not determine a constructor"):
        config.load("params.yaml")
    Path("dvc.lock").write_text(f"stages:\n  train: {{outs: {value}}}\n")
    with pytest.raises(StudyError, match="is damaged"):
        lock_file.mend("core")
    assert lock_file.outputs(Path("dvc.lock"), "train") == []
    assert not Path("trace").exists()


def test_a_checkpoint_that_is_a_pickle_is_refused(tmp_path: Path) -> None:
    """Its checksum is right, as an attacker's would be."""
    checkpoint, trace = Checkpoint(tmp_path / "f0"), tmp_path / "trace"
    checkpoint.save({"model": {}})
    payload = tmp_path / "payload"
    torch.save({"model": Evil(trace)}, payload)
    checkpoint.path.write_bytes(checkpoint._digest(payload.read_bytes()) + payload.read_bytes())
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        checkpoint.load()
    assert not trace.exists()


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    """As images, as a shifted set with its right checksum, and as a figure's pictures."""
    trace = tmp_path / "trace"
    evil = np.array([Evil(trace)], dtype=object)
    arrays = np.arange(4 * 64, dtype=np.uint8).reshape(4, 1, 8, 8)
    whole = images.ImageSet(arrays, np.zeros(4, np.int64))
    images.save(tmp_path / "data", "made up", ["a"], {"train": whole, "test": whole})
    np.save(tmp_path / "data" / "train_images.npy", evil, allow_pickle=True)
    with pytest.raises(StudyError, match="cannot be read"):
        images.load(tmp_path / "data", "train")

    np.savez(tmp_path / "fog-1.npz", images=evil, labels=evil, examples=evil)
    entry = {"fog-1": {"checksum": xxh3(tmp_path / "fog-1.npz")}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shifted, "manifest", lambda folder: entry)
        with pytest.raises((StudyError, ValueError), match="allow_pickle"):
            shifted.load(tmp_path, "fog-1")

    class Whole:
        def require_whole(self, path: Path, stage: str) -> None:
            pass

    with pytest.raises(StudyError, match="is damaged"):
        figures._images(Whole(), tmp_path / "fog-1.npz", "shifts", ("images",))  # type: ignore[arg-type]
    assert not trace.exists()


def test_servers_listen_on_this_machine_alone_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(ui, "connect", lambda root: None)
    monkeypatch.setattr(ui.os, "execve", lambda program, command, environment: started.append(command))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ui.serve(tmp_path, port=port)
    (command,) = started
    assert command[command.index("--host") + 1] == "127.0.0.1"
    text = (ROOT / "src" / "attention_transfer" / "__main__.py").read_text()
    assert re.findall(r'"--host", default="([^"]*)"', text) == ["127.0.0.1"]
    assert not [path for path in SOURCES if "0.0.0.0" in path.read_text()]


@pytest.mark.parametrize("entry", [{"path": "../../elsewhere"}, {"path": "/etc/passwd"}])
def test_a_lock_file_that_leads_elsewhere_removes_nothing_there(
    entry: dict[str, str], tmp_path: Path
) -> None:
    """What `remake` removes is named by its digest; a digest is no way out of DVC's cache."""
    lock = tmp_path / "dvc.lock"
    stages = {"train": {"outs": [{**entry, "md5": "../../../evil"}, {**entry, "md5": 7}, entry]}}
    lock.write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))
    assert lock_file.outputs(lock, "train") == []


@pytest.mark.parametrize("entry", ["outs", {"outs": "file"}, {"outs": [["file"]]}, {"outs": 7}, None])
def test_a_lock_file_of_another_form_is_an_error_that_names_it(entry: object, tmp_path: Path) -> None:
    lock = tmp_path / "dvc.lock"
    lock.write_text(yaml.safe_dump({"schema": "2.0", "stages": {"train": entry}}))
    with pytest.raises(StudyError, match="not written as DVC writes them") as told:
        lock_file.outputs(lock, "train")
    assert str(lock) in str(told.value)


def test_a_sealed_list_of_dvc_leads_nowhere_else(tmp_path: Path) -> None:
    from attention_transfer.commands.remake import _members

    digest = "ab" + "0" * 30 + ".dir"
    (tmp_path / "ab").mkdir()
    (tmp_path / "ab" / digest[2:]).write_text(json.dumps([{"md5": "../../evil"}, {"md5": "c" * 32}]))
    assert list(_members(tmp_path, digest)) == ["c" * 32]
