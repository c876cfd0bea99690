"""The counters since the daemon's start; ``exposition`` writes them for Prometheus.

They are plain dictionaries, since the first client shall not wait for the import of a metrics library. A busy daemon
ends thousands of requests in a second that differ in times and sizes alone, so requests are noted and counted some at a
time: by each ``AT_A_TIME``, and before a scrape reads (``add_up``).
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from vllmd.core.types import Decision
from vllmd.proxy.exchange import Exchange
from vllmd.proxy.tokens import Tokens
from vllmd.records.ring import GONE, Entry, field

AT_A_TIME = 256  # requests counted together

LATENCIES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Histogram:
    """Counts by upper bound (inclusive), in seconds."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float] = LATENCIES) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, *values: float) -> None:
        """Count more values, in seconds."""
        # Sorted, they take one search for each bound instead of one for each value.
        counts, ordered, before = self.counts, sorted(values), 0
        for index, bound in enumerate(self.bounds):
            below = bisect_right(ordered, bound)
            counts[index] += below - before
            before = below
        counts[-1] += len(ordered) - before
        self.total += sum(values)

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative, as Prometheus has them: ``(upper bound, count)``, the last one ``+Inf``."""
        bounds = (*map(str, self.bounds), "+Inf")
        return list(zip(bounds, map(float, itertools.accumulate(self.counts)), strict=True))


class Histograms(dict[tuple[str, ...], Histogram]):
    """One histogram for each combination of label values."""

    def __missing__(self, labels: tuple[str, ...]) -> Histogram:
        made = self[labels] = Histogram()
        return made


class Kind(NamedTuple):
    """The labels by which requests are counted."""

    route: str
    method: str
    status: int
    model: str
    key: str
    error: str


class Measurements(NamedTuple):
    """The times (seconds) and sizes (bytes) of requests of one kind. ``first_byte``: of those that had an answer."""

    seconds: Sequence[float]
    first_byte: Sequence[float]
    received: int
    sent: int


_kind, _seconds, _first_byte = field(*Kind._fields), field("seconds"), field("first_byte")
_received, _sent = field("received"), field("sent")


class Counters:
    """The counters. Keys of each are tuples of label values."""

    def __init__(self, is_served: Callable[[str], bool] = lambda model: True) -> None:
        """``is_served``: whether a model, or what else is offered, is called that.

        A request for any other, whose fetching has failed, is counted as one without a model: clients choose the names.
        """
        self._is_served = is_served
        self.requests: Counter[tuple[str, ...]] = Counter()  # route, method, code
        self.durations = Histograms()  # route
        self.model_requests: Counter[tuple[str, ...]] = Counter()  # model, code
        self.model_durations = Histograms()  # model
        self.first_bytes = Histograms()  # model
        self.waits = Histograms()  # model
        self.received: Counter[tuple[str, ...]] = Counter()  # model
        self.sent: Counter[tuple[str, ...]] = Counter()  # model
        self.tokens: Counter[tuple[str, ...]] = Counter()  # model
        self.token_kinds: Counter[tuple[str, ...]] = Counter()  # model, kind: prompt, answer, cached, estimated
        self.errors: Counter[tuple[str, ...]] = Counter()  # model, kind
        self.failed_logins: Counter[tuple[str, ...]] = Counter()  # how: wrong, unseen
        self.key_requests: Counter[tuple[str, ...]] = Counter()  # key
        self.key_tokens: Counter[tuple[str, ...]] = Counter()  # key
        self.key_devices: defaultdict[tuple[str, ...], float] = defaultdict(float)  # key: seconds
        self.changes = Histograms()  # model, change: start, wake, sleep, stop
        self.failures: Counter[tuple[str, ...]] = Counter()  # model, change (exit: unasked)
        self.decisions: Counter[tuple[str, ...]] = Counter()  # model, decision
        self.replica_decisions: Counter[tuple[str, ...]] = Counter()  # model, replica, decision
        self.retries: Counter[tuple[str, ...]] = Counter()  # model, replica
        self.departures: Counter[tuple[str, ...]] = Counter()  # model, how (sleep, stop, freeze), cause
        # Noted, to be counted by ``add_up``:
        self._entries: list[Entry] = []
        self._waits: defaultdict[str, list[float]] = defaultdict(list)  # by model: seconds
        self._uses: defaultdict[tuple[str, str], list[Tokens]] = defaultdict(list)  # by model and key

    def exchanged(self, exchange: Exchange) -> None:
        """Count a request that has ended and of which the record keeps nothing."""
        request, model = exchange.request, exchange.offer or exchange.model
        kind = Kind(request.route, request.method, exchange.status or GONE, model, request.caller.name, exchange.error)
        first_byte = [] if exchange.first_byte is None else [exchange.first_byte]
        self._count(kind, Measurements([exchange.elapsed], first_byte, request.received, exchange.sent))

    def recorded(self, entry: Entry) -> None:
        """Note a request that has ended, by its entry in the record."""
        self._entries.append(entry)
        if len(self._entries) >= AT_A_TIME:
            self.add_up()

    def add_up(self) -> None:
        """Count what has been noted since the last time; must be called before any counter is read."""
        entries, self._entries = self._entries, []
        kinds: defaultdict[tuple[object, ...], list[Entry]] = defaultdict(list)
        for entry in entries:
            kinds[_kind(entry)].append(entry)
        for kind, several in kinds.items():
            seconds = sorted(map(_seconds, several))  # once for all histograms
            first_bytes = [first_byte for first_byte in map(_first_byte, several) if first_byte is not None]
            received, sent = sum(map(_received, several)), sum(map(_sent, several))
            self._count(Kind._make(kind), Measurements(seconds, first_bytes, received, sent))
        for model, waits in self._waits.items():
            self.waits[(model,)].observe(*waits)
        for (model, key), uses in self._uses.items():
            self._count_tokens(model, key, uses)
        self._waits.clear()
        self._uses.clear()

    def _count_tokens(self, model: str, key: str, uses: Sequence[Tokens]) -> None:
        prompt, answer = sum([each.prompt for each in uses]), sum([each.answer for each in uses])
        cached = sum([each.cached for each in uses])
        estimated = [each.total for each in uses if each.estimated]
        self.tokens[(model,)] += prompt + answer
        self.token_kinds[model, "prompt"] += prompt
        self.token_kinds[model, "answer"] += answer
        if cached:
            self.token_kinds[model, "cached"] += cached
        if estimated:
            self.token_kinds[model, "estimated"] += sum(estimated)
        if key:
            self.key_tokens[(key,)] += prompt + answer

    def _count(self, kind: Kind, measured: Measurements) -> None:
        """Count requests of one kind by route, and by model, key and error where they have them."""
        route, code = kind.route.replace(":path", "") or "none", str(kind.status)
        model = kind.model if self._is_served(kind.model) else ""
        number = len(measured.seconds)
        self.requests[route, kind.method if kind.route else "other", code] += number
        self.durations[(route,)].observe(*measured.seconds)
        if kind.error:
            self.errors[model, kind.error] += number
        if kind.key:
            self.key_requests[(kind.key,)] += number
        if model:
            self.model_requests[model, code] += number
            self.model_durations[(model,)].observe(*measured.seconds)
            self.first_bytes[(model,)].observe(*measured.first_byte)
            self.received[(model,)] += measured.received
            self.sent[(model,)] += measured.sent

    def login_failed(self, how: str) -> None:
        """Count an API key that was wrong, or not checked after too many wrong ones (``how``)."""
        self.failed_logins[(how,)] += 1

    def waited(self, model: str, seconds: float) -> None:
        """Note how long a request waited for its admission."""
        self._waits[model].append(seconds)

    def used(self, model: str, key: str, tokens: Tokens) -> None:
        """Note the tokens of a request, as its answer has them or as they are estimated."""
        self._uses[model, key].append(tokens)

    def held(self, key: str, seconds: float) -> None:
        """Count device seconds of a key: half of a device's memory held for a second is half a second."""
        if key:
            self.key_devices[(key,)] += seconds

    def decided(self, decision: Decision) -> None:
        """Count a decision about a model, or about one of its replicas."""
        self.decisions[decision.model, decision.what] += 1
        if decision.replica:
            self.replica_decisions[decision.model, decision.replica, decision.what] += 1
        if cause := decision.numbers.get("cause"):
            self.departures[decision.model, decision.what, str(cause)] += 1

    def retried(self, model: str, replica: str) -> None:
        """Count a request that this replica did not answer, and that goes to another one."""
        self.retries[model, replica] += 1

    def changed(self, model: str, change: str, seconds: float, *, failed: bool) -> None:
        """Count a start, wake, sleep or stop that ended after ``seconds``, or an exit that nobody ordered."""
        if failed:
            self.failures[model, change] += 1
        else:
            self.changes[model, change].observe(seconds)
