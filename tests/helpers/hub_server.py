"""A local hub for the tests: serves a folder `<org>/<name>/<files>` the way the Hugging Face hub does, faults on request.

    with HubServer(root) as server:
        server.fail("gated", path="params", times=1)
        subprocess.run(..., env={**os.environ, **server.environment(home)})

It speaks HEAD and GET of /<repo>/resolve/<revision>/<file> with ETag, X-Repo-Commit, X-Linked-Etag and Range, the tree listing and
the repository's information, on 127.0.0.1.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FAULTS = ("401", "gated", "403", "404", "429", "500", "truncated", "cut", "checksum")
_LARGE = 1024  # the hub keeps larger binary files by their sha256


@dataclass
class Fault:
    """What goes wrong, for which paths, how many more times (None: always)."""

    kind: str
    path: str = ""
    times: int | None = None
    method: str | None = None


@dataclass
class HubServer:
    """A hub on 127.0.0.1 that serves `root` until the `with` block ends."""

    root: Path
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    """Every request seen, `METHOD path`."""
    n_bytes: int = 0
    """Body bytes sent."""

    def __enter__(self) -> HubServer:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, home: Path) -> dict[str, str]:
        """Environment of a process that should see this hub and no other, with its cache in `home`."""
        return {
            "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1", "HF_HUB_ETAG_TIMEOUT": "3", "HF_HUB_DOWNLOAD_TIMEOUT": "3",
        }  # fmt: skip

    def fail(self, kind: str, path: str = "", times: int | None = None, method: str | None = None) -> None:
        """From now on, requests whose path contains `path` meet this fault."""
        assert kind in FAULTS, kind
        self.faults.append(Fault(kind, path, times, method))

    def heal(self) -> None:
        """Take every fault away."""
        self.faults.clear()

    def fault_for(self, method: str, path: str) -> str | None:
        for fault in self.faults:
            if fault.path in path and fault.method in (None, method) and fault.times != 0:
                if fault.times is not None:
                    fault.times -= 1
                return fault.kind
        return None


def etag(data: bytes) -> str:
    """sha256 for large files, git's blob sha1 for small ones, as the hub does."""
    if len(data) > _LARGE:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            hub.requests.append(f"{self.command} {path}")
            fault = hub.fault_for(self.command, path)
            if fault in ("401", "gated", "403", "404", "429", "500"):
                self._refuse(fault)
            elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self._send_file(match[1], match[3], body, fault)
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path):
                self._send_json(_tree(hub.root / match[1], match[3] or ""))
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
                self._send_info(match[1])
            else:
                self._refuse("404")

        def _send_file(self, repo: str, name: str, body: bool, fault: str | None) -> None:
            file = hub.root / repo / name
            if not (hub.root / repo).is_dir():
                return self._refuse("401")
            if ".." in name or not file.is_file():
                return self._refuse("404")
            data = file.read_bytes()
            start, stop = self._range(len(data))
            self.send_response(206 if "Range" in self.headers else 200)
            for key, value in _file_headers(data).items():
                self.send_header(key, value)
            if "Range" in self.headers:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
            content = data[start:stop]
            if fault == "checksum" and body:
                content = bytes(byte ^ 0xFF for byte in content[:64]) + content[64:]
            if fault == "truncated" and body:
                content = content[: len(content) // 2]
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self._send_body(content, cut=fault == "cut")

        def _send_body(self, content: bytes, cut: bool) -> None:
            if cut:
                content = content[: len(content) // 2]
                self.close_connection = True
            hub.n_bytes += len(content)
            self.wfile.write(content)
            self.wfile.flush()

        def _range(self, size: int) -> tuple[int, int]:
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if match is None:
                return 0, size
            return int(match[1]), min(int(match[2]) + 1, size) if match[2] else size

        def _send_info(self, repo: str) -> None:
            if not (hub.root / repo).is_dir():
                return self._refuse("401")
            names = [
                {"rfilename": entry["path"]}
                for entry in _tree(hub.root / repo, "")
                if entry["type"] == "file"
            ]
            self._send_json({"_id": "0", "id": repo, "modelId": repo, "sha": COMMIT, "siblings": names,
                             "private": False, "gated": False, "disabled": False, "tags": [], "downloads": 0,
                             "likes": 0})  # fmt: skip

        def _send_json(self, value: object) -> None:
            content = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def _refuse(self, kind: str) -> None:
            code, error = {
                "401": (401, "RepoNotFound"), "gated": (403, "GatedRepo"), "403": (403, ""),
                "404": (404, "EntryNotFound"), "429": (429, ""), "500": (500, ""),
            }[kind]  # fmt: skip
            self.send_response(code)
            if error:
                self.send_header("X-Error-Code", error)
                self.send_header("X-Error-Message", f"{error}: refused by the test hub")
            if kind == "404":
                self.send_header("X-Repo-Commit", COMMIT)
            if kind == "429":
                self.send_header("Retry-After", "1")
            self.send_header("Content-Length", "0")
            self.end_headers()

    return Handler


def _file_headers(data: bytes) -> dict[str, str]:
    headers = {"ETag": f'"{etag(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
    if len(data) > _LARGE:
        headers |= {"X-Linked-Etag": f'"{etag(data)}"', "X-Linked-Size": str(len(data))}
    return headers


def _tree(repo: Path, under: str) -> list[dict[str, Any]]:
    entries = []
    for path in sorted((repo / under).rglob("*")):
        name = path.relative_to(repo).as_posix()
        if path.is_dir():
            entries.append({"type": "directory", "path": name, "oid": COMMIT, "size": 0})
        else:
            data = path.read_bytes()
            entry = {"type": "file", "path": name, "oid": etag(data), "size": len(data)}
            if len(data) > _LARGE:
                entry["lfs"] = {"oid": etag(data), "size": len(data), "pointerSize": 134}
            entries.append(entry)
    return entries
