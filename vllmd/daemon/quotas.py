"""The limits of API keys, and what each has used: requests at a time, requests and tokens per minute.

A bucket holds a minute's worth and fills steadily. A request takes one from the
requests' bucket when it arrives, and about its prompt from the tokens'; what it took
in all is known only afterwards, and then put right by the answer's usage, or by the
answer's size where the answer does not tell (a stream, unless it was asked to). So the tokens'
bucket may go below zero, and the key waits until it is above again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import field
from datetime import UTC, datetime

from vllmd.config.types import KeyConfig
from vllmd.daemon.keys import by_name
from vllmd.errors import TooManyRequests
from vllmd.frozen import frozen, mutable
from vllmd.proxy.tokens import BYTES_PER_EVENT, Tokens, prompt_tokens

MINUTE, DAY = 60.0, 86400  # seconds
LEFT = 3  # days, and months, whose use is remembered when the clock leaves them
Clock = Callable[[], float]


@mutable
class Spent:
    """What a key has used of this day and this month (UTC), by their numbers since 1970.

    ``left_days``, ``left_months``: tokens and seconds of those that the clock has left, in case it is set back to them.
    """

    day: int = 0
    month: int = 0
    tokens_today: float = 0.0
    tokens_this_month: float = 0.0
    device_today: float = 0.0  # seconds
    device_this_month: float = 0.0
    left_days: dict[int, tuple[float, float]] = field(default_factory=dict)
    left_months: dict[int, tuple[float, float]] = field(default_factory=dict)

    def add(self, wall: float, tokens: float, device: float) -> None:
        """Count so much more use by the key. ``wall`` is Unix time."""
        day = int(wall // DAY)
        if day != self.day:
            used = self.tokens_today, self.device_today
            self.tokens_today, self.device_today = _turn(self.left_days, self.day, used, day)
            self.day = day
            month = month_of(wall)
            if month != self.month:
                used = self.tokens_this_month, self.device_this_month
                self.tokens_this_month, self.device_this_month = _turn(self.left_months, self.month, used, month)
                self.month = month
        self.tokens_today += tokens
        self.tokens_this_month += tokens
        self.device_today += device
        self.device_this_month += device

    def over(self, key: KeyConfig, wall: float) -> tuple[str, float] | None:
        """The limit that the key has reached, in words, and the seconds until it begins anew; None for no limit."""
        self.add(wall, 0.0, 0.0)
        today, this_month = DAY - wall % DAY, month_begins(self.month + 1) - wall
        for used, limit, what, wait in (
            (self.tokens_this_month, key.tokens_per_month, "tokens per month", this_month),
            (self.device_this_month, key.device_seconds_per_month, "seconds of devices per month", this_month),
            (self.tokens_today, key.tokens_per_day, "tokens per day", today),
            (self.device_today, key.device_seconds_per_day, "seconds of devices per day", today),
        ):
            if limit is not None and used >= limit:
                return f"{limit} {what}", wait
        return None


def _turn(
    left: dict[int, tuple[float, float]], number: int, used: tuple[float, float], now: int
) -> tuple[float, float]:
    """Leave a day or month with its use, and return the use of the one that it is now."""
    found = left.pop(now, (0.0, 0.0))
    left[number] = used
    while len(left) > LEFT:
        del left[next(iter(left))]
    return found


def month_of(wall: float) -> int:
    """The number of the month of a Unix time (UTC)."""
    year, month = time.gmtime(wall)[:2]
    return year * 12 + month - 1


def month_begins(month: int) -> float:
    """The Unix time at which that month begins (UTC)."""
    return datetime(month // 12, month % 12 + 1, 1, tzinfo=UTC).timestamp()


class Bucket:
    """A minute's worth of something, filling steadily. ``now`` is in seconds, by any clock."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.capacity = float(per_minute)
        self._level = self.capacity
        self._at = now

    def wait(self, now: float, least: float) -> float:
        """Seconds until the bucket holds ``least``; 0.0 if it does."""
        self._level = min(self.capacity, self._level + (now - self._at) * self.capacity / MINUTE)
        self._at = now
        return max(0.0, (least - self._level) * MINUTE / self.capacity)

    def take(self, amount: float) -> None:
        """Take ``amount``, below zero if need be."""
        self._level -= amount


@mutable
class Quota:
    """One key's limits and use. Limits that are not set are not kept account of."""

    key: KeyConfig
    requests: Bucket | None
    tokens: Bucket | None
    spent: Spent
    wall: Clock
    running: int = 0

    @classmethod
    def of(cls, key: KeyConfig, now: float, spent: Spent, wall: Clock) -> Quota:
        """A quota of which nothing is used of this minute."""
        requests, tokens = key.requests_per_minute, key.tokens_per_minute
        minute = Bucket(requests, now) if requests else None, Bucket(tokens, now) if tokens else None
        return cls(key, *minute, spent, wall)

    def check(self, now: float) -> None:
        """Check that one more request is within the key's limits. Raises TooManyRequests."""
        key = self.key
        if key.concurrency and self.running >= key.concurrency:
            raise TooManyRequests(_limit(key, f"{key.concurrency} requests at a time"), retry_after=1)
        for bucket, least, what in ((self.requests, 1.0, "requests"), (self.tokens, 1.0, "tokens")):
            if bucket and (wait := bucket.wait(now, least)) > 0:
                text = _limit(key, f"{bucket.capacity:.0f} {what} per minute")
                raise TooManyRequests(text, retry_after=math.ceil(wait))
        if over := self.spent.over(key, self.wall()):
            raise TooManyRequests(_limit(key, over[0]), retry_after=math.ceil(over[1]))

    def take(self, body: bytes) -> Use:
        """Take what a request with this body takes at its arrival."""
        if self.requests:
            self.requests.take(1.0)
        use = Use(self, prompt_tokens(body) if self.tokens else 0)
        self.charge(use.prompt)
        self.running += 1
        return use

    def charge(self, tokens: float) -> None:
        """Charge the key for so many more tokens, in or out; a negative number gives back what was charged too much."""
        if self.tokens:
            self.tokens.take(tokens)


@frozen
class Use:
    """What one request takes of its key's quota. ``prompt``: tokens taken at its arrival."""

    quota: Quota
    prompt: int

    def abandon(self) -> None:
        """Give back the tokens of a request that was not admitted."""
        self.quota.running -= 1
        self.quota.charge(-self.prompt)

    def resume(self) -> None:
        """Count the request as running again, which failed before its answer; its tokens have been taken."""
        self.quota.running += 1

    def end(self, tokens: Tokens | None, size: int) -> None:
        """The request is over.

        ``tokens``: how many it took; None: unknown, and estimated from ``size``, the bytes of the answer.
        """
        self.quota.running -= 1
        if tokens is not None:
            self.quota.spent.add(self.quota.wall(), tokens.total, 0.0)
            self.quota.charge(tokens.total - self.prompt)
        elif size:
            estimate = max(1, size // BYTES_PER_EVENT)
            self.quota.spent.add(self.quota.wall(), estimate, 0.0)
            self.quota.charge(estimate)


class Quotas:
    """The quotas of all keys that have limits."""

    def __init__(self, keys: Sequence[KeyConfig], clock: Clock = time.monotonic, wall: Clock = time.time) -> None:
        """``wall`` gives Unix time, by which days and months go."""
        self.clock, self._wall = clock, wall
        self._spent: dict[str, Spent] = {}  # by key; kept also where a key has no limits, for it may be given some
        self.by_key: dict[str, Quota] = {}
        self.configure(keys)

    def configure(self, keys: Sequence[KeyConfig]) -> None:
        """Apply the keys of a new configuration; a key that did not change keeps its use of this minute."""
        was, now = self.by_key, self.clock()
        ranks = {key.name: (key.priority, key.share) for key in keys}
        self.ranks = {name: rank for name, rank in ranks.items() if rank != (0, 1)}
        self.by_key = {
            name: was[name]
            if name in was and was[name].key == key
            else Quota.of(key, now, self._spent.setdefault(name, Spent()), self._wall)
            for name, key in by_name(keys).items()
        }

    def spent(self, key: str, tokens: float, device: float) -> None:
        """Count tokens and device seconds that a key has used today: before this daemon, or without a request."""
        self._spent.setdefault(key, Spent()).add(self._wall(), tokens, device)

    def spent_this_month(self, key: str, tokens: float, device: float) -> None:
        """Count tokens and device seconds that a key has used on earlier days of this month."""
        spent = self._spent.setdefault(key, Spent())
        spent.add(self._wall(), 0.0, 0.0)
        spent.tokens_this_month += tokens
        spent.device_this_month += device

    def keep_alive(self, key: str, seconds: float, limit: float | None) -> float | None:
        """The seconds for which the key may keep a model, at most ``limit`` (None: any); None: it may not."""
        quota = self.by_key.get(key)
        for most in (limit, quota.key.keep_alive_limit if quota else None):
            if most is not None and most <= 0:
                return None
            seconds = seconds if most is None else min(seconds, most)
        return seconds

    def rank(self, key: str) -> tuple[int, int]:
        """The key's priority and share in queues."""
        return self.ranks.get(key, (0, 1))

    def begin(self, key: str, body: bytes) -> Use | None:
        """Begin a request of the key called ``key``; None if that has no limits. Raises TooManyRequests."""
        quota = self.by_key.get(key)
        if quota is None:
            return None
        quota.check(self.clock())
        return quota.take(body)


def _limit(key: KeyConfig, what: str) -> str:
    return f"the key {key.name!r} has reached its limit of {what}"
