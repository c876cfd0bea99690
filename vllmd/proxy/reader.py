"""One client connection's bytes in, its requests out, in order. Pure: no socket, no clock."""

from __future__ import annotations

import string

from vllmd.errors import BadRequest, HeadTooLarge, TooLarge
from vllmd.proxy.framing import BadFraming, Chunked, Length
from vllmd.proxy.heads import HeadMemo, RequestHead, parse_request_head
from vllmd.proxy.limits import Limits

CRUMBS = 64 << 10  # framing bytes allowed beyond the payload's own number
TOKEN = frozenset(b"!#$%&'*+-.^_`|~" + string.digits.encode() + string.ascii_letters.encode())
TLS_HANDSHAKE = 0x16


class RequestReader:
    """``feed`` it, then ask for ``head`` and, when that was accepted, for ``body``, each until it is not None.

    Every error it raises is final: what follows on the connection cannot be told apart.
    """

    __slots__ = ("_begun", "_data", "_framing", "_heads", "_limits", "_scanned", "received")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._heads = HeadMemo(parse_request_head)
        self._data = bytearray()
        self._begun = False  # bytes of the next head have been seen
        self._scanned = 0  # bytes of an unfinished head already searched
        self._framing: Length | Chunked | None = None
        self.received = 0  # payload bytes of the present body

    @property
    def pending(self) -> int:
        """Bytes fed and not yet asked for."""
        return len(self._data)

    def feed(self, data: bytes) -> None:
        """More bytes from the client."""
        self._data += data

    def take_rest(self) -> bytes:
        """Give up the bytes that follow the last request: they are no longer HTTP."""
        rest, self._data = bytes(self._data), bytearray()
        return rest

    def head(self) -> RequestHead | None:
        """The next request's head; the length that it announces is the caller's to judge.

        Raises BadRequest, HeadTooLarge.
        """
        data = self._data
        if not self._begun and not self._begin():
            return None
        end = data.find(b"\r\n\r\n", max(0, self._scanned - 3))
        if end > self._limits.max_head or (
            end < 0 and len(data) > self._limits.max_head + 3
        ):  # its blank line may come
            raise HeadTooLarge(f"the request's head is larger than {self._limits.max_head} bytes")
        if data[:2] == b"\r\n":
            raise BadRequest("malformed request: no request line")
        if end < 0:
            if data.find(b"\n\n", max(0, self._scanned - 1)) >= 0:
                raise BadRequest("malformed request: a line that does not end with CRLF")
            if data and data[0] not in TOKEN:  # no method begins like that: nothing good will come of waiting
                tls = "; this is TLS, and plain HTTP is spoken here" if data[0] == TLS_HANDSHAKE else ""
                raise BadRequest(f"malformed request: no request line{tls}")
            self._scanned = len(data)
            return None
        head = self._heads.read(bytes(data[: end + 4]))
        del data[: end + 4]
        self._scanned = 0
        self._begun = False
        self._expect(head)
        return head

    def _begin(self) -> bool:
        """Whether a head has begun; one stray line end before it is forgiven (RFC 9112, 2.2)."""
        data = self._data
        if not data or data == b"\r":
            return False
        if data[:2] == b"\r\n":
            del data[:2]
        self._begun = True
        return True

    def _expect(self, head: RequestHead) -> None:
        self._framing = head.framing() if head.has_body else None
        self.received = 0

    def body(self) -> bytes | None:
        """The body of the last head. Raises BadRequest, TooLarge."""
        framing = self._framing
        if framing is None:
            return b""
        data, self._data = bytes(self._data), bytearray()
        try:
            end = framing.scan(data)
        except BadFraming as error:
            raise BadRequest(f"malformed request: {error}") from None
        self._check_size(framing, len(data), whole=end >= 0)
        if end < 0:
            return None
        self._data += data[end:]
        self._framing = None
        return framing.pieces[0] if len(framing.pieces) == 1 else b"".join(framing.pieces)

    def _check_size(self, framing: Length | Chunked, more: int, *, whole: bool) -> None:
        if isinstance(framing, Length):
            self.received += more
            return
        self.received = framing.payload
        if framing.payload > self._limits.max_body:
            raise TooLarge(f"the body is larger than {self._limits.max_body} bytes")
        if not whole and framing.seen > 2 * framing.payload + CRUMBS:
            raise BadRequest("malformed request: the body's chunks are too small")
