"""One client connection's bytes in, its requests out, in order. Pure: no socket, no clock."""

from __future__ import annotations

import string

from vllmd.errors import BadRequest, HeadTooLarge, SpokenTls, TooLarge
from vllmd.proxy.framing import BadFraming, Chunked, Length
from vllmd.proxy.heads import HeadMemo, RequestHead, parse_request_head
from vllmd.proxy.limits import Limits

MAX_FRAMING_EXCESS = 64 << 10  # framing bytes allowed beyond the payload's own number
PIECE_BYTES = 64 << 10  # of a body, scanned in one step
CHUNKED_PIECE_BYTES = 16 << 10  # the same where its end is not known beforehand, and the next request may follow
TOKEN = frozenset(b"!#$%&'*+-.^_`|~" + string.digits.encode() + string.ascii_letters.encode())
TLS_HANDSHAKE, CR = 0x16, 0x0D


class RequestReader:
    """Call ``feed``, then ``head`` and, if the head is accepted, ``body``, each until it is not None.

    Every error is final: the next request on the connection could not be told from the rest of this one.
    """

    __slots__ = (
        "_begun",
        "_body",
        "_data",
        "_framing",
        "_heads",
        "_keep",
        "_limits",
        "_max_payload",
        "_next",
        "_scanned",
        "head_size",
        "received",
    )

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._heads = HeadMemo(parse_request_head)
        self._data: bytes | bytearray = b""  # fed and not yet consumed: as it came, until more comes
        self._begun = False  # bytes of the next head have come
        self._scanned = 0  # bytes of an unfinished head that are searched, but for the last three
        self._next: RequestHead | None = None  # the head whose body has not begun to be read
        self._keep = True  # whether its payload is kept
        self._framing: Length | Chunked | None = None  # of a body that comes in pieces
        self._max_payload = limits.now.max_body  # of the present body, in bytes
        self._body = bytearray()  # the payload so far of a body that comes in several pieces
        self.received = 0  # payload bytes of the present body
        self.head_size = 0  # bytes of the present request's head

    @property
    def pending(self) -> int:
        """Bytes fed and not yet consumed."""
        return len(self._data)

    def feed(self, data: bytes) -> None:
        """More bytes from the client."""
        if not self._data:
            self._data = data  # mostly a whole request: no copy into a buffer
            return
        if isinstance(self._data, bytes):
            self._data = bytearray(self._data)
        self._data += data

    def take_rest(self) -> bytes:
        """Give up the bytes that follow the last request: they are no longer HTTP."""
        rest, self._data = bytes(self._data), b""
        return rest

    def _take(self, size: int) -> bytes:
        """The first ``size`` bytes, no longer kept here."""
        data = self._data
        if isinstance(data, bytes):
            if size == len(data):
                self._data = b""
                return data
            taken, self._data = data[:size], data[size:]
            return taken
        with memoryview(data) as view:
            taken = bytes(view[:size])
        self._drop(size)
        return taken

    def _drop(self, size: int) -> None:
        """Let go of the first ``size`` bytes."""
        data = self._data
        if size == len(data):
            self._data = b""
        elif isinstance(data, bytes):
            self._data = data[size:]
        else:
            del data[:size]

    def head(self) -> RequestHead | None:
        """The next request's head, None while it is not whole. The caller checks the length that it announces.

        Raises BadRequest, HeadTooLarge.
        """
        data = self._data
        if not self._begun:
            if not data or data == b"\r":
                return None
            if data[0] == CR and data[:2] == b"\r\n":  # a stray line end before a head is forgiven (RFC 9112, 2.2)
                self._drop(2)
                data = self._data
            self._begun = True
        end = data.find(b"\r\n\r\n", self._scanned)
        most = self._limits.now.max_head
        if end > most or (end < 0 and len(data) > most + 3):  # 3: of the blank line, whose last byte is missing
            raise HeadTooLarge(f"the request's head is larger than {most} bytes")
        if end < 0:
            if data[:2] == b"\r\n":
                raise BadRequest("malformed request: no request line")
            if data.find(b"\n\n", self._scanned) >= 0:
                raise BadRequest("malformed request: a line that does not end with CRLF")
            if data and data[0] not in TOKEN:  # no method begins like that: refuse it without waiting for the rest
                if data[0] == TLS_HANDSHAKE:
                    raise SpokenTls("this is TLS, and plain HTTP is spoken here: the URL must begin with http://")
                raise BadRequest("malformed request: no request line")
            self._scanned = max(0, len(data) - 3)
            return None
        self.head_size = end + 4
        raw = self._take(end + 4)
        head = self._heads.read(raw)
        self._scanned = 0
        self._begun = False
        self._next, self._framing, self._keep = head, None, True
        self._max_payload, self.received = self._limits.now.max_body, 0
        return head

    def discard(self, max_payload: int) -> None:
        """Keep nothing of the present body, of up to ``max_payload`` bytes: its route takes none."""
        self._max_payload, self._keep = max_payload, False

    def drop_body(self) -> None:
        """Free the payload so far of the present body: the request was refused."""
        self._next, self._framing, self._body = None, None, bytearray()

    def limit(self, max_payload: int) -> None:
        """Accept at most ``max_payload`` bytes of the present body."""
        self._max_payload = max_payload

    def body(self) -> bytes | None:
        """The body of the last head, None while it goes on. Raises BadRequest, TooLarge.

        Many pieces are collected in one buffer that grows, never in a list: a piece of two bytes is an object of forty,
        and the memory of a body must be about its size, which is what ``body_memory`` counts.
        """
        framing, data = self._framing, self._data
        if framing is None:
            head = self._next
            if head is None or head.length == 0:
                return b""
            length = head.length
            if length is not None and length <= len(data) and length <= self._max_payload:  # the common case: whole
                self.received, self._next = length, None
                body = self._take(length)
                return body if self._keep else b""
            self._framing = framing = head.framing()
            framing.keep = self._keep
        end = -1
        while self._data and end < 0:
            piece = self._next_piece(framing)
            try:
                end = framing.scan(piece)
            except BadFraming as error:
                raise BadRequest(f"malformed request: {error}") from None
            self._drop(len(piece) if end < 0 else end)
            pieces = framing.pieces
            self.received = self.received + len(piece) if isinstance(framing, Length) else framing.payload
            self._check_size(framing, whole=end >= 0)
            if end >= 0 and not self._body and len(pieces) == 1:
                self._next = self._framing = None
                return pieces[0]
            for kept in pieces:
                self._body += kept
            pieces.clear()
        if end < 0:
            return None
        body, self._body = bytes(self._body), bytearray()
        self._next = self._framing = None
        return body

    def _next_piece(self, framing: Length | Chunked) -> bytes:
        """The next bytes that may belong to the body. The rest, which may be the next request, is not copied."""
        data = self._data
        most = min(framing.left, PIECE_BYTES) if isinstance(framing, Length) else CHUNKED_PIECE_BYTES
        if len(data) <= most:
            return bytes(data)
        with memoryview(data) as view:
            return bytes(view[:most])

    def _check_size(self, framing: Length | Chunked, *, whole: bool) -> None:
        if self.received > self._max_payload:
            raise TooLarge(f"the body is larger than {self._max_payload} bytes")
        if isinstance(framing, Chunked) and not whole and framing.seen > 2 * framing.payload + MAX_FRAMING_EXCESS:
            raise BadRequest("malformed request: the body's chunks are too small")
