"""The page's files, read once, compressed once, and sent with a policy that lets nothing else in."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from vllmd.frozen import frozen
from vllmd.proxy.http import Pairs, Request, Response

STATIC = Path(__file__).with_name("static")
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Scripts and styles of our own files only, answers of our own address only. Images may be data, and sound a blob: what
# somebody tries a model with, and what it makes, is shown from the page itself.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS: Pairs = (
    ("content-security-policy", POLICY),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("cross-origin-opener-policy", "same-origin"),
    ("cross-origin-resource-policy", "same-origin"),
    ("cache-control", "no-cache"),  # the browser asks each time whether its copy is current: an upgrade shows at once
    ("vary", "accept-encoding"),
)


@frozen
class File:
    """A file of the page: as it is, compressed, its media type, and the tag that stands for its contents."""

    plain: bytes
    packed: bytes
    media_type: str
    tag: str


@functools.cache
def names() -> frozenset[str]:
    """The files that are served, by their paths below ``static/``; nothing else is looked for on the disk."""
    found = (path.relative_to(STATIC).as_posix() for path in STATIC.rglob("*") if path.suffix in TYPES)
    return frozenset(found)


@functools.cache
def read(name: str) -> File:
    """A file of ``names()``, kept in memory from its first use on."""
    import gzip  # the first page

    path = STATIC / name
    plain = path.read_bytes()
    tag = f'"{hashlib.sha256(plain).hexdigest()[:32]}"'
    return File(plain, gzip.compress(plain, mtime=0), TYPES[path.suffix], tag)


def answer(request: Request, name: str) -> Response:
    """The file, or 304 where the client has it."""
    file = read(name)
    headers = (*HEADERS, ("etag", file.tag))
    if file.tag in request.headers.get("if-none-match"):
        return Response(304, b"", file.media_type, headers)
    if "gzip" in request.headers.get("accept-encoding"):
        return Response(200, file.packed, file.media_type, (*headers, ("content-encoding", "gzip")))
    return Response(200, file.plain, file.media_type, headers)
