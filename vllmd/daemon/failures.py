"""Failed models, remembered by the next daemon: until they serve, an operator stops them, or their settings change.

The daemon exits when nobody is there, so what an operator finds in the morning is another one than that which saw a
start fail at night. What has failed is kept with the learnt figures (``learnt.py``), and told to the core of the next
daemon before the first request is let through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from vllmd.api.json_types import ForeignJson
from vllmd.config.types import ModelConfig
from vllmd.core import events
from vllmd.core.types import Snapshot, State
from vllmd.daemon.engine_process import fingerprint
from vllmd.frozen import frozen


@frozen
class Failure:
    """Why an engine of a model with that ``fingerprint`` failed, and when, in Unix time."""

    why: str
    at: float
    fingerprint: str

    @classmethod
    def read(cls, kept: ForeignJson) -> Failure:
        """One that was kept. Raises KeyError, TypeError, ValueError for what is none."""
        return cls(str(kept["why"]), float(kept["at"]), str(kept["fingerprint"]))


def failed(seen: Snapshot) -> frozenset[tuple[str, str]]:
    """The engines that are in error now, each with the reason."""
    return frozenset((each.id, each.failure) for each in seen.replicas if each.state is State.FAILED)


def failures_to_keep(
    seen: Snapshot, engines: Mapping[str, ModelConfig], before: Mapping[str, Failure], date: Callable[[float], float]
) -> dict[str, Failure]:
    """The failures to be written down. ``before``: those of the last time, whose times stay where the reason does.

    ``date``: of a moment of the core's clock, in Unix time.
    """
    failures = {}
    for each in seen.replicas:
        if each.state is State.FAILED and each.id in engines:
            known, of = before.get(each.id), fingerprint(engines[each.id])
            if known is None or (known.why, known.fingerprint) != (each.failure, of):
                known = Failure(each.failure, date(seen.at - (each.since or 0.0)), of)
            failures[each.id] = known
    return failures


def remembered(
    kept: Mapping[str, Failure], engines: Mapping[str, ModelConfig], now: float
) -> list[events.FailureRemembered]:
    """The events by which the core learns of earlier failures; not of engines whose settings have changed since."""
    return [
        events.FailureRemembered(engine, failure.why, max(0.0, now - failure.at))
        for engine, failure in kept.items()
        if engine in engines and fingerprint(engines[engine]) == failure.fingerprint
    ]
