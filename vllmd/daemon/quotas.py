"""The limits of API keys, and what each has used: requests at a time, requests and tokens per minute.

A bucket holds a minute's worth and fills steadily. A request takes one from the
requests' bucket when it arrives, and about its prompt from the tokens'; what it took
in all is known only afterwards, and then put right by the answer's usage, or by the
answer's size where that does not tell (a stream, unless it was asked to). So the tokens'
bucket may go below zero, and the key waits until it is above again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllmd.config.types import KeyConfig
from vllmd.daemon.keys import by_name
from vllmd.errors import TooManyRequests
from vllmd.proxy.tokens import BYTES_PER_EVENT, Tokens, prompt_tokens

MINUTE = 60.0  # seconds
Clock = Callable[[], float]


class Bucket:
    """A minute's worth of something, filling steadily. ``now`` is in seconds, by any clock."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.capacity = float(per_minute)
        self._level = self.capacity
        self._at = now

    def wait(self, now: float, least: float) -> float:
        """Seconds until it holds ``least``; 0.0 if it does."""
        self._level = min(self.capacity, self._level + (now - self._at) * self.capacity / MINUTE)
        self._at = now
        return max(0.0, (least - self._level) * MINUTE / self.capacity)

    def take(self, amount: float) -> None:
        """Take it, whether it is there or not."""
        self._level -= amount


@dataclass
class Quota:
    """One key's limits and use. Limits that are not set are not kept account of."""

    key: KeyConfig
    requests: Bucket | None
    tokens: Bucket | None
    running: int = 0

    @classmethod
    def of(cls, key: KeyConfig, now: float) -> Quota:
        """A fresh one, everything unused."""
        requests, tokens = key.requests_per_minute, key.tokens_per_minute
        return cls(key, Bucket(requests, now) if requests else None, Bucket(tokens, now) if tokens else None)

    def begin(self, now: float, body: bytes) -> Use:
        """A request arrives with this body. Raises TooManyRequests; then nothing was taken."""
        key = self.key
        if key.concurrency and self.running >= key.concurrency:
            raise TooManyRequests(_limit(key, f"{key.concurrency} requests at a time"), retry_after=1)
        for bucket, least, what in ((self.requests, 1.0, "requests"), (self.tokens, 1.0, "tokens")):
            if bucket and (wait := bucket.wait(now, least)) > 0:
                text = _limit(key, f"{bucket.capacity:.0f} {what} per minute")
                raise TooManyRequests(text, retry_after=math.ceil(wait))
        if self.requests:
            self.requests.take(1.0)
        use = Use(self, prompt_tokens(body) if self.tokens else 0)
        self.charge(use.prompt)
        self.running += 1
        return use

    def charge(self, tokens: float) -> None:
        """It took so many tokens more, in or out; a negative number gives back what it did not take."""
        if self.tokens:
            self.tokens.take(tokens)


@dataclass(frozen=True)
class Use:
    """What one request takes of its key's quota. ``prompt``: tokens taken when it arrived."""

    quota: Quota
    prompt: int

    def abandon(self) -> None:
        """It was not admitted: it took no tokens."""
        self.quota.running -= 1
        self.quota.charge(-self.prompt)

    def resume(self) -> None:
        """It failed before its answer and goes once more; it was counted already."""
        self.quota.running += 1

    def end(self, tokens: Tokens | None, size: int) -> None:
        """It is over. ``tokens``: what it took; where nothing tells that, it is reckoned from ``size`` bytes."""
        self.quota.running -= 1
        if tokens is not None:
            self.quota.charge(tokens.total - self.prompt)
        elif size:
            self.quota.charge(max(1, size // BYTES_PER_EVENT))


class Quotas:
    """The quotas of all keys that have limits."""

    def __init__(self, keys: Sequence[KeyConfig], clock: Clock = time.monotonic) -> None:
        self.clock = clock
        self._quotas: dict[str, Quota] = {}
        self.configure(keys)

    def configure(self, keys: Sequence[KeyConfig]) -> None:
        """Take the keys of a new configuration; one that did not change goes on from where it was."""
        was, now = self._quotas, self.clock()
        self._quotas = {
            name: was[name] if name in was and was[name].key == key else Quota.of(key, now)
            for name, key in by_name(keys).items()
        }

    def keep_alive(self, key: str, seconds: float, limit: float | None) -> float | None:
        """For how many ``seconds`` the key may keep a model, at most ``limit`` (None: any); None: it has no say."""
        quota = self._quotas.get(key)
        for most in (limit, quota.key.keep_alive_limit if quota else None):
            if most is not None and most <= 0:
                return None
            seconds = seconds if most is None else min(seconds, most)
        return seconds

    def begin(self, key: str, body: bytes) -> Use | None:
        """A request of the key called ``key`` arrives; None if that has no limits. Raises TooManyRequests."""
        quota = self._quotas.get(key)
        return quota.begin(self.clock(), body) if quota else None


def _limit(key: KeyConfig, what: str) -> str:
    return f"the key {key.name!r} has reached its limit of {what}"
