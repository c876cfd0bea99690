"""Requests that can be looked into, recordings of bodies, who used how much: ``/admin/requests``, ``/admin/usage``.

A caller sees what its key may: the requests of its own key or, with the scope read, of all; bodies only with admin.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from vllmd.admin.control import Control
from vllmd.admin.schemas import BOOL, COUNT, FLAG, NUMBER, TEXT, answers, asks, doc, many, maybe, record, streams
from vllmd.admin.streams import framed
from vllmd.errors import BadRequest
from vllmd.proxy.access import Reach
from vllmd.proxy.http import Request, Response, event_stream, json_response
from vllmd.proxy.routing import LocalHandler, Router
from vllmd.records.ring import Filter
from vllmd.records.sums import FIELDS

MOST_SHOWN, SHOWN = 10_000, 100  # requests in one answer
LONGEST_RECORDING, RECORDING = 7 * 86400.0, 600.0  # seconds
LONGEST_BODY, BODY = 16 << 20, 64 << 10  # bytes kept of one
MONTH = 30 * 86400.0
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
AGO = re.compile(r"(\d{1,9}(?:\.\d{1,3})?)(s|m|h|d|w)")
STATUS = re.compile(r"[1-5]\d\d|[1-5]xx")
TRUE, FALSE = frozenset({"1", "true", "yes", "on"}), frozenset({"0", "false", "no", "off"})

TOKENS = record({"prompt": COUNT, "cached": COUNT, "answer": COUNT,
                 "estimated": {**BOOL, "description": "reckoned from sizes: no usage told them"}})  # fmt: skip
ENTRY = {
    "id": {**TEXT, "description": "the x-request-id"},
    "number": {**COUNT, "description": "counts up; 0 while it is under way"},
    "at": {**NUMBER, "description": "when it came, in Unix time"},
    "method": TEXT, "path": TEXT, "model": TEXT, "replica": TEXT, "key": TEXT,
    "client": {**TEXT, "description": "its address, or the process on a Unix socket"},
    "status": {**COUNT, "description": "499 where the client left before an answer, 0 while there is none"},
    "error": {**TEXT, "description": "the kind of error, if vllmd ended it with one"},
    "message": TEXT, "stream": BOOL, "received": COUNT, "sent": COUNT,
    "queue_seconds": maybe({**NUMBER, "description": "waited for others and for room"}),
    "load_seconds": maybe({**NUMBER, "description": "waited while the model started or woke"}),
    "first_byte_seconds": maybe({**NUMBER, "description": "from its arrival to the first byte of its answer"}),
    "seconds": {**NUMBER, "description": "from its arrival to its end, or until now"},
    "retries": COUNT, "tokens": maybe(TOKENS),
    "bodies": {**BOOL, "description": "whether its bodies were recorded"},
}  # fmt: skip
RECORDED = maybe(record({"request": TEXT, "answer": TEXT, "request_cut": BOOL, "answer_cut": BOOL}))
REQUEST = record({**ENTRY, "headers": many({"type": "array", "items": TEXT}), "recorded": RECORDED})
RECORDING_LINE = {"number": COUNT, "model": TEXT, "key": TEXT, "most_bytes": COUNT, "seconds_left": NUMBER}
RECORDINGS = record({"recordings": many(record(RECORDING_LINE)),
                     "requests": {**COUNT, "description": "how many requests have bodies now"},
                     "bytes": {**COUNT, "description": "what these take"}})  # fmt: skip
USAGE = record(
    {
        "by": many(TEXT),
        "since": NUMBER,
        "until": NUMBER,
        "trouble": {**TEXT, "description": "why nothing can be written down now"},
        "rows": many(record(
            dict.fromkeys(FIELDS, NUMBER),
            dict.fromkeys(("key", "model", "day", "hour", "month"), TEXT),
        )),
    }
)  # fmt: skip
NEW_RECORDING = record({}, {"model": TEXT, "key": TEXT, "seconds": {**NUMBER, "exclusiveMinimum": 0},
                            "most_bytes": COUNT}, closed=True)  # fmt: skip
WANTED = {
    "model": (TEXT, "of that model only"),
    "key": (TEXT, "of the key with that name only; - is nobody's"),
    "status": (TEXT, "with that status only, such as 429 or 5xx"),
    "since": (TEXT, "that came since then: Unix time, or how long ago, such as 1h"),
    "failed": (FLAG, "only those that failed"),
    "slower": (NUMBER, "only those that took so many seconds or more"),
}


def add_records(router: Router, control: Control, audited: Callable[[LocalHandler], LocalHandler]) -> None:
    """The routes; ``audited`` notes who used one that changes something."""
    ends = RecordsEndpoints(control)
    add = router.add
    lines = record({"requests": many(record(ENTRY)), "under_way": many(record(ENTRY))})
    add("GET", "/admin/requests", ends.requests, "read", "The last requests, and those under way", doc(
        answers(lines), asks(**WANTED, limit=(COUNT, f"how many, {SHOWN} without it"))), Reach.EACH)  # fmt: skip
    add("GET", "/admin/requests/{id}", ends.request, "read", "One of the last requests, with its head", doc(
        answers(REQUEST), about="With bodies, if they were recorded and the caller may change things."),
        Reach.EACH)  # fmt: skip
    add("GET", "/admin/events/requests", ends.watch, "read", "Requests as they end", doc(
        streams("text/event-stream", "events whose data is one of /admin/requests"), asks(**WANTED)),
        Reach.EACH)  # fmt: skip
    add("GET", "/admin/recordings", ends.recorded, "read", "Whose bodies are recorded now", answers(RECORDINGS),
        Reach.MACHINE)  # fmt: skip
    body = {"requestBody": {"required": True, "content": {"application/json": {"schema": NEW_RECORDING}}}}
    add("POST", "/admin/recordings", audited(ends.record), "admin", "Record bodies of a model's or a key's requests",
        doc(answers(RECORDINGS), body, about=f"For {RECORDING:g} seconds and {BODY} bytes of each if nothing else is "
            "said. Clients are told by the field x-vllmd-recorded of each answer."), Reach.MACHINE)  # fmt: skip
    add("DELETE", "/admin/recordings", audited(ends.stop), "admin", "End a recording, or all", doc(
        answers(RECORDINGS), asks(number=(COUNT, "which; all without it")),
        about="With the last one what is kept of bodies goes."), Reach.MACHINE)  # fmt: skip
    add("GET", "/admin/usage", ends.usage, "read", "Who used how much", doc(answers(USAGE), asks(
        by=(TEXT, "key, model, day, hour, month, several with commas between; key without it"),
        since=(TEXT, "Unix time, or how long ago; 30d without it"), until=(TEXT, "the same; now without it"),
        key=(TEXT, "of that key only; - is nobody's"), model=(TEXT, "of that model only"))), Reach.MACHINE)  # fmt: skip
    add("GET", "/admin/trace", ends.trace, "read", "Arrivals, as vllmctl simulate reads them", doc(
        streams("application/x-ndjson", "objects with time, model, prompt, output and perhaps key"),
        asks(since=(TEXT, "Unix time, or how long ago; 7d without it"),
             anonymised=(FLAG, "numbered names, times from the first arrival on"))), Reach.MACHINE)  # fmt: skip


class RecordsEndpoints:
    """The handlers of requests, recordings, usage and traces."""

    def __init__(self, control: Control) -> None:
        self._control = control

    async def requests(self, request: Request) -> Response:
        """``GET /admin/requests``: those that ended last, and those under way."""
        found, limit = wanted(request), _number(request, "limit", SHOWN, MOST_SHOWN)
        told = self._control.records.requests(found, limit, request.caller)
        return json_response({"requests": told, "under_way": self._control.records.under_way(found, request.caller)})

    async def request(self, request: Request) -> Response:
        """``GET /admin/requests/{id}``: one of them in full. Raises NotFound."""
        return json_response(self._control.records.request(request.params["id"], request.caller))

    async def watch(self, request: Request) -> Response:
        """``GET /admin/events/requests``: requests as they end, as server-sent events."""
        events = self._control.records.watch(wanted(request), request.caller)
        return event_stream(framed(events, b"requests as they end"))

    async def recorded(self, request: Request) -> Response:
        """``GET /admin/recordings``: the recordings of bodies that go on."""
        return json_response(self._control.records.recorded())

    async def record(self, request: Request) -> Response:
        """``POST /admin/recordings``: begin to record bodies. Raises BadRequest."""
        body = request.json() if request.body else {}
        if not isinstance(body, dict) or not set(body) <= {"model", "key", "seconds", "most_bytes"}:
            raise BadRequest("the body must be a JSON object with model, key, seconds, most_bytes, or some of them")
        model, key = body.get("model", ""), body.get("key", "")
        if not isinstance(model, str) or not isinstance(key, str):
            raise BadRequest("model and key must be names")
        seconds, most = body.get("seconds", RECORDING), body.get("most_bytes", BODY)
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= LONGEST_RECORDING:
            raise BadRequest(f"seconds must be a number above 0, up to {LONGEST_RECORDING:g}", param="seconds")
        if isinstance(most, bool) or not isinstance(most, int) or not 0 < most <= LONGEST_BODY:
            raise BadRequest(f"most_bytes must be a number from 1 to {LONGEST_BODY}", param="most_bytes")
        return json_response(self._control.records.record(model, key, float(seconds), most))

    async def stop(self, request: Request) -> Response:
        """``DELETE /admin/recordings``: end one, or all of them."""
        return json_response(self._control.records.stop_recording(_number(request, "number", 0, 10**9)))

    async def usage(self, request: Request) -> Response:
        """``GET /admin/usage``: sums by key, model or time. Raises BadRequest, Unavailable."""
        by = tuple(name.strip() for name in request.query.get("by", "key").split(",") if name.strip())
        now = time.time()
        since, until = moment(request, "since", now - MONTH, now), moment(request, "until", now, now)
        key = _key(request)
        return json_response(await self._control.records.usage(by, since, until, key, request.query.get("model", "")))

    async def trace(self, request: Request) -> Response:
        """``GET /admin/trace``: arrivals, a JSON object a line."""
        now = time.time()
        since = moment(request, "since", now - 7 * 86400, now)
        found = self._control.records.trace(since, anonymised=_flag(request, "anonymised"))
        first = await anext(found, None)  # what cannot be is an error, not a stream
        return Response(200, _lines(first, found), "application/x-ndjson")


def wanted(request: Request) -> Filter:
    """Which requests are asked for. Raises BadRequest."""
    query, now = request.query, time.time()
    status = query.get("status", "").lower()
    if status and STATUS.fullmatch(status) is None:
        raise BadRequest(f"status must be one such as 429, or 4xx, not {status!r}", param="status")
    try:
        slower = float(query.get("slower", "0"))
    except ValueError:
        raise BadRequest("slower must be a number of seconds", param="slower") from None
    since = moment(request, "since", 0.0, now)
    return Filter(query.get("model", ""), _key(request), status, since, _flag(request, "failed"), slower)


def moment(request: Request, name: str, default: float, now: float) -> float:
    """A query parameter that is a Unix time, or how long before ``now``. Raises BadRequest."""
    text = request.query.get(name, "")
    if not text:
        return default
    ago = AGO.fullmatch(text)
    if ago is not None:
        return now - float(ago[1]) * UNITS[ago[2]]
    try:
        return min(max(float(text), 0.0), 1e11)
    except ValueError:
        what = f"{name} must be a Unix time, or how long ago, such as 90m, 12h or 30d, not {text!r}"
        raise BadRequest(what, param=name) from None


def _key(request: Request) -> str | None:
    name = request.query.get("key")
    return "" if name == "-" else name


def _flag(request: Request, name: str) -> bool:
    value = request.query.get(name, "false").lower()
    if value not in TRUE | FALSE:
        raise BadRequest(f"{name} must be true or false, not {value!r}", param=name)
    return value in TRUE


def _number(request: Request, name: str, default: int, most: int) -> int:
    text = request.query.get(name, str(default))
    if not (text.isascii() and text.isdecimal()) or len(text) > len(str(most)) or int(text) > most:
        raise BadRequest(f"{name} must be a number from 0 to {most}, not {text!r}", param=name)
    return int(text)


async def _lines(first: dict[str, Any] | None, rest: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    if first is not None:
        yield json.dumps(first).encode() + b"\n"
    async for line in rest:
        yield json.dumps(line).encode() + b"\n"
