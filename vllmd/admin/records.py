"""Streams of the records: ``/admin/events/requests``, ``/admin/trace``.

The last requests, recordings and use are verbs, see ``vllmd.api.verbs``. A caller sees the requests of its own key or,
with the scope read, of all keys; bodies only with the scope admin.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from vllmd.admin.control import Control
from vllmd.admin.schemas import doc, streams, takes
from vllmd.admin.streams import framed
from vllmd.admin.verbs import NDJSON, into, ndjson
from vllmd.api.answers import Arrival
from vllmd.api.kinds import Flag, Moment
from vllmd.api.verbs import WANTED, Param
from vllmd.frozen import frozen
from vllmd.proxy.access import Reach
from vllmd.proxy.http import Request, Response, event_stream
from vllmd.proxy.routing import Router
from vllmd.records.ring import Filter

TRACE = (
    Param("since", Moment(), "Unix time, or how long ago; 7d without it", default=None),
    Param("anonymised", Flag(), "numbered names, times from the first arrival on", default=False),
)


@frozen
class TraceRequest:
    """The query of ``GET /admin/trace``."""

    since: float | None
    anonymised: bool


def add_records(router: Router, control: Control) -> None:
    """Add the streams to the route table."""
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
        query = into(TraceRequest, TRACE, request)
        arrivals = self._control.records.trace(query.since, anonymised=query.anonymised)
        first = await anext(arrivals, None)  # raises what is wrong while the answer can still be an error

        async def every() -> AsyncIterator[Arrival]:
            if first is not None:
                yield first
            async for arrival in arrivals:
                yield arrival

        return Response(200, ndjson(every()), NDJSON)
