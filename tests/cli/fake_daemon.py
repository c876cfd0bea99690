"""A daemon's admin API on a Unix socket or a port, with answers from a table."""

from __future__ import annotations

import json
import socketserver
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from tests.loopback import serving


@dataclass
class FakeDaemon:
    """``answers``: "METHOD /path" -> (status, JSON or lines); every request is kept in ``seen``."""

    address: str
    answers: dict[str, tuple[int, Any]]
    seen: list[tuple[str, Any, dict[str, str]]] = field(default_factory=list)


class _Handler(BaseHTTPRequestHandler):
    daemon: FakeDaemon

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = f"{self.command} {self.path}"
        self.daemon.seen.append((asked, json.loads(body) if body else None, dict(self.headers)))
        missing = (404, {"error": {"message": f"no such route: {asked}", "code": "not_found"}})
        status, answer = self.daemon.answers.get(asked, missing)
        lines = answer if isinstance(answer, list) else [json.dumps(answer)]
        self.send_response(status)
        self.end_headers()
        for line in lines:
            self.wfile.write(line.encode() + b"\n")

    do_GET = do_POST = do_PUT = do_DELETE = _answer

    def address_string(self) -> str:
        return "client"

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def fake_daemon(answers: dict[str, tuple[int, Any]], path: Path | None = None) -> Iterator[FakeDaemon]:
    """Serves on ``path``, or on a free port of 127.0.0.1."""
    if path:
        server: socketserver.BaseServer = socketserver.ThreadingUnixStreamServer(str(path), _Handler)
        address = str(path)
    else:
        server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Handler)
        address = f"http://127.0.0.1:{server.server_address[1]}"
    daemon = FakeDaemon(address, answers)
    server.RequestHandlerClass = type("Handler", (_Handler,), {"daemon": daemon})
    with serving(server):
        yield daemon


GiB = 1 << 30


def model(name: str, state: str = "stopped", **over: Any) -> dict[str, Any]:
    """A model's line of the status."""
    line = {
        "name": name, "state": state, "level": 0, "devices": [], "memory": 0, "in_flight": 0, "queued": 0,
        "oldest_wait": None, "idle": None, "since": 5.0, "pinned": False, "leases": [], "waiting_for": "",
        "failure": "", "pid": None, "unit": "", "socket": "", "instance": "", "phase": "", "detail": "",
        "last_start_seconds": None, "power": None, "config": {"engine": "vllm", "model": name, "aliases": []},
        "replicas": [], "serving": int(state == "running"), "degraded": False, "health": "", "latency": None,
    }  # fmt: skip
    return {**line, **over}


def status(*models: dict[str, Any], **over: Any) -> dict[str, Any]:
    """The answer of ``GET /admin/status``."""
    device = {
        "index": 0,
        "memory": 80 * GiB,
        "reserve": GiB,
        "promised": 30 * GiB,
        "external": 0,
        "wedged": "",
        "drained": False,
    }
    about = {
        "version": "0.1.0", "pid": 77, "uptime": 3700.0, "policy": "adaptive", "opened": True,
        "configuration": {"files": ["/etc/vllmd/vllmd.yaml"], "error": ""}, "requests": 2, "connections": 3,
        "backend": "systemd", "source": "declared", "devices": [device],
        "host_memory": {"budget": 64 * GiB, "promised": 0}, "models": list(models),
    }  # fmt: skip
    return {**about, **over}
