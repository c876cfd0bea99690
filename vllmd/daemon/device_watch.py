"""Finds out which devices there are, and again when the kernel says that something changed.

A driver may be slow (seconds on a machine without persistence mode), not loaded yet, broken until a reboot, or hang for
ever. None of that may hold up models that need no device, and none of it is taken for "there are none": the question is
asked again with growing pauses, and at once when udev speaks of a GPU.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping

from vllmd.gpu import Devices, Trouble, Uevents, Unanswered, gpus, in_thread

log = logging.getLogger("vllmd.devices")

PATIENCE = 1.0  # seconds that a start waits for the answer; models without devices are served from then on
RENEWAL = 5.0  # seconds that a reload waits for the devices
LIMIT = 30.0  # seconds without an answer after which a driver counts as dead
FIRST_PAUSE, LAST_PAUSE = 1.0, 60.0  # seconds between questions, doubling
SETTLE = 0.5  # seconds from a word of the kernel until nodes and driver are there

Open = Callable[[Mapping[str, int]], Devices]
Taken = Callable[[Devices], Awaitable[None]]


class DeviceWatch:
    """``open`` asks the drivers, given the indices that devices had before, by id; it may block."""

    def __init__(self, open: Open) -> None:
        self._open = open
        self._asked: asyncio.Future[Devices] | None = None
        self._turn = asyncio.Lock()  # held while one caller waits for an answer and takes it
        self._since = 0.0
        self._known: dict[str, int] = {}
        self._wanted = asyncio.Event()
        self.current: Devices = Unanswered("none", Trouble("the GPUs have not been asked for yet"), asking=True)

    async def begin(self, patience: float = PATIENCE) -> Devices:
        """The first answer; or, if it does not come within ``patience`` seconds, that it is being waited for."""
        self._take(await self._ask(patience))
        return self.current

    async def renew(self, open: Open, limit: float = RENEWAL) -> Devices | None:
        """The devices by another ``open``, which holds from now on; None if they do not answer soon enough.

        A driver that falls silent just then is the readings' to notice, as ever.
        """
        self._open = open
        fresh = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit), self._turn:
                if self._asked:  # by the former configuration
                    await asyncio.wait({self._asked})
                    self._asked = None
                fresh = await self._answer(limit)
        if fresh is None or fresh.asking or (fresh.trouble and fresh.source == self.current.source):
            self._wanted.set()
            return None
        self._take(fresh)
        return fresh

    async def run(self, taken: Taken) -> None:
        """For ever; ``taken`` is called with what is new."""
        words = Uevents()
        pause = FIRST_PAUSE
        try:
            while True:
                pause = await self._pause(words, pause)
                try:
                    await self._look(await self._ask(LIMIT), taken)
                except Exception:  # a defect, which must not end the watch
                    log.exception("the devices cannot be taken")
        finally:
            words.close()

    async def _pause(self, words: Uevents, pause: float) -> float:
        """Until there is a reason to ask. Returns the next pause."""
        if self.current.asking:
            return FIRST_PAUSE
        limit = pause if self.current.trouble else None
        spoken = asyncio.ensure_future(words.wait(limit))
        wanted = asyncio.ensure_future(self._wanted.wait())
        await asyncio.wait({spoken, wanted}, return_when=asyncio.FIRST_COMPLETED)
        is_told = self._wanted.is_set() or (spoken.done() and spoken.result())
        spoken.cancel()
        wanted.cancel()
        self._wanted.clear()
        if is_told:
            await asyncio.sleep(SETTLE)
            return FIRST_PAUSE
        return min(pause * 2, LAST_PAUSE)

    async def _ask(self, limit: float) -> Devices:
        async with self._turn:
            return await self._answer(limit)

    async def _answer(self, limit: float) -> Devices:
        """One question is under way at a time; one that hangs is waited for, not repeated."""
        if self._asked is None:
            known = dict(self._known)
            self._asked, self._since = in_thread(lambda: self._open(known)), time.monotonic()
        done, _ = await asyncio.wait({self._asked}, timeout=limit)
        if not done:
            passed = time.monotonic() - self._since
            why = f"the GPU driver has not answered for {passed:.0f} s"
            return Unanswered("nvml", Trouble(why, "dmesg says what it met"), asking=passed < LIMIT)
        answer, self._asked = self._asked, None
        try:
            return answer.result()
        except Exception as error:
            return Unanswered("nvml", Trouble(f"the devices cannot be opened: {type(error).__name__}: {error}"))

    async def _look(self, fresh: Devices, taken: Taken) -> None:
        """Take what is new. That a source falls silent after an answer is for the readings to notice."""
        before = self.current
        known = not before.trouble
        if known and fresh.trouble:
            await taken(before)
        elif all(
            (before.source == fresh.source, before.inventory() == fresh.inventory(),
             before.trouble == fresh.trouble, before.asking == fresh.asking)
        ):  # fmt: skip
            fresh.close()
        else:
            self._take(fresh)
            await taken(fresh)
            if known:
                before.close()

    def _take(self, devices: Devices) -> None:
        self.current = devices
        self._known |= {device.id: device.index for device in gpus(devices.inventory()) if device.runtime}
