"""Requests, responses and header fields. ``admin/`` uses these too."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from http import HTTPStatus
from typing import Any, cast
from urllib.parse import parse_qsl

from vllmd.errors import BadRequest, VllmdError
from vllmd.frozen import frozen
from vllmd.proxy.access import NOBODY, Caller

Pairs = Sequence[tuple[str, str]]
MEMBERS_PER_TURN = 200  # of a list, written in one turn of the loop
# Of HTTP's dates (RFC 9110, 5.6.7), whatever the language of this machine is.
DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
ANTHROPIC_PATH = "/v1/messages"
OLLAMA_PATH, OWN_PATH = "/api/", "/api/v1/"


@frozen
class Peer:
    """A client: an address and port, or on a Unix socket the process, user and group."""

    address: str = ""
    port: int = 0
    pid: int | None = None
    uid: int | None = None
    gid: int | None = None

    @property
    def local(self) -> bool:
        """Whether it came by a Unix socket, so that ``uid`` and ``gid`` can be trusted."""
        return self.uid is not None

    def __str__(self) -> str:
        return f"pid {self.pid} uid {self.uid}" if self.local else f"{self.address}:{self.port}"


NO_PEER = Peer()


class Headers:
    """Header fields in their order. Names are lower case, values stripped; both are bytes on the wire.

    Values derived from them are memoised here, since the messages of one connection mostly have the same fields but for
    their length (``heads.HeadMemo``). None: not derived yet.

    - ``onward``: the lines for the next hop (set by ``forward``, and by ``answer``, with the status line before them);
    - ``found``: the sender, and the authenticator's state that this is by;
    - ``from_page``: whether a browser may have sent them for a web page (``cors``);
    - ``plain_json``: whether they announce JSON in UTF-8 without a Content-Encoding (``model_requests``);
    - ``keep_alive``: the value of ``x-vllmd-keep-alive`` (``keep_alive``);
    - ``sent``: the head for an engine, with the address, target, path and trace that it is for (``forward``).
    """

    __slots__ = ("found", "from_page", "keep_alive", "onward", "plain_json", "raw", "sent")

    def __init__(self, raw: Sequence[tuple[bytes, bytes]] = (), onward: bytes | None = None) -> None:
        self.raw = raw
        self.onward = onward
        self.found: tuple[object, Caller] | None = None
        self.from_page: bool | None = None
        self.plain_json: bool | None = None
        self.keep_alive: str | None = None
        self.sent: tuple[object, object, tuple[str, bool], bytes] | None = None

    def with_length(self, length: int) -> Headers:
        """The same with another Content-Length."""
        digits = b"%d" % length
        same = Headers([(k, digits if k == b"content-length" else v) for k, v in self.raw], self.onward)
        same.found, same.from_page, same.plain_json = self.found, self.from_page, self.plain_json
        same.keep_alive, same.sent = self.keep_alive, self.sent
        return same

    def but(self, name: str, *more: tuple[str, str]) -> Headers:
        """The same without the fields called ``name``, and with ``more``."""
        dropped = name.encode("ascii")
        kept = [pair for pair in self.raw if pair[0] != dropped]
        return Headers([*kept, *[(key.encode("ascii"), value.encode("latin-1")) for key, value in more]])

    def get(self, name: str, default: str = "") -> str:
        """The first value of ``name`` (any case), or ``default``."""
        sought = name.lower().encode("ascii")
        for key, value in self.raw:
            if key == sought:
                return value.decode("latin-1")
        return default

    def __contains__(self, name: str) -> bool:
        sought = name.lower().encode("ascii")
        return any(key == sought for key, _ in self.raw)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for key, value in self.raw:
            yield key.decode("latin-1"), value.decode("latin-1")


@dataclass(slots=True)
class Request:
    """One request, whole: ``body`` has been read, up to the limit.

    ``target`` is the request line's, untouched; ``path`` is percent-decoded and free of dot segments; ``route`` is the
    pattern that the path matched, and ``params`` are the pattern's. ``caller``: the sender. ``upgrade``: the protocol
    of its Upgrade field, "" for none. ``answer_fields`` are put into every answer to it. ``max_body``: the route's
    limit for the body, in bytes; None for the server's own, 0: a body is dropped. ``received``: bytes of the body that
    came. ``fenced``: the daemon's page is served at the same address under any name, so no script of an engine's may
    run there.
    """

    method: str
    target: str
    path: str
    query_string: str
    headers: Headers
    peer: Peer = NO_PEER
    version: str = "1.1"
    id: str = ""
    upgrade: str = ""
    body: bytes = b""
    params: Mapping[str, str] = field(default_factory=dict)
    caller: Caller = NOBODY
    route: str = ""
    answer_fields: Pairs = ()
    max_body: int | None = None
    received: int = 0
    fenced: bool = False

    @property
    def key(self) -> str:
        """The name of the API key (never its secret), "" without one."""
        return self.caller.name

    @property
    def query(self) -> dict[str, str]:
        """The query's parameters; of a repeated one the last. Raises BadRequest if there are too many."""
        try:
            return dict(parse_qsl(self.query_string, keep_blank_values=True, max_num_fields=100))
        except ValueError as error:
            raise BadRequest(f"query string: {error}") from None

    def json(self) -> Any:
        """The body as JSON. Raises BadRequest saying where it is not."""
        return parse_json(self.body)


def parse_json(body: bytes) -> Any:
    """``body`` as JSON. Raises BadRequest saying where it is not."""
    try:
        return json.loads(body)
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON: {error.msg} at line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise BadRequest("the body is not acceptable JSON: nested too deeply") from None
    except ValueError:  # Python's own message tells its programmer what to do
        raise BadRequest("the body is not acceptable JSON: an integer of thousands of digits") from None


@dataclass(slots=True)
class Response:
    """An answer. If ``body`` is an iterator, each of its pieces is sent at once."""

    status: int = 200
    body: bytes | AsyncIterator[bytes] = b""
    content_type: str = "application/json"
    headers: Pairs = ()


def json_response(value: object, status: int = 200, headers: Pairs = ()) -> Response:
    """A 200, or another ``status``, whose body is ``value`` as compact JSON."""
    return Response(status, json.dumps(value, separators=(",", ":"), default=str).encode(), headers=headers)


def _as_it_is(item: object) -> object:
    return item


async def list_response(
    value: Mapping[str, object],
    name: str,
    default: Callable[[object], object] = str,
    make: Callable[[Any], object] = _as_it_is,
) -> Response:
    """``value`` as compact JSON. Its member ``name`` may be a list of thousands: it is written in turns of the loop.

    ``default`` is that of ``json.dumps``. ``make`` makes the JSON value of each item of the list, in its turn.
    """
    items, written = cast(Sequence[object], value[name]), list[bytes]()
    for start in range(0, len(items), MEMBERS_PER_TURN):
        if start:
            await asyncio.sleep(0)
        some = [make(item) for item in items[start : start + MEMBERS_PER_TURN]]
        written.append(json.dumps(some, separators=(",", ":"), default=default)[1:-1].encode())
    # As bytes, and joined at the end: each copy of megabytes takes milliseconds.
    pieces = list[bytes]()
    for key, each in value.items():
        pieces += b"," if pieces else b"{", json.dumps(key).encode(), b":"
        if key == name:
            pieces += b"[", b",".join(written), b"]"
        else:
            pieces.append(json.dumps(each, separators=(",", ":"), default=default).encode())
    return Response(200, b"".join((*pieces, b"}")))


def text_response(text: str, status: int = 200, content_type: str = "text/plain; charset=utf-8") -> Response:
    """A 200, or another ``status``, whose body is ``text`` in UTF-8."""
    return Response(status, text.encode(), content_type)


def error_body(error: VllmdError, path: str) -> dict[str, Any]:
    """The error in the form of the API at ``path``: Anthropic's, Ollama's, or else OpenAI's."""
    if path.startswith(OLLAMA_PATH) and not path.startswith(OWN_PATH):
        return error.to_ollama()
    return error.to_anthropic() if path.startswith(ANTHROPIC_PATH) else error.to_openai()


def error_response(error: VllmdError, path: str = "") -> Response:
    """The error as an answer, with ``Retry-After`` in whole seconds where it has one."""
    headers: list[tuple[str, str]] = []
    if error.retry_after is not None:
        headers.append(("retry-after", str(max(1, round(error.retry_after)))))
    if error.status == 401:
        headers.append(("www-authenticate", "Bearer"))
    return json_response(error_body(error, path), error.status, headers)


def event_stream(events: AsyncIterator[bytes]) -> Response:
    """Server-sent events, already framed by the caller, that no proxy shall buffer or cache."""
    return Response(200, events, "text/event-stream", (("cache-control", "no-store"), ("x-accel-buffering", "no")))


@lru_cache(maxsize=128)
def status_line(status: int) -> bytes:
    """``HTTP/1.1 404 Not Found`` with its line end."""
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = "Unknown"
    return f"HTTP/1.1 {status} {phrase}\r\n".encode("ascii")


@lru_cache(maxsize=2)
def _date_line(second: int) -> bytes:
    at = time.gmtime(second)
    day, month = DAYS[at.tm_wday], MONTHS[at.tm_mon - 1]
    return f"date: {day}, {at.tm_mday:02} {month} {at.tm_year} {time.strftime('%H:%M:%S', at)} GMT\r\n".encode("ascii")


def date_line() -> bytes:
    """The ``Date`` field of this second, with its line end."""
    return _date_line(int(time.time()))
