"""`--push_to_hub` against a local server that speaks the hub's endpoints, through the real client.

Endpoints (huggingface_hub's HfApi): POST /api/repos/create; POST /api/validate-yaml; POST
/api/models/REPO/preupload/main; for files that are not regular, POST /REPO.git/info/lfs/objects/batch and PUT where it
says; POST /api/models/REPO/commit/main.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from runs import start

from vlft import hub
from vlft.cli import main
from vlft.errors import ModelError
from vlft.handover import export_model


class Hub:
    """What was asked of the server, and what it holds."""

    def __init__(self) -> None:
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.answer: int | None = None
        """An error that every request gets."""
        self.address = ""
        self.card = ""
        """README.md as it was sent to be checked."""


def _handler(state: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def _note_token(self) -> None:
            if "/me/" in self.path or "/repos/" in self.path:  # others are not about the repository
                state.tokens.add(self.headers.get("Authorization"))

        def _reply(self, content: dict[str, Any], code: int = 200) -> None:
            body = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                found = b""
                while size := int(self.rfile.readline(), 16):
                    found += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return found
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def do_POST(self) -> None:
            body = self._body()
            self._note_token()
            if state.answer:
                self._reply({"error": "no"}, state.answer)
            elif self.path == "/api/repos/create":
                state.created.append(json.loads(body))
                name = f"{json.loads(body).get('organization') or 'me'}/{json.loads(body)['name']}"
                self._reply({"url": f"{state.address}/{name}", "name": name})
            elif self.path == "/api/validate-yaml":
                state.card = json.loads(body)["content"]
                self._reply({"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                files = [
                    {"path": f["path"], "shouldIgnore": False,
                     "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                    for f in json.loads(body)["files"]
                ]  # fmt: skip
                self._reply({"files": files})
            elif self.path.endswith("/info/lfs/objects/batch"):
                made = [
                    {"oid": o["oid"], "size": o["size"],
                     "actions": {"upload": {"href": f"{state.address}/lfs/{o['oid']}"}}}
                    for o in json.loads(body)["objects"]
                ]  # fmt: skip
                self._reply({"transfer": "basic", "objects": made})
            elif "/commit/" in self.path:
                self._commit([json.loads(line) for line in body.splitlines() if line.strip()])
                self._reply({"commitUrl": f"{state.address}/me/x/commit/1", "commitOid": "1" * 40, "success": True})
            else:
                self._reply({"error": self.path}, 500)

        def do_PUT(self) -> None:
            body = self._body()
            assert self.path.split("/")[-1] == hashlib.sha256(body).hexdigest()
            state.objects[self.path.split("/")[-1]] = body
            self._reply({})

        def do_GET(self) -> None:
            self._note_token()
            self._reply({"error": "not found"}, state.answer or 404)

        def _commit(self, lines: list[dict[str, Any]]) -> None:
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    state.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    state.files[value["path"]] = state.objects[value["oid"]]

    return Handler


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    state = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(state)) as running:
        state.address = f"http://127.0.0.1:{running.server_address[1]}"
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        _point_at(state.address, monkeypatch)
        yield state
        running.shutdown()


def _point_at(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_ENDPOINT and HF_TOKEN do for a process that starts with them; the client has read its own by now."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def test_everything_arrives(server: Hub, run: Path, tmp_path: Path) -> None:
    """A process of its own, which finds the hub by HF_ENDPOINT as it would a mirror."""
    words = ["export", str(run), "--output_dir", str(tmp_path / "out"), "--max_shard_size", "300KB"]
    words += ["--push_to_hub", "me/charts", "--private"]
    hub_s = {"HF_ENDPOINT": server.address, "HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "0"}
    said = start(words, **hub_s, HF_HUB_DISABLE_XET="1").stdout
    assert f"pushed to {server.address}/me/charts." in said
    (asked,) = server.created
    assert (asked["name"], asked["organization"]) == ("charts", "me")
    assert asked.get("private") is True or asked.get("visibility") == "private"
    assert server.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert server.card == (tmp_path / "out" / "README.md").read_text()
    assert server.tokens == {"Bearer hf_secret"}


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (401, "the hub does not know the token; log in again with 'hf auth login'"),
        (403, r"the token may not write there \(the hub answered 403\); give a token with write permission"),
        (500, r"the hub answered 500 .*; try again"),
    ],
)
def test_the_hub_s_refusals(server: Hub, code: int, says: str, tmp_path: Path) -> None:
    server.answer = code
    again = rf"\(the folder itself is complete: 'hf upload me/charts {tmp_path} --private' uploads it as it is\)"
    with pytest.raises(ModelError, match=rf"was not pushed to me/charts: {says}.* {again}"):
        hub.push(tmp_path, "me/charts", private=True)


def test_what_cannot_be_pushed_is_not_written(server: Hub, run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The token is looked at before a model is loaded."""
    server.answer = 401
    with pytest.raises(ModelError, match=r"the hub does not know the token; .* \(nothing was written\)"):
        export_model(str(run), tmp_path / "out", push_to_hub="me/charts")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ModelError, match=r"there is no token; .* \(nothing was written\)"):
        export_model(str(run), tmp_path / "out", push_to_hub="me/charts")
    assert not (tmp_path / "out").exists()


def test_a_finished_folder_can_be_uploaded_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", str(run), "--output_dir", str(run.parent / "base"), "--push_to_hub", "me/charts"]
    assert main(words) == 2
    assert f"or upload what is there: 'hf upload me/charts {run.parent / 'base'}'" in capsys.readouterr().err


def test_no_token(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ModelError, match="there is no token; log in with 'hf auth login', or set HF_TOKEN"):
        hub.push(tmp_path, "me/charts", private=False)
    assert not server.tokens


def test_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _point_at("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(ModelError, match=r"http://127.0.0.1:9 cannot be reached .*; check the network and try again"):
        hub.push(tmp_path, "me/charts", private=False)


def test_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set; unset it"):
        hub.push(tmp_path, "me/charts", private=False)
