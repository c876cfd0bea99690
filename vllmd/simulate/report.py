"""What came of a run: counts, waits, latencies, utilisation, memory; over all and per model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from vllmd.core.types import Device
from vllmd.frozen import frozen
from vllmd.simulate.engine import Job


@frozen
class Sample:
    """The memory at an instant, bytes: promised per device, and of the host; and how many requests waited."""

    at: float
    promised: Mapping[int, int]
    host: int
    queued: int


@frozen
class Spread:
    """How a time is spread over requests, in seconds."""

    mean: float = 0.0
    p50: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
    longest: float = 0.0


@frozen
class Figures:
    """Of all requests, or of one model's.

    ``requests`` = ``served`` + ``failed``. ``wait`` is from arrival until an
    engine works on it, ``latency`` until its last token; both of those served,
    but a request that failed after waiting counts in ``wait`` as well, so that
    giving up on somebody never looks like serving him sooner.
    """

    requests: int
    served: int
    failed: int
    swaps: int  # starts and wakes
    frozen: int  # times that a request was frozen
    wait: Spread
    latency: Spread
    tokens: int  # of the answers that were completed


@frozen
class Report:
    """One policy over one trace."""

    policy: str
    length: float  # seconds from the first arrival to the last end
    all: Figures
    models: Mapping[str, Figures]
    busy: Mapping[int, float]  # share of the time that a device worked on requests
    memory: Mapping[int, float]  # mean share of a device's memory that was promised
    errors: Mapping[str, int]  # why requests failed
    samples: Sequence[Sample]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        return asdict(self)


def summary(
    policy: str,
    devices: Sequence[Device],
    jobs: Sequence[Job],
    swaps: Mapping[str, int],
    samples: Sequence[Sample],
    busy: Mapping[int, float],
) -> Report:
    """The report of one run: figures of all requests, by model, and of every device."""
    length = max((job.ended for job in jobs), default=0.0)
    by_model: dict[str, list[Job]] = {name: [] for name in swaps}
    errors: dict[str, int] = {}
    for job in jobs:
        by_model[job.model].append(job)
        if job.error:
            errors[job.error] = errors.get(job.error, 0) + 1
    models = {name: figures(mine, swaps[name]) for name, mine in by_model.items()}
    share = {index: seconds / length if length else 0.0 for index, seconds in busy.items()}
    return Report(
        policy, length, figures(jobs, sum(swaps.values())), models, share, _memory(devices, samples), errors, samples
    )


def _memory(devices: Sequence[Device], samples: Sequence[Sample]) -> dict[int, float]:
    count = max(1, len(samples))
    return {d.index: sum(s.promised.get(d.index, 0) for s in samples) / count / d.memory for d in devices}


def figures(jobs: Sequence[Job], swaps: int) -> Figures:
    """Count these requests, and how long they waited (seconds)."""
    served = [job for job in jobs if not job.error]
    return Figures(
        requests=len(jobs),
        served=len(served),
        failed=len(jobs) - len(served),
        swaps=swaps,
        frozen=sum(job.frozen for job in jobs),
        wait=spread([(job.began if job.began >= 0 else job.ended) - job.arrived for job in jobs]),
        latency=spread([job.ended - job.arrived for job in served]),
        tokens=sum(job.output for job in served),
    )


def spread(times: Sequence[float]) -> Spread:
    """Mean, percentiles (nearest rank) and the longest; zeros where there are none."""
    if not times:
        return Spread()
    ordered = sorted(times)
    return Spread(
        sum(ordered) / len(ordered),
        _rank(ordered, 50),
        _rank(ordered, 95),
        _rank(ordered, 99),
        ordered[-1],
    )


def _rank(ordered: Sequence[float], percent: int) -> float:
    """The nearest rank: the smallest value that at least ``percent`` of a hundred do not exceed."""
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]
