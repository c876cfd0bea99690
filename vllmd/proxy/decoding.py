"""Decode request bodies to plain UTF-8, before they are parsed.

``Content-Encoding`` gzip, deflate or zstd (Codex sends zstd), and JSON in UTF-16 or UTF-32: by the Content-Type, by a
byte-order mark, or by the places of its NULs, as Python's own reader does it. The decoded body has the limit of any
body, and is counted as it grows: a body of a kilobyte that would become a terabyte is refused early. The work is done
in turns of the event loop, and the engine gets the decoded body.

zstd is libzstd's (``zstd``): every Linux with a package manager has it, and no Python before 3.14 does.
"""

from __future__ import annotations

import codecs
import re
import zlib
from collections.abc import Callable, Iterator

from vllmd.errors import BadRequest, TooLarge
from vllmd.proxy.peek import Turns

PIECE_BYTES = 64 << 10  # decoded between two turns
MAX_MEMBERS = 10_000  # of a gzip file; a body has room for millions of empty ones, of twenty bytes each
CODINGS = ("gzip", "x-gzip", "deflate", "zstd")
CHARSET = re.compile(r';\s*charset\s*=\s*"?([A-Za-z0-9_-]+)"?', re.IGNORECASE)
BOMS = (  # the longer ones first: UTF-32's begins like UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
WIDE = {"utf16": "utf-16-be", "utf16le": "utf-16-le", "utf16be": "utf-16-be", "ucs2": "utf-16-be",
        "utf32": "utf-32-be", "utf32le": "utf-32-le", "utf32be": "utf-32-be"}  # fmt: skip
NULS: dict[
    tuple[bool, ...], str
] = {  # where they are in the first four bytes of JSON, which begins with a character of ASCII
    (True, True, True, False): "utf-32-be",
    (False, True, True, True): "utf-32-le",
    (True, False, True, False): "utf-16-be",
    (False, True, False, True): "utf-16-le",
    (True, False, False, False): "utf-16-be",  # the second character is none of ASCII
    (False, True, False, False): "utf-16-le",
}


def decode_body(body: bytes, coding: str, most: int, grew: Callable[[int], None]) -> Turns[bytes]:
    """``body`` without its Content-Encoding. ``grew`` is called with the length of the plain body so far.

    Raises BadRequest for a coding that is not known or a body that is not in it, TooLarge beyond ``most`` bytes.
    """
    codings = {"gzip": _zlib, "x-gzip": _zlib, "deflate": _zlib, "zstd": _zstd}
    decoder = codings.get(coding.strip().lower())
    if decoder is None:
        known = ", ".join(CODINGS)
        raise BadRequest(f"the Content-Encoding {coding[:100]!r} is not known; send the body without one, or {known}")
    out = bytearray()
    for piece in decoder(body):
        out += piece
        if len(out) > most:
            raise TooLarge(f"the body is larger than {most} bytes when it is decoded")
        grew(len(out))
        yield
    return bytes(out)


def _zlib(body: bytes) -> Iterator[bytes]:
    """gzip of one or more members, zlib, and bare deflate, which some clients send under the name of zlib."""
    view, bits = memoryview(body), 47  # 47: gzip or zlib, whichever it is
    if body[:2] != b"\x1f\x8b" and not (len(body) > 1 and body[0] & 15 == 8 and (body[0] << 8 | body[1]) % 31 == 0):
        bits = -15
    pos = members = 0
    while pos < len(view):
        members += 1
        if members > MAX_MEMBERS:
            raise BadRequest(f"the compressed body has more than {MAX_MEMBERS} members")
        member = zlib.decompressobj(bits)
        rest: bytes | memoryview = b""
        try:
            while not member.eof:
                if not rest:
                    # A piece, not all of the rest: zlib copies what follows a member, which for many small members
                    # would be quadratic.
                    rest = view[pos : pos + PIECE_BYTES]
                    pos += len(rest)
                piece = member.decompress(rest, PIECE_BYTES)
                if not piece and not member.unconsumed_tail and not member.eof and pos == len(view):
                    raise BadRequest("the compressed body ends in the middle")
                rest = member.unconsumed_tail
                yield piece
        except zlib.error as error:
            raise BadRequest(f"the body is not compressed as its Content-Encoding says: {error}") from None
        pos -= len(member.unused_data)


def _zstd(body: bytes) -> Iterator[bytes]:
    from vllmd.proxy import zstd  # few clients compress, and ctypes takes memory

    yield from zstd.decompressed(body, PIECE_BYTES)


def charset_of(body: bytes, content_type: str) -> str:
    """The charset of a JSON body where it is not plain UTF-8, "" where it is: by its mark, its NULs or declaration."""
    for bom, charset in BOMS:
        if body.startswith(bom):
            return charset
    if (nuls := tuple(not byte for byte in body[:4])) in NULS:
        return NULS[nuls]
    declared = CHARSET.search(content_type) if "charset" in content_type.lower() else None
    return WIDE.get(re.sub("[-_]", "", declared[1].lower()), "") if declared else ""


def to_utf8(body: bytes, charset: str, most: int, grew: Callable[[int], None]) -> Turns[bytes]:
    """``body``, which is in ``charset``, as UTF-8 without a mark. Raises BadRequest, TooLarge."""
    decoder = codecs.getincrementaldecoder(charset)()
    out = bytearray()
    try:
        for at in range(0, len(body), PIECE_BYTES):
            text = decoder.decode(body[at : at + PIECE_BYTES], at + PIECE_BYTES >= len(body))
            out += (text.removeprefix("\ufeff") if not at else text).encode()
            if len(out) > most:
                raise TooLarge(f"the body is larger than {most} bytes when it is decoded")
            grew(len(out))
            yield
    except UnicodeError as error:
        raise BadRequest(f"the body is not {charset}: {error}") from None
    return bytes(out)
