"""Stand-ins for S's servers: OpenAI's protocol on a port of the loopback, answers after exactly so long.

S is the choice of the fastest server: CONTRIBUTING.md, The five documents.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.engines.installed import Site

LIMIT = 60.0  # seconds that only a defect exceeds


@dataclass
class Stub:
    """One server: it waits ``delay`` seconds before each answer; ``seen`` are the bodies of all that it was asked."""

    delay: float = 0.0
    url: str = ""
    failing: bool = False  # answers 503 to everything that it is asked
    seen: list[dict[str, Any]] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    connections: set[socket.socket] = field(default_factory=set)
    server: ThreadingHTTPServer | None = None

    @property
    def asked(self) -> int:
        """How many requests it got, probes left out."""
        return len([body for body in self.seen if "Say hi." not in json.dumps(body)])

    def begin(self, port: int = 0) -> None:
        """Listen; on the ``port`` that it had, if it was there before."""
        self.server = _Server(("127.0.0.1", port), type("Handler", (_Handler,), {"stub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}).start()

    def die(self) -> None:
        """As when its process is killed: nobody listens, and every connection breaks off."""
        if self.server:
            self.server.shutdown()
            self.server.server_close()
            self.server = None
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def rise(self) -> None:
        """Be there again."""
        self.begin(int(self.url.rpartition(":")[2]))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stub: Stub

    def setup(self) -> None:
        super().setup()
        self.stub.connections.add(self.connection)

    def finish(self) -> None:
        self.stub.connections.discard(self.connection)
        super().finish()

    def do_GET(self) -> None:
        self._answer(200, {"object": "list", "data": []})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.stub.seen.append(body)
        self.stub.over.wait(self.stub.delay)
        if self.stub.failing:
            self._answer(503, {"error": {"message": "it is failing"}})
        elif self.path.endswith("/embeddings"):
            self._answer(200, {"object": "list", "data": [{"index": 0, "embedding": [0.5, 0.25]}]})
        else:
            told = {"role": "assistant", "content": f"by {self.stub.url}"}
            self._answer(200, {"object": "chat.completion", "choices": [{"index": 0, "message": told}]})

    def _answer(self, status: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is no error."""


@contextmanager
def stubs(*delays: float) -> Iterator[list[Stub]]:
    """So many servers, until the end of the block."""
    with ExitStack() as ended:
        yield [ended.enter_context(_running(Stub(delay))) for delay in delays]


@contextmanager
def _running(stub: Stub) -> Iterator[Stub]:
    stub.begin()
    try:
        yield stub
    finally:
        stub.over.set()
        stub.die()


def lists(*servers: Stub, names: tuple[str, ...] = ("fast", "slow", "third"), **rules: Any) -> dict[str, Any]:
    """A model that is these servers."""
    of = [{"name": name, "options": {"url": server.url}} for name, server in zip(names, servers, strict=False)]
    return {"engine": "remote", "replicas": {"of": of, **rules}}


def config(**models: dict[str, Any]) -> dict[str, Any]:
    """A configuration of these models."""
    return {"server": {"idle_exit": "never"}, "models": models}


def replica(site: Site, name: str) -> dict[str, Any]:
    """The line of a replica."""
    return next(line for line in site.view(name.partition("@")[0])["replicas"] if line["name"] == name)


def until(happened: Callable[[], object]) -> None:
    """Wait for what another process does."""
    deadline = time.monotonic() + LIMIT
    while not happened():
        assert time.monotonic() < deadline, f"not within {LIMIT} s"
        time.sleep(0.02)
