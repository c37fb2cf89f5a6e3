"""Uploads, to a hub that is served here: the few calls that huggingface_hub makes, over HTTP."""

from __future__ import annotations

import base64
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from attention_transfer.errors import StudyError
from attention_transfer.exporting import hub

TOKEN, REPOSITORY = "hf_of_a_test", "someone/flowers-distill"


@dataclass
class Hub:
    """What the served hub holds, and what it was asked for.

    Attributes:
        visibility: by repository.
        files: content by repository and path, of its only branch.
        complaint: about every model card, if any.
    """

    visibility: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    complaint: str | None = None

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """Status and JSON of a call."""
        self.calls.append(path)
        parts = path.removeprefix("/api/").split("/")
        if parts == ["repos", "create"]:
            return self.create(json.loads(body))
        if parts == ["validate-yaml"]:
            errors = [] if self.complaint is None else [{"message": self.complaint}]
            return 400 if errors else 200, {"errors": errors, "warnings": []}
        name, call = "/".join(parts[1:3]), parts[3:]
        if name not in self.visibility:
            return 404, {"error": "Repository not found"}
        if call == ["preupload", "main"]:
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            return 200, {"files": [{"path": file["path"], **modes} for file in json.loads(body)["files"]]}
        if call == ["commit", "main"]:
            return self.commit(name, [json.loads(line) for line in body.splitlines()])
        assert call == [], path
        return 200, {"id": name, "private": self.visibility[name] == "private", "siblings": []}

    def create(self, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        name = f"{asked['organization']}/{asked['name']}"
        status = 409 if name in self.visibility else 200
        self.visibility.setdefault(name, asked["visibility"])
        return status, {"url": f"{constants.ENDPOINT}/{name}"}

    def commit(self, name: str, lines: list[dict[str, Any]]) -> tuple[int, dict[str, Any]]:
        held = self.files.setdefault(name, {})
        for value in (line["value"] for line in lines if line["key"] == "file"):
            held[value["path"]] = base64.b64decode(value["content"])
        return 200, {"commitOid": "0" * 40, "commitUrl": f"{constants.ENDPOINT}/{name}/commit/{'0' * 40}"}


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    held = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            refused = 401, {"error": "Invalid username or password."}
            status, told = held.answer(self.path.partition("?")[0], body) if known else refused
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            content = json.dumps(told).encode()
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield held
        server.shutdown()
        thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "distill-0"
    made.mkdir()
    (made / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(bytes(range(256)))
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_file_comes_in_and_nobody_else_may_read_them(served: Hub, folder: Path) -> None:
    hub.require(REPOSITORY)
    assert hub.upload(folder, REPOSITORY, public=False).endswith(REPOSITORY)
    assert served.visibility == {REPOSITORY: "private"}
    assert served.files == {REPOSITORY: contents(folder)}
    (folder / "config.json").write_text('{"a": 1}')
    hub.upload(folder, REPOSITORY, public=False)
    assert served.files == {REPOSITORY: contents(folder)}


def test_public_is_said_and_never_found(served: Hub, folder: Path) -> None:
    hub.upload(folder, REPOSITORY, public=True)
    assert served.visibility == {REPOSITORY: "public"}
    before = dict(served.files[REPOSITORY])
    (folder / "config.json").write_text("not for everyone")
    with pytest.raises(StudyError, match=r"(?s)anyone may read it.*--public"):
        hub.upload(folder, REPOSITORY, public=False)
    assert served.files[REPOSITORY] == before


def test_a_token_that_the_hub_does_not_know(
    served: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(StudyError, match=r"(?s)could not be uploaded: .*hf auth whoami.*hf upload"):
        hub.upload(folder, REPOSITORY, public=False)
    assert served.calls == []


def test_a_card_that_the_hub_refuses(served: Hub, folder: Path) -> None:
    served.complaint = '"license" must be one of [mit, apache-2.0]'
    with pytest.raises(StudyError, match=r"could not be uploaded: .*"):
        hub.upload(folder, REPOSITORY, public=False)
    assert served.files == {}


def test_a_hub_that_is_away(served: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    with pytest.raises(StudyError, match=r"(?s)could not be uploaded: .*is whole, and can be uploaded later"):
        hub.upload(folder, REPOSITORY, public=False)


def test_without_a_token_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(
        StudyError, match=r"(?s)no token of the Hugging Face hub.*hf auth login; or set HF_TOKEN"
    ):
        hub.require(REPOSITORY)


@pytest.mark.parametrize("name", ["flowers", "a/b/c", "someone/", "some one/flowers", "someone/x--y"])
def test_what_is_no_repository(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(StudyError, match=r"is no name of a repository(.|\n)*OWNER/NAME"):
        hub.require(name)
