"""What an operator may follow: decisions as they are made, and the logs of engines. His verbs are ``verbs``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from vllmd.admin.control import Control
from vllmd.admin.verbs import into
from vllmd.api.codec import encoded
from vllmd.api.kinds import Count, Flag
from vllmd.api.verbs import MODEL, Param
from vllmd.proxy.http import Request, Response, event_stream

FIRST_LINE = 1.0  # seconds that an answer waits for the first line of a log
KEEP_ALIVE = 15.0  # seconds between comments in a stream of events

LOG = (
    MODEL,
    Param("lines", Count(0, 10_000), "how many of the last", default=50),
    Param("follow", Flag(), "and what comes", default=False),
)


@dataclass(frozen=True, slots=True)
class LogRequest:
    """What is asked for of a log."""

    model: str
    lines: int
    follow: bool


class StreamEndpoints:
    """``/admin/events`` and ``/admin/logs``; the caller has been found to be an operator."""

    def __init__(self, control: Control) -> None:
        self._control = control

    async def events(self, request: Request) -> Response:
        """``GET /admin/events``: decisions as server-sent events, as they are made."""
        return event_stream(framed(self._control.following.watch(), b"decisions and what becomes of them"))

    async def log(self, request: Request) -> Response:
        """``GET /admin/logs/{model}``; ``?lines=50&follow=true``. Plain text."""
        asked = into(LogRequest, LOG, request)
        model = self._control.status.resolve(asked.model, request.caller)
        follow = asked.follow and request.method != "HEAD"
        text = await _begun(self._control.following.log(model, asked.lines, follow=follow))
        return Response(200, _lines(text), "text/plain; charset=utf-8", (("x-accel-buffering", "no"),))


async def framed(events: AsyncIterator[object], about: bytes) -> AsyncIterator[bytes]:
    """Server-sent events, and a comment whenever nothing has happened for a while, so that nothing times out.

    ``about`` is the first comment: it opens the answer before anything has happened.
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


async def _begun(lines: AsyncIterator[str]) -> AsyncIterator[str]:
    """``lines`` with the first one fetched, if it comes soon: whatever is wrong is an error and not a broken answer."""
    first = asyncio.ensure_future(anext(lines, None))
    await asyncio.wait({first}, timeout=FIRST_LINE)
    return _from(first, lines) if not first.done() or first.result() is not None else _from(None, lines)


async def _from(first: asyncio.Future[str | None] | None, lines: AsyncIterator[str]) -> AsyncIterator[str]:
    try:
        line = await first if first else None
        while line is not None:
            yield line
            line = await anext(lines, None)
    finally:
        if first and not first.done():
            first.cancel()
        else:
            await _close(lines)


async def _close(lines: AsyncIterator[object]) -> None:
    """Let a generator that is not read to its end leave what it holds."""
    close = getattr(lines, "aclose", None)
    if close:
        await close()


async def _lines(text: AsyncIterator[str]) -> AsyncIterator[bytes]:
    async for line in text:
        yield line.encode("utf-8", "replace") + b"\n"
