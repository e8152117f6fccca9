"""A small Hugging Face Hub on this machine: the endpoints that creating, uploading and downloading a model use.

It knows one token, keeps everything in memory, and answers whatever else is asked with 404. Files ending in
.safetensors travel as large files, as they do on the Hub.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

TOKEN = "hf_of_this_test"
COMMIT = "0" * 40
MOST = 10 * 2**20
"""Bytes of a request; a longer one is refused."""


@dataclass
class Repository:
    """Files by path, and whether others may see them."""

    name: str
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass
class Hub:
    """What the server holds.

    Attributes:
        large: contents of large files by their SHA-256, of which a commit then names some.
        asked: method and path of every request.
        full: whether to refuse large files.
    """

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    full: bool = False

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> tuple[int, Any]:
        """Status and content: JSON, or bytes for a file."""
        self.asked.append(f"{method} {path}")
        if (found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/main/(.+)", path)) and method in ("GET", "HEAD"):
            return self._file(*found.groups(), token)
        if found := re.fullmatch(r"/large/([0-9a-f]{64})", path):  # an address that the server signed: without a token
            if self.full:
                return 507, {"error": "Insufficient storage"}
            self.large[found[1]] = body
            return (200, {}) if hashlib.sha256(body).hexdigest() == found[1] else (400, {"error": "another content"})
        if token != TOKEN:
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            front = json.loads(body)["content"].startswith("---\n")
            return (200, {"warnings": [], "errors": []}) if front else (400, {"errors": [{"message": "no metadata"}]})
        for pattern, action in (
            (r"/api/models/([^/]+/[^/]+)/preupload/main", self._modes),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            (r"/api/models/([^/]+/[^/]+)/commit/main", self._commit),
        ):
            if (found := re.fullmatch(pattern, path)) and found[1] in self.repositories:
                return action(self.repositories[found[1]], body)
        return 404, {"error": "not here"}

    def _file(self, name: str, path: str, token: str | None) -> tuple[int, Any]:
        repository = self.repositories.get(name)
        if repository is None or (repository.private and token != TOKEN) or path not in repository.files:
            return 404, {"error": "not here"}
        return 200, repository.files[path]

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked['organization']}/{asked['name']}"
        known = name in self.repositories
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.repositories.setdefault(name, Repository(name, private))
        return 409 if known else 200, {"url": f"{self.address}/{name}", "name": name}

    def _modes(self, _: Repository, body: bytes) -> tuple[int, Any]:
        paths = [file["path"] for file in json.loads(body)["files"]]
        kinds = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
        files = [{"path": path, "uploadMode": kind, "shouldIgnore": False, "oid": None} for path, kind in kinds.items()]
        return 200, {"files": files}

    def _batch(self, _: Repository, body: bytes) -> tuple[int, Any]:
        wanted = json.loads(body)["objects"]
        place = {one["oid"]: {"upload": {"href": f"{self.address}/large/{one['oid']}", "header": {}}} for one in wanted}
        return 200, {"transfer": "basic", "objects": [{**one, "actions": place[one["oid"]]} for one in wanted]}

    def _commit(self, repository: Repository, body: bytes) -> tuple[int, Any]:
        for line in body.decode().splitlines():
            told = json.loads(line)
            value = told["value"]
            if told["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif told["key"] == "lfsFile":
                repository.files[value["path"]] = self.large[value["oid"]]
        address = f"{self.address}/{repository.name}/commit/{COMMIT}"
        return 200, {"success": True, "commitOid": COMMIT, "commitUrl": address}


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that listens on the loopback device alone, at `hub.address`, until the context ends."""
    hub = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def respond(self) -> None:
            length = self._length()
            if length > MOST:
                self.send_error(413)
                return
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            path = self.path.partition("?")[0]
            status, content = hub.answer(self.command, path, self._body(length), token)
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Content-Type", "application/json" if data is not content else "application/octet-stream")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_HEAD = do_POST = do_PUT = respond

        def _length(self) -> int:
            return int(self.headers.get("Content-Length") or 0)

        def _body(self, length: int) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(length)
            parts: list[bytes] = []
            while (size := int(self.rfile.readline(), 16)) and sum(map(len, parts)) < MOST:
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def log_message(self, format: str, *arguments: Any) -> None: ...

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    hub.address = f"http://127.0.0.1:{listening.server_port}"
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        listening.shutdown()
        listening.server_close()
