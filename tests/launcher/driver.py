"""A client of a launcher that notes what it is told."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from vllmd.launcher.client import (
    ExitReport,
    LauncherClient,
    LauncherFailed,
    OnExit,
    OnLog,
    OnLost,
    OnWaiting,
    Running,
    StartOrder,
)

LIMIT = 60.0
_numbers = itertools.count()


class Driver:
    """Starts engines under fresh names, and waits for what should happen."""

    def __init__(self) -> None:
        self.client: LauncherClient
        self.exits: asyncio.Queue[ExitReport] = asyncio.Queue()
        self.lines: asyncio.Queue[str] = asyncio.Queue()
        self.lost = asyncio.Event()
        self.waiting: dict[str, int] = {}  # bytes that each standby holds, once it can be used

    @property
    def callbacks(self) -> tuple[OnExit, OnLog, OnLost, OnWaiting]:
        """What a client of the launcher is given to report to."""
        return self.exits.put_nowait, self.on_log, self.lost.set, self.waiting.__setitem__

    def on_log(self, instance: str, lines: list[str]) -> None:
        """Note each line."""
        for line in lines:
            self.lines.put_nowait(line)

    async def start(self, *argv: str, **order: Any) -> Running:
        """Start an engine; a single argument is a line for the shell."""
        command = argv if len(argv) > 1 else ("/bin/sh", "-c", *argv)
        return await self.client.start(StartOrder(order.pop("instance", fresh()), command, **order))

    async def exit(self) -> ExitReport:
        """The next report of an end."""
        return await asyncio.wait_for(self.exits.get(), LIMIT)

    async def end_all(self) -> None:
        """Leave nothing to the next test."""
        while running := await self.client.list():
            with contextlib.suppress(LauncherFailed):  # it has just ended by itself
                await self.client.kill(running[0].instance)
            await self.exit()

    async def line(self, wanted: str) -> None:
        """Wait until this line was logged."""
        async with asyncio.timeout(LIMIT):
            while await self.lines.get() != wanted:
                pass


def fresh() -> str:
    """A name that no engine has had."""
    return f"t-{os.getpid()}-{next(_numbers)}"


@contextlib.asynccontextmanager
async def connected(address: Path) -> AsyncIterator[Driver]:
    """A driver on a launcher's socket."""
    driver = Driver()
    driver.client = await LauncherClient.at(address, *driver.callbacks).open()
    try:
        yield driver
    finally:
        if not driver.lost.is_set():
            await driver.end_all()
        await driver.client.close()


@contextlib.asynccontextmanager
async def private(*options: str) -> AsyncIterator[Driver]:
    """A driver with a launcher of its own."""
    driver = Driver()
    driver.client = await LauncherClient.private(*driver.callbacks, options).open()
    try:
        yield driver
    finally:
        await driver.client.close()


async def until(condition: Callable[[], Any], limit: float = LIMIT) -> Any:
    """Wait until it is true, and return what it was."""
    async with asyncio.timeout(limit):
        while not (value := condition()):  # noqa: ASYNC110 - other processes make it true
            await asyncio.sleep(0.01)
    return value
