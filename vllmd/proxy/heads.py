"""Message heads, read strictly through h11 and written by hand.

h11 reads every head; on top of it everything is refused that two readers could take for two
different messages (RFC 9112, 11): bare line feeds, folded lines, two lengths, a length beside a
transfer coding, targets that are no plain path. A fresh ``h11.Connection`` reads one head and is
thrown away: bodies never pass through it.

On one connection the same head comes again and again, with another length at most. ``HeadMemo`` remembers the last one:
h11 reads a head once per connection, not once per request, and values derived from it (``Headers.onward``) are kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar
from urllib.parse import unquote_to_bytes

import h11

from vllmd.errors import BadRequest
from vllmd.proxy.framing import BadFraming, Chunked, Framing, Length, UntilEof
from vllmd.proxy.http import Headers, Pairs, date_line, status_line
from vllmd.proxy.response_heads import normalize_head

RawHeaders = list[tuple[bytes, bytes]]

# Fields that speak of one connection only (RFC 9110, 7.6.1).
HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-connection proxy-authenticate proxy-authorization te trailer"
    b" transfer-encoding upgrade http2-settings".split()
)
LENGTH_LINES = re.compile(rb"\ncontent-length[ \t]*:[ \t]*([^\r\n]*)", re.IGNORECASE)
TRANSFER_LINES = re.compile(rb"\ntransfer-encoding[ \t]*:", re.IGNORECASE)
BARE_LINE_END = re.compile(rb"(?<!\r)\n|\r(?!\n)")
CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
FOLDED_LINE = re.compile(rb"\r\n[ \t]")
HOST = re.compile(r"(?:[A-Za-z0-9._~%!$&'()*+,;=-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
ABSOLUTE = re.compile(r"https?://([^/?#@]*)(.*)", re.IGNORECASE)
TARGET = re.compile(r"/[A-Za-z0-9._~!$&'()*+,;=:@/%-]*")
QUERY = re.compile(r"[\x21\x24-\x7e]*")  # browsers send more than RFC 3986 allows; no '#', '\"', space or control
BAD_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
FIELD_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
PLAIN_LENGTH = re.compile(rb"\r\n[Cc]ontent-[Ll]ength: ([0-9]{1,15})\r\n")
KEEP_ALIVE = re.compile(rb"(?:^|,)[ \t]*keep-alive[ \t]*(?:,|$)")
# No path may have dot segments or backslashes, and by a path that ends in its id operators look into a request.
REQUEST_ID = re.compile(r"(?!(?:.*/)?\.{1,2}(?:/|\Z))[\x21-\x5b\x5d-\x7e]{1,128}")
LAST_STATUS = 599
BODYLESS = frozenset({204, 304})
EVENT_STREAM = b"text/event-stream"
# Content types that a browser never runs. Anything else of an engine's may hold a script, which would run with the
# rights of the daemon's own page.
HARMLESS = (b"application/json", EVENT_STREAM)
NO_SHAPE = (b"", b"")
MEMO_SIZE = 4096  # bytes of a head worth remembering
FIELD_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")


@dataclass(slots=True)
class RequestHead:
    """A request's head.

    ``length`` is its body's in bytes, 0 for none, None when it is chunked. ``path`` is decoded, without dot segments.
    ``request_id`` is the client's own for it, "" for none, or one that is not printable ASCII or fits no path.
    """

    method: str
    target: str
    path: str
    query: str
    version: str
    headers: Headers
    length: int | None
    keep_alive: bool
    expects_continue: bool
    upgrade: str
    request_id: str

    def with_length(self, length: int) -> RequestHead:
        """The same head with another Content-Length."""
        return RequestHead(
            self.method,
            self.target,
            self.path,
            self.query,
            self.version,
            self.headers.with_length(length),
            length,
            self.keep_alive,
            self.expects_continue,
            self.upgrade,
            self.request_id,
        )

    @property
    def has_length(self) -> bool:
        """Whether a Content-Length in it is that of its body: in a request it always is."""
        return True

    def framing(self) -> Length | Chunked:
        """The scanner for the end of its body; it keeps the payload."""
        return Chunked(keep=True, counted=True) if self.length is None else Length(self.length, keep=True)


@dataclass(slots=True)
class ResponseHead:
    """An upstream's head.

    ``length`` is its body's; None when that is ``chunked`` or ends with the connection. ``streamed``: the body is of
    server-sent events. ``harmless``: no browser would run it.
    """

    status: int
    headers: Headers
    length: int | None
    chunked: bool
    dated: bool
    keep_alive: bool
    content_type: bytes
    streamed: bool
    harmless: bool
    has_location: bool

    def with_length(self, length: int) -> ResponseHead:
        """The same head with another Content-Length."""
        return ResponseHead(
            self.status,
            self.headers.with_length(length),
            length,
            False,
            self.dated,
            self.keep_alive,
            self.content_type,
            self.streamed,
            self.harmless,
            self.has_location,
        )

    @property
    def has_length(self) -> bool:
        """Whether a Content-Length in it is that of its body: not in an answer to HEAD, a 204 and a 304."""
        return self.length is not None and self.status not in BODYLESS

    def framing(self) -> Framing:
        """A new scanner for the end of its body."""
        if self.chunked:
            return Chunked()
        return UntilEof() if self.length is None else Length(self.length)


class Head(Protocol):
    """A head of either kind, as ``HeadMemo`` knows it."""

    @property
    def has_length(self) -> bool:
        """Whether a Content-Length in it is that of its body."""

    def with_length(self, length: int) -> Self:
        """The same head with another Content-Length."""


H = TypeVar("H", bound=Head)


class HeadMemo(Generic[H]):
    """Remembers a connection's last head and its parsed form, which serves a head that differs in its length alone.

    ``parse`` reads a new head.
    """

    __slots__ = ("_head", "_parse", "_raw", "_shape")

    def __init__(self, parse: Callable[[bytes], H]) -> None:
        self._parse: Callable[[bytes], H] = parse
        self._raw = b""
        self._shape = NO_SHAPE  # the bytes before and after the length's digits
        self._head: H | None = None

    def known(self, raw: bytes) -> H | None:
        """The parsed form of ``raw`` if it is the last head, but for its length; None for any other."""
        head = self._head
        if head is None or raw == self._raw:
            return head
        digits = PLAIN_LENGTH.search(raw)
        if digits is None or (raw[: digits.start(1)], raw[digits.end(1) :]) != self._shape:
            return None
        self._head, self._raw = head, raw = head.with_length(int(digits[1])), raw
        return head

    def read(self, raw: bytes) -> H:
        """The parsed form of ``raw``, which ends with its blank line. Raises what ``parse`` raises."""
        head = self.known(raw)
        if head is None:
            head = self._parse(raw)
            if len(raw) <= MEMO_SIZE:
                digits = PLAIN_LENGTH.search(raw) if head.has_length else None
                self._head, self._raw = head, raw
                self._shape = NO_SHAPE if digits is None else (raw[: digits.start(1)], raw[digits.end(1) :])
        return head


def parse_request_head(head: bytes) -> RequestHead:
    """Read ``head``, which ends with its blank line. Raises BadRequest saying what is wrong."""
    _refuse_ambiguity(head)
    event = _read(h11.SERVER, head)
    if not isinstance(event, h11.Request):
        raise BadRequest("malformed request: no request line")
    headers = Headers(list(event.headers))
    version = event.http_version.decode("ascii")
    if version not in ("1.0", "1.1"):
        raise BadRequest(f"HTTP/{version} is not spoken here; HTTP/1.1 is")
    fields = _joined(headers.raw)
    host = fields.get(b"host", b"").decode("latin-1")
    if HOST.fullmatch(host) is None:
        raise BadRequest("malformed request: the Host field is no host")
    if sum(name == b"content-type" for name, _ in headers.raw) > 1:
        raise BadRequest("malformed request: more than one Content-Type")
    target = event.target.decode("latin-1")
    path, query = split_target(event.method.decode("ascii"), target, host)
    connection = fields.get(b"connection", b"").lower()
    expect = fields.get(b"expect", b"").lower()
    if expect not in (b"", b"100-continue"):
        raise BadRequest("the only Expect that is understood is '100-continue'")
    return RequestHead(
        event.method.decode("ascii"),
        target,
        path,
        query,
        version,
        headers,
        _request_length(head, fields, version),
        b"close" not in connection and (version == "1.1" or KEEP_ALIVE.search(connection) is not None),
        expect == b"100-continue" and version == "1.1",
        fields.get(b"upgrade", b"").decode("latin-1").lower() if b"upgrade" in connection and version == "1.1" else "",
        given if (given := headers.get("x-request-id")) and REQUEST_ID.fullmatch(given) else "",
    )


def parse_response_head(head: bytes, method: str) -> ResponseHead:
    """Read an upstream's head as the answer to ``method``. Raises BadFraming if it is not sound."""
    head = normalize_head(head)
    try:
        event = _read(h11.CLIENT, head)
    except BadRequest as error:
        raise BadFraming(error.message) from None
    if not isinstance(event, h11.Response):
        raise BadFraming("no final response head")
    if event.status_code > LAST_STATUS:
        raise BadFraming(f"HTTP has no status {event.status_code}")
    headers = Headers(list(event.headers))
    fields = _joined(headers.raw)
    length, chunked = _response_length(event.status_code, fields, method)
    keep_alive = event.http_version == b"1.1" and b"close" not in fields.get(b"connection", b"").lower()
    content_type = fields.get(b"content-type", b"").lower()
    return ResponseHead(
        event.status_code,
        headers,
        length,
        chunked,
        b"date" in fields,
        keep_alive and (chunked or length is not None),
        content_type,
        content_type.startswith(EVENT_STREAM),
        content_type.startswith(HARMLESS),
        b"location" in fields,
    )


def parse_upgrade_head(head: bytes) -> RawHeaders:
    """The fields of an upstream's ``101`` to a WebSocket handshake. Raises BadFraming if it is any other answer."""
    head = normalize_head(head)
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=len(head) + 1)
    connection.send(h11.Request(method="GET", target="/", headers=[("host", "-"), ("upgrade", "websocket")]))
    connection.receive_data(head)
    try:
        event = connection.next_event()
    except h11.RemoteProtocolError as error:
        raise BadFraming(str(error)) from None
    if not isinstance(event, h11.InformationalResponse) or event.status_code != 101:
        status = event.status_code if isinstance(event, h11.Response | h11.InformationalResponse) else "no status"
        raise BadFraming(f"it answered {status} instead of 101")
    return list(event.headers)


def split_target(method: str, target: str, host: str) -> tuple[str, str]:
    """The decoded path and the raw query of a request target.

    Absolute-form is accepted if it names the very host of the Host field, asterisk-form for OPTIONS.
    Raises BadRequest for everything that is not a plain path: dot segments, bad escapes, control characters.
    """
    if target == "*" and method == "OPTIONS":
        return "*", ""
    if not target.startswith("/"):
        absolute = ABSOLUTE.fullmatch(target)
        if absolute is None or absolute[1].lower() != host.lower() or not host:
            raise BadRequest("the request target is neither a path nor a URL of this host")
        rest = absolute[2]
        target = rest if rest.startswith("/") else "/" + rest
    path, _, query = target.partition("?")
    if TARGET.fullmatch(path) is None or QUERY.fullmatch(query) is None:
        raise BadRequest("the request target has characters that do not belong there")
    return (_decoded(path) if "%" in path else _undotted(path)), query


def _decoded(path: str) -> str:
    if BAD_PERCENT.search(path):
        raise BadRequest("the request target has a malformed percent escape")
    try:
        decoded = unquote_to_bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        raise BadRequest("the request target is not UTF-8") from None
    if any(ord(char) < 0x20 or char in "\x7f\\" for char in decoded):
        raise BadRequest("the request target has an escaped control character or backslash")
    return _undotted(decoded)


def _undotted(path: str) -> str:
    if "/." in path and any(part in (".", "..") for part in path.split("/")):
        raise BadRequest("the request target has dot segments")
    return path


def _read(role: type[h11.CLIENT] | type[h11.SERVER], head: bytes) -> object:
    connection = h11.Connection(role, max_incomplete_event_size=len(head) + 1)
    connection.receive_data(head)
    try:
        return connection.next_event()
    except h11.RemoteProtocolError as error:
        raise BadRequest(f"malformed message: {error}") from None


def _refuse_ambiguity(head: bytes) -> None:
    """Refuse what h11 accepts and another reader might read in another way."""
    if BARE_LINE_END.search(head):
        raise BadRequest("malformed request: a line that does not end with CRLF")
    if FOLDED_LINE.search(head):
        raise BadRequest("malformed request: a folded header line")
    if CONTROL.search(head):
        raise BadRequest("malformed request: a control character")


def _joined(headers: Iterable[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """The fields by name; the values of a repeated one joined by commas (RFC 9110, 5.3)."""
    fields: dict[bytes, bytes] = {}
    for name, value in headers:
        fields[name] = fields[name] + b"," + value if name in fields else value
    return fields


def _request_length(head: bytes, fields: dict[bytes, bytes], version: str) -> int | None:
    coding = fields.get(b"transfer-encoding")
    lengths = LENGTH_LINES.findall(head)
    if coding is not None:
        if lengths or version == "1.0" or len(TRANSFER_LINES.findall(head)) != 1 or coding.lower() != b"chunked":
            raise BadRequest("malformed request: Transfer-Encoding must be 'chunked', once, without a Content-Length")
        return None
    if not lengths:
        return 0
    value = lengths[0].rstrip(b" \t")
    if len(lengths) > 1 or not value.isdigit() or len(value) > 15:
        raise BadRequest("malformed request: Content-Length must be one number, once")
    return int(value)


def _response_length(status: int, fields: dict[bytes, bytes], method: str) -> tuple[int | None, bool]:
    """The body's length, None if the head does not have it, and whether the body is chunked."""
    if method == "HEAD" or status in BODYLESS or status < 200:
        return 0, False
    coding, length = fields.get(b"transfer-encoding"), fields.get(b"content-length")
    if coding is not None:
        if coding.lower() != b"chunked" or length is not None:
            raise BadFraming("the upstream's Transfer-Encoding is not understood")
        return None, True
    if length is None:
        return None, False
    if not length.isdigit() or len(length) > 15:
        raise BadFraming("the upstream's Content-Length is no number")
    return int(length), False


def forwardable(headers: Iterable[tuple[bytes, bytes]], *, but: frozenset[bytes] = frozenset()) -> RawHeaders:
    """The fields for the next hop: without those that ``Connection`` names, and those in ``but``."""
    headers = list(headers)
    barred = HOP_BY_HOP | but
    for name, value in headers:
        if name == b"connection":
            barred |= frozenset(part.strip().lower() for part in value.split(b","))
    return [pair for pair in headers if pair[0] not in barred]


def write_fields(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """``headers`` as lines. They must have been read strictly: nothing is checked here."""
    return b"".join([b"%b: %b\r\n" % pair for pair in headers])


def write_request_head(method: str, target: str, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A request's head with its blank line."""
    return f"{method} {target} HTTP/1.1\r\n".encode("ascii") + write_fields(headers) + b"\r\n"


def write_response_head(status: int, headers: Pairs, framing: Pairs) -> bytes:
    """The head of an answer of the daemon's own. Raises ValueError for a field that could break out of its line."""
    lines = [status_line(status), date_line()]
    for name, value in (*headers, *framing):
        if FIELD_NAME.fullmatch(name) is None or FIELD_VALUE.fullmatch(value) is None:
            raise ValueError(f"header {name!r} would be malformed")
        lines.append(f"{name}: {value}\r\n".encode("latin-1"))
    lines.append(b"\r\n")
    return b"".join(lines)
