"""Spans of requests for OpenTelemetry, sent to a collector by OTLP over HTTP.

A request's times are known when it has ended, and only then are its spans made, in a thread, from what the ring keeps
of it (``ring.Entry``). On its way a request gets three words, ``Trace``, and the engine a ``traceparent`` that makes
its spans children of ours. A collector that is slow or gone costs spans, which are counted, and nothing else.

====================  =============================================================================================
the request           from its last byte to the last byte of its answer; child of the client's span if it named one
``queue``             until an engine was there for it, less the load
``load``              of that time what the engine took to start or wake
``first byte``        from then to the first byte of the answer; the engine's reading of the prompt is in it
``answer``            from there to the end
====================  =============================================================================================

OpenTelemetry's packages are optional (``config.checks.without_otlp``). Their own variables hold for what is not said
here: the fields that a collector wants (``OTEL_EXPORTER_OTLP_HEADERS``), certificates, what the service is called
(``OTEL_SERVICE_NAME``, ``OTEL_RESOURCE_ATTRIBUTES``).
"""

from __future__ import annotations

import logging
import os
import queue
import random
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import vllmd
from vllmd.proxy.account import Trace
from vllmd.proxy.http import Request
from vllmd.records.ring import Entry, failed
from vllmd.systemd.throttle import Repeated

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan

log = logging.getLogger("vllmd.records")

PATH = "/v1/traces"
MOST_WAITING = 2048  # requests whose spans have not been sent
BATCH, GATHER = 256, 1.0  # requests that are sent at once, and the seconds in which they gather
LEAVE = 2.0  # seconds that the daemon's end waits for the last ones
EXPORT = 5.0  # seconds for a batch, tries included
TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
NS = 1_000_000_000


class Spans:
    """Begins traces, and sends what has ended from a thread that sleeps while nothing ends."""

    def __init__(self, endpoint: str, share: float) -> None:
        """``share``: of the requests whose client does not trace, 0.0 to 1.0."""
        self.endpoint, self.share = endpoint, share
        self.sent = self.dropped = 0  # requests
        self._waiting: queue.SimpleQueue[tuple[Entry, Trace] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._trouble = Repeated(log)

    def begin(self, request: Request) -> Trace | None:
        """The trace of a request that has just arrived; None if its spans are not to be sent.

        A client that sends a ``traceparent`` has decided that already (its flag ``sampled``); for others chance
        decides.
        """
        named = parent_of(request.headers.get("traceparent"))
        if named is not None:
            trace_id, parent, sampled = named
            return Trace(trace_id, new_id(8), parent) if sampled else None
        return Trace(new_id(16), new_id(8), "") if random.random() < self.share else None

    def note(self, entry: Entry, trace: Trace) -> None:
        """Have the spans of a request that has ended sent, unless too many wait."""
        if self._waiting.qsize() >= MOST_WAITING:
            self.dropped += 1
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._send_all, name="spans", daemon=True)
            self._thread.start()
        self._waiting.put((entry, trace))

    def close(self) -> None:
        """Send what waits, within ``LEAVE`` seconds: a collector that does not answer holds nothing up."""
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join(LEAVE)

    # -- in the thread

    def _send_all(self) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import SpanExportResult

        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # each failure would be logged twice
        url = self.endpoint.rstrip("/")
        exporter = OTLPSpanExporter(url if url.endswith(PATH) else url + PATH, timeout=EXPORT)
        resource = _resource()
        for batch in self._batches():
            try:
                result = exporter.export([span for each in batch for span in spans_of(*each, resource)])
                why = "" if result is SpanExportResult.SUCCESS else "it did not take them"
            except Exception as error:  # whatever the package raises costs these spans only
                why = f"{type(error).__name__}: {error}"
            if why:
                self.dropped += len(batch)
                self._trouble.say(logging.WARNING, "spans cannot be sent to %s: %s", self.endpoint, why)
            else:
                self.sent += len(batch)
                self._trouble.over()
        exporter.shutdown()  # type: ignore[no-untyped-call]

    def _batches(self) -> Iterator[list[tuple[Entry, Trace]]]:
        """The requests that have ended, in batches, until ``close``."""
        over = False
        while not over:
            batch: list[tuple[Entry, Trace]] = []
            until = None
            while len(batch) < BATCH:
                try:
                    more = self._waiting.get(timeout=None if until is None else max(0.0, until - time.monotonic()))
                except queue.Empty:
                    break
                if more is None:
                    over = True
                    break
                batch.append(more)
                until = until or time.monotonic() + GATHER
            if batch:
                yield batch


def parent_of(field: str) -> tuple[str, str, bool] | None:
    """Trace, span and whether it is recorded, of a ``traceparent`` (W3C Trace Context); None if it is not one."""
    match = TRACEPARENT.fullmatch(field.strip())
    if match is None or match[1] == "ff" or (match[1] == "00" and match[5]):
        return None
    if match[2] == "0" * 32 or match[3] == "0" * 16:
        return None
    return match[2], match[3], bool(int(match[4], 16) & 1)


def new_id(size: int) -> str:
    """So many random bytes in hex. Not a secret, and never all zero, which would be no id."""
    return f"{random.randrange(1, 1 << 8 * size):0{2 * size}x}"


class Part(NamedTuple):
    """One child span: its name, and when it began and ended, in seconds since the request."""

    name: str
    began: float
    ended: float


def parts_of(entry: Entry) -> Iterator[Part]:
    """The phases of a request, as far as it came."""
    admitted = entry.seconds if entry.waited is None else entry.waited
    load = min(entry.loading, admitted)
    yield Part("queue", 0.0, admitted - load)
    if load:
        yield Part("load", admitted - load, admitted)
    if entry.waited is None:
        return
    # Comments that keep a client from giving up may be sent before an engine is there: they are no first byte.
    first = entry.seconds if entry.first_byte is None else max(entry.first_byte, admitted)
    yield Part("first byte", admitted, first)
    if entry.first_byte is not None:
        yield Part("answer", first, entry.seconds)


def spans_of(entry: Entry, trace: Trace, resource: Resource) -> Sequence[ReadableSpan]:
    """The request's span and its parts, by the names of OpenTelemetry's semantic conventions."""
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import SpanContext, SpanKind, TraceFlags
    from opentelemetry.trace.status import Status, StatusCode

    def context(span: str, *, remote: bool = False) -> SpanContext:
        return SpanContext(int(trace.trace_id, 16), int(span, 16), remote, TraceFlags(TraceFlags.SAMPLED))

    def at(seconds: float) -> int:
        return int((entry.at + seconds) * NS)

    attributes: dict[str, str | int] = {
        "http.request.method": entry.method,
        "http.route": entry.route,
        "http.response.status_code": entry.status,
        "gen_ai.request.model": entry.model,
        "vllmd.request_id": entry.id,
        "vllmd.replica": entry.replica,
        "vllmd.key": entry.key,
        "vllmd.sends": entry.sends,
    }
    if entry.tokens is not None:
        attributes |= {"gen_ai.usage.input_tokens": entry.tokens.prompt}
        attributes |= {"gen_ai.usage.output_tokens": entry.tokens.answer}
    if entry.error:
        attributes["error.type"] = entry.error
    # By OpenTelemetry's conventions a client's mistake is no error of the server's span.
    is_error = failed(entry) and not 400 <= entry.status < 500
    own = context(trace.span_id)
    whole = ReadableSpan(
        f"{entry.method} {entry.route}",
        own,
        context(trace.parent, remote=True) if trace.parent else None,
        resource,
        {name: value for name, value in attributes.items() if value != ""},
        kind=SpanKind.SERVER,
        status=Status(StatusCode.ERROR, entry.message) if is_error else Status(),
        start_time=at(0.0),
        end_time=at(entry.seconds),
    )
    inner = [
        ReadableSpan(part.name, context(new_id(8)), own, resource, start_time=at(part.began), end_time=at(part.ended))
        for part in parts_of(entry)
    ]
    return [whole, *inner]


def _resource() -> Resource:
    """The resource attributes of the sender of spans; those in the environment win."""
    from opentelemetry.sdk.resources import Resource

    ours = {"service.name": "vllmd", "service.version": vllmd.__version__, "host.name": socket.gethostname()}
    if os.environ.get("OTEL_SERVICE_NAME") or "service.name" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", ""):
        del ours["service.name"]
    return Resource.create(ours)
