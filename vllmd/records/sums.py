"""Use by hour, key and model, added up in memory until it is written down."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

HOUR, DAY = 3600, 86400  # seconds
MS_PER_HOUR = 1000 * HOUR
# What is added up, in this order everywhere; seconds of devices and engines, memory in MiB times seconds.
FIELDS = (
    "requests",
    "errors",
    "prompt",
    "cached",
    "answer",
    "estimated",
    "engine_seconds",
    "device_seconds",
    "memory_mib_seconds",
)
REQUESTS, ERRORS, PROMPT, CACHED, ANSWER, ESTIMATED, ENGINE, DEVICE, MEMORY = range(len(FIELDS))
MOST_ROWS = 20_000  # that wait to be written; more only gather while the store cannot be written

Row = tuple[int, str, str]  # hours since 1970 (UTC), key, model
# A request that has ended: when it came (Unix milliseconds), its model and key, the tokens of its prompt and of its
# answer, those that were cached, those that are estimated, the seconds at its engine, and whether it failed.
Ended = tuple[float, str, str, int, int, int, int, float, bool]


class Sums:
    """The sums since the last ``take``."""

    def __init__(self) -> None:
        self._rows: dict[Row, list[float]] = {}
        self.dropped = 0  # rows that could not wait any longer

    def __bool__(self) -> bool:
        return bool(self._rows)

    def add(self, requests: Sequence[Ended]) -> None:
        """Add requests that have ended, at least one. Nearly always all came in the same hour."""
        times = [request[0] for request in requests]
        first, last = int(min(times) // MS_PER_HOUR), int(max(times) // MS_PER_HOUR)
        if first == last:
            self._add_hour(first, requests)
            return
        for hour in {int(at // MS_PER_HOUR) for at in times}:
            self._add_hour(hour, [each for each in requests if each[0] // MS_PER_HOUR == hour])

    def _add_hour(self, hour: int, requests: Iterable[Ended]) -> None:
        groups: defaultdict[tuple[str, str], list[Ended]] = defaultdict(list)
        for request in requests:
            groups[request[2], request[1]].append(request)
        for (key, model), group in groups.items():
            _, _, _, prompts, answers, cached, estimated, seconds, failures = zip(*group, strict=True)
            row = self._row(hour, key, model)
            row[REQUESTS] += len(group)
            row[ERRORS] += sum(failures)
            row[PROMPT] += sum(prompts)
            row[CACHED] += sum(cached)
            row[ANSWER] += sum(answers)
            row[ESTIMATED] += sum(estimated)
            row[ENGINE] += sum(seconds)

    def held(self, at: float, key: str, model: str, device_seconds: float, memory: float) -> None:
        """Add the devices that a model has held, booked to this key."""
        row = self._row(int(at // HOUR), key, model)
        row[DEVICE] += device_seconds
        row[MEMORY] += memory

    @property
    def rows(self) -> Mapping[Row, list[float]]:
        """The sums since the last ``take``, by hour, key and model."""
        return self._rows

    def take(self) -> dict[Row, list[float]]:
        """The sums, which begin anew from now on."""
        rows, self._rows = self._rows, {}
        return rows

    def put_back(self, rows: Mapping[Row, Iterable[float]]) -> None:
        """Add what could not be written; the oldest rows are dropped beyond ``MOST_ROWS``."""
        for row, values in rows.items():
            mine = self._rows.setdefault(row, [0.0] * len(FIELDS))
            for index, value in enumerate(values):
                mine[index] += value
        for row in sorted(self._rows)[: max(0, len(self._rows) - MOST_ROWS)]:
            del self._rows[row]
            self.dropped += 1

    def _row(self, hour: int, key: str, model: str) -> list[float]:
        row = hour, key, model
        values = self._rows.get(row)
        if values is None:
            values = self._rows[row] = [0.0] * len(FIELDS)
        return values
