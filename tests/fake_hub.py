"""A Hugging Face hub on this machine, as far as publishing a model needs one; it keeps what it is sent."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import huggingface_hub
import pytest

TOKEN = "hf_tokenforthetests"


class Hub:
    """The hub's state: ``repos`` by id, each with its files and whether it is private; ``asked``, the requests."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Any]] = {}
        self.asked: list[str] = []
        self.status = 0  # answers everything that writes with this status, if it is one

    def add(self, repo: str, private: bool = False, **files: bytes) -> None:
        self.repos[repo] = {"private": private, "files": dict(files)}

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, Any]:
        self.asked.append(f"{method} {path}")
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials"}
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "alice", "orgs": [{"name": "lab"}]}
        if path == "/api/validate-yaml":
            return 200, {"warnings": [], "errors": []}
        if method == "POST" and self.status:
            return self.status, {"error": "no"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.add(
                repo if "/" in repo else f"alice/{repo}",
                bool(asked.get("private")) or asked.get("visibility") == "private",
            )
            return 200, {"url": f"https://huggingface.co/{repo}"}
        repo, _, action = path.removeprefix("/api/models/").replace("/preupload/", "|preupload/").replace(
            "/commit/", "|commit/").partition("|")  # fmt: skip
        if repo not in self.repos:
            return 404, {"error": "Repository not found"}
        if action.startswith("preupload/"):
            files = [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in
                     json.loads(body)["files"]]  # fmt: skip
            return 200, {"files": files}
        if action.startswith("commit/"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.repos[repo]["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {"commitUrl": f"https://huggingface.co/{repo}/commit/1", "commitOid": "1" * 40, "success": True}
        held = self.repos[repo]
        siblings = [{"rfilename": name} for name in held["files"]]
        return 200, {"_id": "1", "id": repo, "private": held["private"], "siblings": siblings, "downloads": 0,
                     "likes": 0, "tags": [], "sha": "1" * 40}  # fmt: skip


@contextmanager
def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that huggingface_hub talks to instead of the real one, as the user alice of the organisation lab."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            status, content = hub.answer(self.command, path, self.headers.get("Authorization", ""), body)
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = _do

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
