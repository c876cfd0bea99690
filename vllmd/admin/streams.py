"""Streams for operators: decisions as they are made, and the logs of engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from vllmd.admin.control import Control
from vllmd.admin.verbs import into
from vllmd.api.codec import encoded
from vllmd.api.kinds import Count, Flag
from vllmd.api.verbs import MODEL, Param
from vllmd.frozen import frozen
from vllmd.proxy.http import Request, Response, event_stream

FIRST_LINE = 1.0  # seconds that an answer waits for the first line of a log
KEEP_ALIVE = 15.0  # seconds between comments in a stream of events

LOG = (
    MODEL,
    Param("lines", Count(0, 10_000), "how many of the last", default=50),
    Param("follow", Flag(), "and what comes", default=False),
)


@frozen
class LogRequest:
    """The path and query of ``GET /admin/logs/{model}``."""

    model: str
    lines: int
    follow: bool


class StreamEndpoints:
    """``/admin/events`` and ``/admin/logs``. The router has checked the caller's scope."""

    def __init__(self, control: Control) -> None:
        self._control = control

    async def events(self, request: Request) -> Response:
        """``GET /admin/events``: decisions as server-sent events, as they are made."""
        return event_stream(framed(self._control.following.watch(), b"decisions and what becomes of them"))

    async def log(self, request: Request) -> Response:
        """``GET /admin/logs/{model}``; ``?lines=50&follow=true``. Plain text."""
        query = into(LogRequest, LOG, request)
        model = self._control.status.resolve(query.model, request.caller)
        follow = query.follow and request.method != "HEAD"
        text = await begun(self._control.following.log(model, query.lines, follow=follow))
        return Response(200, text, "text/plain; charset=utf-8", (("x-accel-buffering", "no"),))


async def framed(events: AsyncIterator[object], about: bytes) -> AsyncIterator[bytes]:
    """Server-sent events, with a comment after each ``KEEP_ALIVE`` of silence, so that no proxy gives up.

    ``about``: the first comment, which opens the answer before the first event.
    """
    yield b": %b\n\n" % about
    coming = asyncio.ensure_future(anext(events))
    try:
        while True:
            done, _ = await asyncio.wait({coming}, timeout=KEEP_ALIVE)
            if done:
                yield b"data: " + encoded(coming.result()) + b"\n\n"
                coming = asyncio.ensure_future(anext(events))
            else:
                yield b": still here\n\n"
    finally:
        coming.cancel()
        await asyncio.wait({coming})
        await _close(events)


async def begun(lines: AsyncIterator[str]) -> AsyncIterator[bytes]:
    """The lines of a log as bytes, once the first one is there or ``FIRST_LINE`` has passed.

    So an error that comes at once, as of a model without an engine, is raised here and is an error answer, not an
    answer that breaks off.
    """
    first = asyncio.ensure_future(anext(lines, None))
    await asyncio.wait({first}, timeout=FIRST_LINE)
    if first.done():
        first.result()
    return _from(first, lines)


async def _from(first: asyncio.Future[str | None], lines: AsyncIterator[str]) -> AsyncIterator[bytes]:
    try:
        line = await first
        while line is not None:
            yield line.encode("utf-8", "replace") + b"\n"
            line = await anext(lines, None)
    finally:
        if not first.done():
            first.cancel()  # which closes the generator: it must not be closed while it runs
        else:
            await _close(lines)


async def _close(lines: AsyncIterator[object]) -> None:
    """Close a generator that is not read to its end, so that it releases its resources now."""
    close = getattr(lines, "aclose", None)
    if close:
        await close()
