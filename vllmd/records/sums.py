"""Use by hour, key and model, added up in memory until it is written down."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from vllmd.proxy.tokens import Tokens

HOUR, DAY = 3600, 86400  # seconds
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


class Sums:
    """The sums since the last ``take``."""

    def __init__(self) -> None:
        self._rows: dict[Row, list[float]] = {}
        self.dropped = 0  # rows that could not wait any longer

    def __bool__(self) -> bool:
        return bool(self._rows)

    def request(self, at: float, key: str, model: str, tokens: Tokens | None, engine: float, *, failed: bool) -> None:
        """Add a request that has ended ``at`` this Unix time, after ``engine`` seconds at its engine."""
        row = self._rows.get((int(at // HOUR), key, model)) or self._row(at, key, model)
        row[REQUESTS] += 1
        row[ENGINE] += engine
        if failed:
            row[ERRORS] += 1
        if tokens is not None:
            row[PROMPT] += tokens.prompt
            row[ANSWER] += tokens.answer
            row[CACHED] += tokens.cached
            if tokens.estimated:
                row[ESTIMATED] += tokens.prompt + tokens.answer

    def held(self, at: float, key: str, model: str, device_seconds: float, memory: float) -> None:
        """Add the devices that a model has held, booked to this key."""
        row = self._row(at, key, model)
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

    def _row(self, at: float, key: str, model: str) -> list[float]:
        row = int(at // HOUR), key, model
        values = self._rows.get(row)
        if values is None:
            values = self._rows[row] = [0.0] * len(FIELDS)
        return values
