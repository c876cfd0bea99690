"""What is followed of requests, and exported: ``/admin/events/requests``, ``/admin/trace``.

What is asked once (the last requests, recordings, use) are rows of ``vllmd.api.verbs``. A caller sees what its key
may: the requests of its own key or, with the scope read, of all; bodies only with admin.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from vllmd.admin.control import Control
from vllmd.admin.schemas import doc, streams, takes
from vllmd.admin.streams import framed
from vllmd.admin.verbs import NDJSON, into
from vllmd.api.answers import Arrival
from vllmd.api.codec import encoded
from vllmd.api.kinds import Flag, Moment
from vllmd.api.verbs import WANTED, Param
from vllmd.proxy.access import Reach
from vllmd.proxy.http import Request, Response, event_stream
from vllmd.proxy.routing import Router
from vllmd.records.ring import Filter

TRACE = (
    Param("since", Moment(), "Unix time, or how long ago; 7d without it", default=None),
    Param("anonymised", Flag(), "numbered names, times from the first arrival on", default=False),
)


@dataclass(frozen=True, slots=True)
class Exported:
    """What is asked for of a trace."""

    since: float | None
    anonymised: bool


def add_records(router: Router, control: Control) -> None:
    """The routes of what comes piece by piece."""
    ends = RecordsEndpoints(control)
    router.add("GET", "/admin/events/requests", ends.watch, "read", "Requests as they end", doc(
        streams("text/event-stream", "events whose data is a RequestEntry"), takes(WANTED)),
        Reach.EACH)  # fmt: skip
    router.add("GET", "/admin/trace", ends.trace, "read", "Arrivals, as vllmctl simulate reads them", doc(
        streams(NDJSON, "a line for each, an Arrival"), takes(TRACE)), Reach.MACHINE)  # fmt: skip


class RecordsEndpoints:
    """The handlers of requests as they end, and of traces."""

    def __init__(self, control: Control) -> None:
        self._control = control

    async def watch(self, request: Request) -> Response:
        """``GET /admin/events/requests``: requests as they end, as server-sent events."""
        events = self._control.records.watch(into(Filter.of, WANTED, request), request.caller)
        return event_stream(framed(events, b"requests as they end"))

    async def trace(self, request: Request) -> Response:
        """``GET /admin/trace``: arrivals, a JSON object a line."""
        asked = into(Exported, TRACE, request)
        found = self._control.records.trace(asked.since, anonymised=asked.anonymised)
        first = await anext(found, None)  # what cannot be is an error, not a stream
        return Response(200, _lines(first, found), NDJSON)


async def _lines(first: Arrival | None, rest: AsyncIterator[Arrival]) -> AsyncIterator[bytes]:
    if first is not None:
        yield encoded(first) + b"\n"
    async for line in rest:
        yield encoded(line) + b"\n"
