"""What has happened since the start, counted as it happens; ``exposition`` writes it down for Prometheus.

Plain dictionaries: nothing has to be imported before the first client is served. Requests are counted together, some
at a time (``recorded``).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from vllmd.core.types import Decision
from vllmd.proxy.exchange import Exchange
from vllmd.proxy.tokens import Tokens
from vllmd.records.ring import GONE, Entry

AT_A_TIME = 256  # requests that wait to be counted

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
        bounds, counts = self.bounds, self.counts
        for value in values:
            counts[bisect_left(bounds, value)] += 1
        self.total += sum(values)

    def buckets(self) -> list[tuple[str, float]]:
        """Cumulative, as Prometheus has them: ``(upper bound, count)``, the last one ``+Inf``."""
        found, sofar = [], 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            sofar += count
            found.append((bound, float(sofar)))
        return found


class Histograms(dict[tuple[str, ...], Histogram]):
    """One histogram for each combination of label values."""

    def __missing__(self, labels: tuple[str, ...]) -> Histogram:
        made = self[labels] = Histogram()
        return made


class Kind(NamedTuple):
    """What requests are counted by."""

    route: str
    method: str
    status: int
    model: str
    key: str
    error: str


class Measurements(NamedTuple):
    """What one request took: seconds, and bytes. ``first_byte``: None if it had no answer."""

    seconds: float
    first_byte: float | None
    received: int
    sent: int


class Counters:
    """The counters. Keys of each are tuples of label values."""

    def __init__(self) -> None:
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
        self._entries: list[Entry] = []  # of requests that are to be counted
        self._waits: list[tuple[str, float]] = []  # the same of their waits: model, seconds
        self._uses: list[tuple[str, str, Tokens]] = []  # and of what they took: model, key
        self.departures: Counter[tuple[str, ...]] = Counter()  # model, how (sleep, stop, freeze), cause

    def exchanged(self, exchange: Exchange) -> None:
        """Count a request that has ended and of which the record keeps nothing."""
        request, model = exchange.request, exchange.offer or exchange.model
        kind = Kind(request.route, request.method, exchange.status or GONE, model, request.caller.name, exchange.error)
        self._count(kind, [Measurements(exchange.elapsed, exchange.first_byte, request.received, exchange.sent)])

    def recorded(self, entry: Entry) -> None:
        """Count a request that has ended, by what the record keeps of it: several at a time, or when somebody looks.

        A busy daemon has thousands a second that differ in times and sizes alone.
        """
        self._entries.append(entry)
        if len(self._entries) >= AT_A_TIME:
            self.add_up()

    def add_up(self) -> None:
        """Count what has been recorded since; to be called before anything here is read."""
        entries, self._entries = self._entries, []
        kinds: dict[Kind, list[Measurements]] = {}
        for e in entries:
            kind = Kind(e.route, e.method, e.status, e.model, e.key, e.error)
            kinds.setdefault(kind, []).append(Measurements(e.seconds, e.first_byte, e.received, e.sent))
        for kind, several in kinds.items():
            self._count(kind, several)
        waits, self._waits, uses, self._uses = self._waits, [], self._uses, []
        for model, seconds in waits:
            self.waits[(model,)].observe(seconds)
        for use in uses:
            self._use(*use)

    def _count(self, kind: Kind, several: Sequence[Measurements]) -> None:
        """By route, and by model, key and error where they have them."""
        route, number, model, code = (
            kind.route.replace(":path", "") or "none",
            len(several),
            kind.model,
            str(kind.status),
        )
        times = [each.seconds for each in several]
        self.requests[route, kind.method if kind.route else "other", code] += number
        self.durations[(route,)].observe(*times)
        if kind.error:
            self.errors[model, kind.error] += number
        if kind.key:
            self.key_requests[(kind.key,)] += number
        if model:
            self.model_requests[model, code] += number
            self.model_durations[(model,)].observe(*times)
            self.first_bytes[(model,)].observe(*(each.first_byte for each in several if each.first_byte is not None))
            self.received[(model,)] += sum(each.received for each in several)
            self.sent[(model,)] += sum(each.sent for each in several)

    def login_failed(self, how: str) -> None:
        """An API key was wrong, or not looked at."""
        self.failed_logins[(how,)] += 1

    def waited(self, model: str, seconds: float) -> None:
        """A request was admitted after so long. It counts from the next ``add_up`` on."""
        self._waits.append((model, seconds))

    def used(self, model: str, key: str, tokens: Tokens) -> None:
        """What a request took is known, or reckoned. It counts from the next ``add_up`` on."""
        self._uses.append((model, key, tokens))

    def _use(self, model: str, key: str, tokens: Tokens) -> None:
        total, kinds = tokens.total, self.token_kinds
        self.tokens[(model,)] += total
        kinds[model, "prompt"] += tokens.prompt
        kinds[model, "answer"] += tokens.answer
        if tokens.cached:
            kinds[model, "cached"] += tokens.cached
        if tokens.estimated:
            kinds[model, "estimated"] += total
        if key:
            self.key_tokens[(key,)] += total

    def held(self, key: str, seconds: float) -> None:
        """A key's models held devices for so many seconds; half of one for a second is half a second."""
        if key:
            self.key_devices[(key,)] += seconds

    def decided(self, decision: Decision) -> None:
        """The core decided something about a model, or about one of its replicas."""
        self.decisions[decision.model, decision.what] += 1
        if decision.replica:
            self.replica_decisions[decision.model, decision.replica, decision.what] += 1
        if cause := decision.numbers.get("cause"):
            self.departures[decision.model, decision.what, str(cause)] += 1

    def retried(self, model: str, replica: str) -> None:
        """A request that this replica did not answer goes to another one."""
        self.retries[model, replica] += 1

    def changed(self, model: str, change: str, seconds: float, *, failed: bool) -> None:
        """A start, wake, sleep or stop came to its end after ``seconds``; or an engine exited unasked."""
        if failed:
            self.failures[model, change] += 1
        else:
            self.changes[model, change].observe(seconds)
