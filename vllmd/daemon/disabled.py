"""Models that operators have disabled, each with the message for its clients: a file of the daemon's own.

An order holds until ``vllmctl enable``, over restarts and idle exits; so it is no cache (``learnt.py``), which may be
deleted. The core forgets it with the daemon, and with a model that a reload takes away; this file is what it is told
again from.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path

from vllmd.core import events
from vllmd.daemon.state_files import state_file, write_whole
from vllmd.errors import Unavailable
from vllmd.frozen import frozen

log = logging.getLogger("vllmd")

NO_WORDS = "an operator has taken it out of use"


@frozen
class Order:
    """The message for clients, and the Unix time of the order."""

    message: str
    at: float


class Disabled:
    """The file; without a path orders end with the daemon."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._read = False
        self._orders: dict[str, Order] = {}  # by model, or replica
        self._unreadable = ""
        self._known: set[str] = set()  # to the core
        self._writing = asyncio.Lock()

    def load(self) -> None:
        """Read the file, once; if there is none, there are no orders. A file that cannot be read is left as it is."""
        if self._path is None or (self._read and not self._unreadable):
            return
        self._read = True
        try:
            orders = json.loads(self._path.read_text())["disabled"]
            self._orders = {str(name): Order(str(each["message"]), float(each["at"])) for name, each in orders.items()}
            self._unreadable = ""
        except FileNotFoundError:
            self._unreadable = ""
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._unreadable = f"{self._path} cannot be read ({error}); mend or remove it, then vllmctl reload"
            log.error("%s; models that it has disabled are served meanwhile", self._unreadable)

    def orders(self, names: Collection[str]) -> list[events.ModelDisabled]:
        """The orders for these models and replicas that the core does not have yet."""
        new = {name: order for name, order in self._orders.items() if name in names and name not in self._known}
        self._known |= new.keys()
        return [events.ModelDisabled(name, order.message) for name, order in new.items()]

    async def add(self, name: str, message: str) -> events.ModelDisabled:
        """Keep an order. Raises Unavailable, nothing changed, where it cannot be written."""
        async with self._writing:
            await self._write({**self._orders, name: Order(message or NO_WORDS, time.time())})
            self._known.add(name)
            return events.ModelDisabled(name, message or NO_WORDS)

    async def remove(self, *names: str) -> None:
        """These are in use again, or there no more. Raises Unavailable, nothing changed."""
        async with self._writing:
            if not self._orders.keys().isdisjoint(names):
                await self._write({name: order for name, order in self._orders.items() if name not in names})
                self._known.difference_update(names)

    async def _write(self, orders: Mapping[str, Order]) -> None:
        if self._unreadable:
            raise Unavailable(self._unreadable)
        if self._path is not None:
            text = json.dumps({"disabled": {name: asdict(order) for name, order in orders.items()}}, indent=1)
            try:
                await asyncio.to_thread(write_whole, self._path, text)
            except OSError as error:
                what = f"the order cannot be kept in {self._path}: {error.strerror}; nothing changed"
                raise Unavailable(what) from None
        self._orders = dict(orders)


def disabled_path(environment: Mapping[str, str], home: Path | None) -> Path | None:
    """Where the file is, see ``state_file``; VLLMD_DISABLED may say another place."""
    return state_file(environment, home, "VLLMD_DISABLED", "orders/disabled.json")
