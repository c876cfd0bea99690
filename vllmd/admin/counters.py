"""What has happened since the start, counted as it happens; ``metrics`` writes it down for Prometheus.

Plain dictionaries: counting a request costs two microseconds, and nothing has to
be imported before the first client is served.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Sequence

from vllmd.core.types import Decision
from vllmd.proxy.exchange import Exchange
from vllmd.proxy.tokens import Tokens

LATENCIES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Histogram:
    """Counts by upper bound (inclusive), in seconds."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float] = LATENCIES) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one more value, in seconds."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

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
        self.departures: Counter[tuple[str, ...]] = Counter()  # model, how (sleep, stop, freeze), cause

    def exchanged(self, exchange: Exchange) -> None:
        """Count a request that has ended: by route, and by model, key and error where it has them."""
        request, model, status = exchange.request, exchange.offer or exchange.model, str(exchange.status or 499)
        elapsed = time.monotonic() - exchange.began
        route = request.route.replace(":path", "") or "none"
        self.requests[route, request.method if request.route else "other", status] += 1
        times = [(self.durations[(route,)], elapsed)]
        if exchange.error:
            self.errors[model, exchange.error] += 1
        if request.caller.name:
            self.key_requests[(request.caller.name,)] += 1
        if model:
            self.model_requests[model, status] += 1
            times.append((self.model_durations[(model,)], elapsed))
            if exchange.first_byte is not None:
                times.append((self.first_bytes[(model,)], exchange.first_byte))
            self.received[(model,)] += request.received
            self.sent[(model,)] += exchange.sent
        for histogram, seconds in times:  # as ``observe`` does
            histogram.counts[bisect_left(histogram.bounds, seconds)] += 1
            histogram.total += seconds

    def login_failed(self, how: str) -> None:
        """An API key was wrong, or not looked at."""
        self.failed_logins[(how,)] += 1

    def waited(self, model: str, seconds: float) -> None:
        """A request was admitted after so long."""
        self.waits[(model,)].observe(seconds)

    def used(self, model: str, key: str, tokens: Tokens) -> None:
        """What a request took is known, or reckoned."""
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
