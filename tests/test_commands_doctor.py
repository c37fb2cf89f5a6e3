"""`doctor`: each thing that can be out of order, put out of order."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from attention_transfer.commands import doctor
from attention_transfer.commands.doctor import Finding

ROOT = Path(__file__).parents[1]


def findings(params: Path) -> dict[str, Finding]:
    return {finding.about: finding for finding in doctor.examine(params)}


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a study in it, outside of any repository."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    values = yaml.safe_load((ROOT / "presets" / "smoke.yaml").read_text(encoding="utf-8"))
    Path("params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    Path("requirements.lock").write_text("", encoding="utf-8")
    return tmp_path


def change(**data: object) -> None:
    values = yaml.safe_load(Path("params.yaml").read_text(encoding="utf-8"))
    values["data"] |= data
    Path("params.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")


@pytest.mark.slow  # it imports torch
def test_here_all_is_in_order(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert doctor.show(Path("presets/smoke.yaml"), as_json=True) == 0
    found = {each["about"]: each for each in json.loads(capsys.readouterr().out)}
    assert list(found) == ["python", "packages", "computing", "git", "tracking", "params", "images", "disk"]
    assert {each["level"] for each in found.values()} == {"ok"}, found
    assert "torch" in found["computing"]["found"]


@pytest.mark.usefixtures("elsewhere")
def test_packages_are_compared_with_the_lock() -> None:
    here = metadata.version("numpy")
    lock = Path("requirements.lock")
    lock.write_text(f"# made by a tool\nnumpy=={here}\nno-such-thing==1.0 ; sys_platform == 'win32'\n")
    assert findings(Path("params.yaml"))["packages"].level == "ok"
    lock.write_text("numpy==0.1\n")
    found = findings(Path("params.yaml"))["packages"]
    assert (found.level, found.remedy) == ("note", doctor.INSTALL)
    assert f"numpy {here} (locked ==0.1)" in found.found
    lock.write_text("".join(f"no-such-thing-{n}==1.0\n" for n in range(7)))
    found = findings(Path("params.yaml"))["packages"]
    assert found.level == "problem"
    assert found.found.endswith("no-such-thing-4 and 2 more")
    lock.unlink()
    assert findings(Path("params.yaml"))["packages"].level == "note"


def test_another_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 14, 0))
    found = doctor._python()
    assert found.level == "problem"
    assert found.found.endswith("tested are 3.11 and 3.12")


@pytest.mark.usefixtures("elsewhere")
def test_without_a_repository_and_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no revision here" in findings(Path("params.yaml"))["git"].found
    monkeypatch.setenv("PATH", "")
    found = findings(Path("params.yaml"))["git"]
    assert (found.level, found.remedy) == ("note", "install git")


@pytest.mark.usefixtures("elsewhere")
def test_params_that_are_wrong_hide_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    change(sead=1)
    assert doctor.show(Path("params.yaml"), as_json=False) == 1
    text = capsys.readouterr().out
    assert "PROBLEM  params: params.yaml: data.sead: unknown key; did you mean 'seed'" in text
    assert "What to do: correct the keys named above" in text
    assert "ok       python" in text
    assert "images" not in text


@pytest.mark.usefixtures("elsewhere")
def test_images_in_folders() -> None:
    change(source="folder", folder="flowers")
    Path("flowers/train/daisy").mkdir(parents=True)
    found = findings(Path("params.yaml"))["images"]
    assert found.level == "problem"
    assert "flowers has no folder test" in found.found
    Path("flowers/test").mkdir()
    assert findings(Path("params.yaml"))["images"].level == "ok"


@pytest.mark.usefixtures("elsewhere")
def test_a_disk_that_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 10**6})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    found = findings(Path("params.yaml"))["disk"]
    assert found.level == "problem"
    assert "free" in found.remedy


@pytest.mark.usefixtures("elsewhere")
def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTENTION_TRANSFER_DEVICE", "abacus")
    found = findings(Path("params.yaml"))["computing"]
    assert found.level == "problem"
    assert found.remedy.startswith("set it to cpu")


@pytest.fixture
def server() -> Iterator[str]:
    """Answers as MLflow's server does when it is asked for its health."""

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Health) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()
        thread.join()


def test_a_server_that_answers_and_one_that_does_not(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{server}/")
    assert doctor._tracking() == Finding("tracking", "ok", f"{server}/ answers")
    for away in ("http://127.0.0.1:9", f"{server}/elsewhere"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", away)
        found = doctor._tracking()
        assert found.level == "note"
        assert found.remedy.endswith("python -m attention_transfer sync")


@pytest.mark.parametrize("package", ["pydantic", "torch", "packaging"])
def test_a_package_that_cannot_be_imported_is_named(package: str, elsewhere: Path) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None; sys.argv = ['attention-transfer', 'doctor']; "
        "from attention_transfer.__main__ import main; main()"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=elsewhere, capture_output=True, text=True, check=False
    )
    assert told.returncode == 1
    assert "a package is missing or broken" in told.stdout
    assert package in told.stdout
    assert told.stderr == ""
