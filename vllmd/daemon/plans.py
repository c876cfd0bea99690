"""Plans: this machine's recorded traffic, simulated with other devices, models or rules beside how it is now.

It is computed by a process of its own (``simulate/what_if.py``), one at a time, with a bound on what it is given and on
how long it takes: the loop that serves requests only waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import vllmd
from vllmd.api.answers import Plan
from vllmd.api.codec import parse
from vllmd.daemon.current import Current, Later
from vllmd.errors import BadRequest, Conflict, NotFound, TookTooLong, Unavailable
from vllmd.records.trace import Arrival

if TYPE_CHECKING:
    from vllmd.daemon.back_end import BackEnd
    from vllmd.simulate.trace import Row

log = logging.getLogger("vllmd")

MOST_REQUESTS = 20_000  # a second of computing for each thousand, as a rule; the last ones count
LIMIT = 240.0  # seconds for both runs
SHOWN = 7 * 86400.0  # seconds back, where the question names no beginning
AS_IT_IS, CHANGED = "as it is", "with the change"


class Plans:
    """Implements ``vllmd.admin.control.Plans``."""

    def __init__(
        self,
        current: Current,
        back: Later[BackEnd],
        arrivals: Callable[[float, int], Awaitable[tuple[deque[Arrival], int]]],
        cache: Callable[[], Path],
    ) -> None:
        """``arrivals`` gives the last so many since then, models by their own names, and how many there were."""
        self._current = current
        self._back = back
        self._arrivals = arrivals
        self._cache = cache
        self._runs = False

    async def run(
        self,
        since: float | None,
        devices: str | None,
        policy: str | None,
        host_memory: str | None,
        models: Mapping[str, object],
    ) -> Plan:
        """Both runs. Raises BadRequest, UnknownModel, NotFound (nothing recorded), Conflict (one runs), TookTooLong."""
        from vllmd.config.what_if import what_if, with_devices
        from vllmd.simulate.baselines import ALL
        from vllmd.simulate.what_if import Question

        back = await self._back.wait()
        present = [device.memory for device in back.memory.inventory]
        if not present and not devices:
            raise BadRequest("there is no device here to plan for; say which, such as 80GiB,80GiB", param="devices")
        config = self._current.config
        base = with_devices(config, present)
        base = replace(base, host_memory=back.activity().host_memory)
        changed = what_if(base, devices or "", policy or "", host_memory or "", models, list(ALL))
        if self._runs:
            raise Conflict("another plan is being computed; one runs at a time")
        self._runs = True
        try:
            arrivals, number = await self._arrivals(time.time() - SHOWN if since is None else since, MOST_REQUESTS)
            if not arrivals:
                raise NotFound("nothing was recorded in that time that could be planned with")
            cases = [(AS_IT_IS, base)] if present else []
            cases += [(CHANGED, changed)] if changed != base or not present else []
            # Without secrets, and without what a plan does not need.
            cases = [
                (name, replace(each, auth=type(each.auth)(), origins={}, warnings=(), unfit=frozenset()))
                for name, each in cases
            ]
            import pickle  # few plan

            cache = self._cache()
            question = await asyncio.to_thread(lambda: pickle.dumps(Question(cases, rows_of(arrivals), cache)))
            plan = await _simulated(question)
        finally:
            self._runs = False
        if not plan.runs:
            raise NotFound(f"nothing that was recorded can be planned with: {plan.left_out}")
        return replace(plan, since=min(a.at for a in arrivals) / 1000, recorded=number)


def rows_of(arrivals: deque[Arrival]) -> list[Row]:
    """The trace, the first request at 0."""
    from vllmd.simulate.trace import Row  # the simulator is imported by the first plan

    ordered = sorted(arrivals)
    return [Row((a.at - ordered[0].at) / 1000, a.model, a.prompt, a.answer, a.key) for a in ordered]


async def _simulated(question: bytes) -> Plan:
    """Have another process simulate. It ends with the daemon, after ``LIMIT``, and when the client has gone.

    Raises BadRequest for a configuration that cannot be, TookTooLong, Unavailable.
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(vllmd.__file__).parents[1])}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "vllmd.simulate.what_if"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
        limit=1 << 24,
    )
    try:
        output, errors = await asyncio.wait_for(process.communicate(question), LIMIT)
    except TimeoutError:
        raise TookTooLong(f"the plan was not computed within {LIMIT:.0f} s; ask for a shorter time") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode != 0:
        log.error("a plan failed: %s", errors.decode(errors="replace"))
        raise Unavailable("the plan could not be computed; the daemon's log says why")
    answer = json.loads(output)
    if "error" in answer:
        raise BadRequest(str(answer["error"]))
    return parse(Plan, answer)
