"""Engines' heads: collected from pieces, and normalised where RFC 9112 lets a recipient do so.

A request's head is read strictly, because a proxy before us may read it in another way. An answer's head comes from an
engine that was configured, often one written by hand, and has no other reader than the daemon. So everything with only
one meaning is accepted in every form that the RFC allows a recipient to accept, and written anew in the plain form:

- lines that end with LF alone (2.2), and empty lines before the status line;
- a status line without a reason phrase, or with other white space between its words (4);
- white space between a field's name and the colon (5.1), folded lines (5.2), a bare CR or another control character
  within a line (2.2, and RFC 9110, 5.5): a space, or nothing.

A head with several meanings stays an error (``heads.parse_response_head``).
"""

from __future__ import annotations

import re

from vllmd.proxy.framing import BadFraming

MAX_RESPONSE_HEAD = 256 << 10  # bytes, those of 1xx answers before it included
# 101 is no interim answer: it is the last one in HTTP.
INTERIM = tuple(b"HTTP/1.%d 1%b" % (minor, code) for minor in (0, 1) for code in (b"00", b"02", b"03"))

IRREGULAR = re.compile(rb"(?<!\r)\n|\r(?!\n)|\r\n[ \t]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\n[^\r\n:]*[ \t]:")
NO_PHRASE = re.compile(rb"HTTP/\d\.\d [0-9]{3}\r\n")
SPACED = re.compile(rb"(HTTP/\d\.\d)[ \t]+([0-9]{3})(?:[ \t]+(.*))?")
PLAIN = re.compile(rb"HTTP/\d\.\d [0-9]{3} [^ \t]")
FOLD = re.compile(rb"(?<![ \t])[ \t]*\n[ \t]+")
CONTROL = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]")
NAME = re.compile(rb"^[^:\n]*(?=:)", re.MULTILINE)


def head_end(data: bytes | bytearray, start: int = 0) -> int:
    """The index after the blank line that ends a head, -1 if it has not come; no byte before ``start`` is looked at."""
    crlf = data.find(b"\n\r\n", start)
    lf = data.find(b"\n\n", start, crlf + 1 if crlf >= 0 else len(data))
    if lf >= 0:
        return lf + 2
    return crlf + 3 if crlf >= 0 else -1


def normalize_head(head: bytes) -> bytes:
    """``head``, which ends with its blank line, with every line as RFC 9112 writes it."""
    if IRREGULAR.search(head) is not None:
        text = head.replace(b"\r\n", b"\n").rstrip(b"\n")
        text = CONTROL.sub(b" ", FOLD.sub(b" ", text))
        status, _, fields = text.partition(b"\n")
        fields = NAME.sub(lambda name: name[0].rstrip(b" \t"), fields)
        head = (status + b"\n" + fields).rstrip(b"\n").replace(b"\n", b"\r\n") + b"\r\n\r\n"
    if not PLAIN.match(head):
        status, _, fields = head.partition(b"\r\n")
        if (words := SPACED.fullmatch(status.strip(b" \t"))) is not None:
            head = b"%b %b %b\r\n%b" % (words[1], words[2], words[3] or b"", fields)
    if NO_PHRASE.match(head):
        head = head.replace(b"\r\n", b" \r\n", 1)
    return head


class HeadCollector:
    """Collects one answer's head from pieces, in time that grows with its bytes; 1xx answers are left out."""

    __slots__ = ("_data", "_scanned", "_taken")

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the answer, for the next one."""
        self._data = bytearray()
        self._scanned = 0  # bytes that were searched already
        self._taken = 0  # bytes of 1xx answers

    @property
    def pending(self) -> bool:
        """Whether it has bytes of a head that is not whole."""
        return bool(self._data) or self._taken > 0

    def feed(self, data: bytes) -> tuple[bytes, int] | None:
        """All bytes in hand and where the head in them ends, or None. Raises BadFraming if it is too long."""
        self._data += data
        while True:
            held = self._data
            if held[:1].isspace() and not self._scanned:  # empty lines before the status line
                self._taken += 1
                del held[:1]
            elif (end := head_end(held, max(0, self._scanned - 2))) < 0:
                self._scanned = len(held)
                self._check(len(held))
                return None
            elif held.startswith(INTERIM):
                self._taken += end
                del held[:end]
                self._scanned = 0
            else:
                self._check(end)
                whole = bytes(held)
                self.reset()
                return whole, end
            self._check(0)

    def _check(self, more: int) -> None:
        if self._taken + more > MAX_RESPONSE_HEAD:
            raise BadFraming(f"the head is larger than {MAX_RESPONSE_HEAD} bytes")
