"""The exposition of ``/metrics`` as a whole, for tests that read it."""

from __future__ import annotations

import asyncio

from vllmd.admin.control import Gauges
from vllmd.admin.counters import Counters
from vllmd.admin.exposition import expose_in_turns
from vllmd.proxy.large import in_turns


def exposed(counters: Counters, gauges: Gauges, accept: str) -> tuple[bytes, str]:
    """Body and content type."""
    return asyncio.run(in_turns(expose_in_turns(counters, gauges, accept)))
