"""A collector of spans on loopback, which reads what it gets with OpenTelemetry's own protocol files."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.loopback import serving


@dataclass
class Collector:
    """``spans``: by name, in the order in which they came; ``resource``: who sent the last ones."""

    url: str = ""
    status: int = 200
    asked: list[str] = field(default_factory=list)
    spans: list[Any] = field(default_factory=list)
    resource: dict[str, str] = field(default_factory=dict)

    def named(self, name: str) -> list[Any]:
        return [span for span in self.spans if span.name == name]

    def take(self, path: str, body: bytes) -> None:
        self.asked.append(path)
        message = ExportTraceServiceRequest.FromString(body)
        for sent in message.resource_spans:
            self.resource = {each.key: each.value.string_value for each in sent.resource.attributes}
            self.spans += [span for scope in sent.scope_spans for span in scope.spans]


def attributes(span: Any) -> dict[str, Any]:
    """Its attributes as plain values."""
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


@contextmanager
def collector() -> Iterator[Collector]:
    """Listens on a free port of 127.0.0.1."""
    it = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if it.status == 200:
                it.take(self.path, body)
            self.send_response(it.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    it.url = f"http://127.0.0.1:{server.server_address[1]}"
    with serving(server):
        yield it
