"""Streams of the operator's: they are kept alive, and leave nothing behind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from vllmd.admin import streams
from vllmd.errors import Unavailable

Script = Callable[[], Awaitable[None]]


class Source:
    """What is streamed, and whether its reader has let go of it."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        self.left = False

    async def items(self) -> AsyncIterator[Any]:
        try:
            while (item := await self.queue.get()) is not None:
                yield item
        finally:
            self.left = True


def test_events_are_kept_alive_and_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quiet hour must not look like a dead connection to a proxy in between."""
    monkeypatch.setattr(streams, "KEEP_ALIVE", 0.001)

    async def script() -> None:
        source = Source()
        stream = streams.framed(source.items(), b"decisions and what becomes of them")
        assert (await anext(stream)).startswith(b": decisions")
        assert await anext(stream) == b": still here\n\n"
        source.queue.put_nowait({"what": "start"})
        while (piece := await anext(stream)).startswith(b":"):
            pass
        assert piece.startswith(b"data: ") and json.loads(piece[6:]) == {"what": "start"}
        await stream.aclose()  # type: ignore[attr-defined]
        assert source.left

    asyncio.run(script())


def test_a_log_that_cannot_be_had_is_an_error_and_not_a_broken_answer() -> None:
    """The status line is sent only when the first line is there."""

    async def none() -> AsyncIterator[str]:
        raise Unavailable("no engine")
        yield ""

    with pytest.raises(Unavailable):
        asyncio.run(streams.begun(none()))  # type: ignore[arg-type]


@pytest.mark.parametrize("limit", [0.0, 5.0])
def test_a_log_is_passed_on_whole_and_let_go_of(monkeypatch: pytest.MonkeyPatch, limit: float) -> None:
    """Whether its first line was waited for or not."""
    monkeypatch.setattr(streams, "FIRST_LINE", limit)

    async def script() -> None:
        source = Source()
        for line in ("a", "b", "c"):
            source.queue.put_nowait(line)
        lines = await streams.begun(source.items())
        assert [await anext(lines), await anext(lines)] == [b"a\n", b"b\n"]
        await lines.aclose()  # type: ignore[attr-defined]
        assert source.left

    asyncio.run(script())


def test_an_empty_log_is_an_empty_answer() -> None:
    """An engine that has not said anything and is gone."""

    async def script() -> None:
        source = Source()
        source.queue.put_nowait(None)
        assert [line async for line in await streams.begun(source.items())] == []

    asyncio.run(script())
