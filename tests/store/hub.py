"""A hub on loopback, as far as huggingface_hub asks one: the list of a repository's files, and the files.

Large files are behind a redirect and come by ranges, as the hub's do. What goes wrong is a field of ``Hub``.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.loopback import serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 10_000  # bytes from which on a file is one of LFS here


@dataclass
class Hub:
    """``repositories``: name -> file -> bytes. ``seen``: every request, with its range.

    ``cut``: a large file's connection is closed after so many bytes, once for each that is left in ``cuts``.
    ``status``: repository -> what every request for it is answered, with an X-Error-Code. ``false``: files whose bytes
    are not those that the list says. ``longer``: files of which more bytes come than it says. ``gate``: cleared, large
    files wait before their last byte.
    """

    repositories: dict[str, dict[str, bytes]]
    url: str = ""
    seen: list[str] = field(default_factory=list)
    cut: int = 0
    cuts: int = 0
    status: dict[str, tuple[int, str]] = field(default_factory=dict)
    false: set[str] = field(default_factory=set)
    longer: set[str] = field(default_factory=set)
    gate: threading.Event = field(default_factory=threading.Event)
    extra: list[dict[str, Any]] = field(default_factory=list)  # more entries of every list

    def listed(self, repository: str) -> dict[str, Any]:
        """What the API says of it."""
        siblings = [*self.extra]
        for name, data in self.repositories[repository].items():
            one: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": git_hash(data)}
            if len(data) >= LARGE:
                one["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            siblings.append(one)
        return {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings, "private": False,
                "gated": False, "disabled": False, "downloads": 1, "likes": 1, "tags": []}  # fmt: skip


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.seen.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.+)?", path):
            if self._allowed(found[1]):
                self._answer(200, json.dumps(self.hub.listed(found[1])).encode(), "application/json")
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if self._allowed(found[1]):
                self._file(found[1], found[3])
        elif found := re.fullmatch(r"/lfs/([^/]+/[^/]+)/(.+)", path):
            self._large(found[2], self.hub.repositories[found[1]][found[2]])
        else:
            self._answer(404, b"{}", "application/json")

    do_HEAD = do_GET

    def _allowed(self, repository: str) -> bool:
        if repository not in self.hub.repositories:
            self._answer(404, b"{}", "application/json", ("X-Error-Code", "RepoNotFound"))
            return False
        if repository in self.hub.status:
            status, code = self.hub.status[repository]
            self._answer(status, b"{}", "application/json", ("X-Error-Code", code), ("X-Error-Message", code))
            return False
        return True

    def _file(self, repository: str, name: str) -> None:
        data = self.hub.repositories[repository].get(name)
        if data is None:
            self._answer(404, b"", "text/plain", ("X-Error-Code", "EntryNotFound"))
        elif len(data) >= LARGE:
            self._answer(302, b"", "text/plain", ("Location", f"{self.hub.url}/lfs/{repository}/{name}"),
                         ("X-Repo-Commit", COMMIT), ("X-Linked-Size", str(len(data))),
                         ("X-Linked-Etag", f'"{hashlib.sha256(data).hexdigest()}"'))  # fmt: skip
        else:
            self._answer(200, data, "text/plain", ("X-Repo-Commit", COMMIT), ("ETag", f'"{git_hash(data)}"'))

    def _large(self, name: str, data: bytes) -> None:
        if name in self.hub.false:
            data = bytes(len(data))
        if name in self.hub.longer:
            data = data * 8
        begin = int(m[1]) if (m := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")) else 0
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(data) - begin))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        body = data[begin:]
        if self.hub.cuts > 0:
            self.hub.cuts -= 1
            self.wfile.write(body[: self.hub.cut])
            self.close_connection = True
            return
        with suppress(ConnectionError):  # who fetches may have had enough of it
            self.wfile.write(body[:-1])
            self.wfile.flush()
            self.hub.gate.wait(60)
            self.wfile.write(body[-1:])

    def _answer(self, status: int, body: bytes, kind: str, *fields: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(body))), *fields):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def hub(repositories: dict[str, dict[str, bytes]], **over: Any) -> Iterator[Hub]:
    """Serves on a free port of 127.0.0.1; its gate is open."""
    it = Hub(repositories, **over)
    it.gate.set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": it}))
    it.url = f"http://127.0.0.1:{server.server_address[1]}"
    with serving(server):
        try:
            yield it
        finally:
            it.gate.set()


if __name__ == "__main__":  # in a container: PORT, then NAME=FILE of each repository's one file
    import sys
    from pathlib import Path

    served = {}
    for word in sys.argv[2:]:
        name, _, path = word.partition("=")
        served[name] = {Path(path).name: Path(path).read_bytes(), "README.md": b"x"}
    alone = Hub(served, f"http://127.0.0.1:{sys.argv[1]}")
    alone.gate.set()
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), type("Handler", (_Handler,), {"hub": alone})).serve_forever()
