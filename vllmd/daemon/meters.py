"""What each API key has used, and its limits: requests at a time, requests and tokens per minute.

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
from typing import Protocol

from vllmd.config.types import KeyConfig
from vllmd.daemon.keys import by_name
from vllmd.errors import TooManyRequests, VllmdError
from vllmd.proxy.access import ANYBODY, Caller
from vllmd.proxy.gate import Address, Gate, Permit, Target

MINUTE = 60.0  # seconds
BYTES_PER_TOKEN = 250  # of a streamed answer that does not tell its usage: about one event's size
BYTES_PER_PROMPT_TOKEN = 4  # of a request: English text has about four letters in a token
FILE = b";base64,"  # a file within JSON (a data: URL)
TOKENS_PER_FILE = 1000  # of an image within JSON, or of a form with files: about what an image of 1 megapixel takes
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
class Meter:
    """One key's use. Limits that are not set are not kept account of."""

    key: KeyConfig
    requests: Bucket | None
    tokens: Bucket | None
    running: int = 0

    @classmethod
    def of(cls, key: KeyConfig, now: float) -> Meter:
        """A fresh one, everything unused."""
        requests, tokens = key.requests_per_minute, key.tokens_per_minute
        return cls(key, Bucket(requests, now) if requests else None, Bucket(tokens, now) if tokens else None)

    def begin(self, now: float, prompt: float) -> None:
        """A request arrives, with about so many tokens. Raises TooManyRequests; then nothing was taken."""
        key = self.key
        if key.concurrency and self.running >= key.concurrency:
            raise TooManyRequests(_limit(key, f"{key.concurrency} requests at a time"), retry_after=1)
        for bucket, least, what in ((self.requests, 1.0, "requests"), (self.tokens, 1.0, "tokens")):
            if bucket and (wait := bucket.wait(now, least)) > 0:
                text = _limit(key, f"{bucket.capacity:.0f} {what} per minute")
                raise TooManyRequests(text, retry_after=math.ceil(wait))
        if self.requests:
            self.requests.take(1.0)
        self.charge(prompt)
        self.running += 1

    def resume(self) -> None:
        """A request that failed before its answer goes once more; it was counted already."""
        self.running += 1

    def end(self) -> None:
        """A request that began is over."""
        self.running -= 1

    def charge(self, tokens: float) -> None:
        """It took so many tokens more, in or out; a negative number gives back what it did not take."""
        if self.tokens:
            self.tokens.take(tokens)


class Meters:
    """The meters of all keys that have limits."""

    def __init__(self, keys: Sequence[KeyConfig], clock: Clock = time.monotonic) -> None:
        self.clock = clock
        self._meters: dict[str, Meter] = {}
        self.configure(keys)

    def configure(self, keys: Sequence[KeyConfig]) -> None:
        """Take the keys of a new configuration; one that did not change goes on from where it was."""
        was, now = self._meters, self.clock()
        self._meters = {
            name: was[name] if name in was and was[name].key == key else Meter.of(key, now)
            for name, key in by_name(keys).items()
        }

    def of(self, key: str) -> Meter | None:
        """The meter of the key called ``key``; None if it has no limits."""
        return self._meters.get(key)


class Ledger(Protocol):
    """Who wants to know what passed (``vllmd.admin.counters.Counters`` does)."""

    def waited(self, model: str, seconds: float) -> None:
        """A request was admitted after so long."""

    def used(self, model: str, key: str, tokens: int) -> None:
        """A request's answer told its tokens."""


@dataclass
class _Use:
    """One admitted request. Its answer's end and its connection's word may come in either order."""

    model: str
    key: str
    meter: Meter | None
    prompt: int = 0  # tokens taken from the bucket already
    over: bool = False
    told: int | None = None  # tokens, by the answer's usage
    sent: int | None = None  # bytes


_NONE = _Use("", "", None)


class MeteredGate:
    """Implements ``vllmd.proxy.gate.Gate`` before another gate: a key over its limit does not get as far as that."""

    def __init__(self, gate: Gate, meters: Meters, ledger: Ledger) -> None:
        self._gate = gate
        self._meters = meters
        self._ledger = ledger
        self._uses: dict[str, _Use] = {}  # those whose key has a limit on tokens

    def resolve(self, name: str, caller: Caller = ANYBODY) -> Target:
        """As the other gate says."""
        return self._gate.resolve(name, caller)

    def loading(self, model: str) -> str:
        """As the other gate says."""
        return self._gate.loading(model)

    def keep_alive(self, model: str, key: str, seconds: float) -> None:
        """As the other gate says, within the key's limit; with one of 0 its word does not count."""
        limit = meter.key.keep_alive_limit if (meter := self._meters.of(key)) else None
        if limit is None or limit > 0:
            self._gate.keep_alive(model, key, seconds if limit is None else min(seconds, limit))

    async def acquire(self, model: str, key: str, request_id: str, only: str = "", body: bytes = b"") -> Permit:
        """As the other gate says. Raises TooManyRequests for a key over its limit."""
        began, meter = self._meters.clock(), self._meters.of(key)
        prompt = prompt_tokens(body) if meter and meter.tokens else 0
        if meter:
            meter.begin(began, prompt)
        try:
            permit = await self._gate.acquire(model, key, request_id, only)
        except BaseException:
            if meter:
                meter.end()
                meter.charge(-prompt)
            raise
        self._ledger.waited(model, self._meters.clock() - began)
        return self._metered(permit, request_id, _Use(model, key, meter, prompt))

    def _metered(self, permit: Permit, request_id: str, use: _Use) -> Permit:
        if use.meter and use.meter.tokens:
            self._uses[request_id] = use

        def resumed(retry: Permit) -> Permit:
            if use.meter:
                use.meter.resume()
            return self._metered(retry, request_id, _Use(use.model, use.key, use.meter, use.prompt))

        return _Metered(permit, lambda tokens: self._done(request_id, use, tokens), resumed)

    def _done(self, request_id: str, use: _Use, tokens: int | None) -> None:
        if use.over:
            return
        use.over, use.told = True, tokens
        if use.meter:
            use.meter.end()
        if tokens is not None:
            self._ledger.used(use.model, use.key, tokens)
        self._balance(request_id, use)

    def settle(self, request_id: str, sent: int) -> None:
        """The answer was ``sent`` bytes, which stand for its tokens if it does not tell them (the prompt is known)."""
        use = self._uses.get(request_id)
        if use:
            use.sent = sent
            self._balance(request_id, use)

    def _balance(self, request_id: str, use: _Use) -> None:
        known = use.told
        if known is None and use.sent is not None:
            known = use.prompt + max(1, use.sent // BYTES_PER_TOKEN)
        if use.over and known is not None and self._uses.pop(request_id, _NONE) is use and use.meter:
            use.meter.charge(known - use.prompt)


class _Metered:
    """A permit whose end is told."""

    def __init__(self, permit: Permit, done: Callable[[int | None], None], resumed: Callable[[Permit], Permit]) -> None:
        self._permit = permit
        self._done = done
        self._resumed = resumed

    @property
    def upstream(self) -> Address:
        """Where to send it."""
        return self._permit.upstream

    @property
    def target(self) -> Target | None:
        """As the other permit has it."""
        return self._permit.target

    def answered(self, streamed: bool) -> None:
        """As the other permit does."""
        self._permit.answered(streamed)

    def done(self, tokens: int | None = None, failed: str = "") -> None:
        """The request is over."""
        self._done(tokens)
        self._permit.done(tokens, failed)

    async def retry(self, error: VllmdError) -> Permit:
        """As the other permit does; the key has paid for the request already."""
        return self._resumed(await self._permit.retry(error))

    def on_cut(self, callback: Callable[[str], None]) -> None:
        """As the other permit does."""
        self._permit.on_cut(callback)


def prompt_tokens(body: bytes) -> int:
    """About how many tokens an engine reads for a request with this body; a file in it counts as one of its kind."""
    if body.startswith(b"--"):  # a form
        return TOKENS_PER_FILE
    if FILE not in body:
        return len(body) // BYTES_PER_PROMPT_TOKEN
    text, *files = body.split(FILE)
    rest = sum(len(file) - (file.find(b'"') + 1 or len(file)) for file in files)
    return (len(text) + rest) // BYTES_PER_PROMPT_TOKEN + TOKENS_PER_FILE * len(files)


def _limit(key: KeyConfig, what: str) -> str:
    return f"the key {key.name!r} has reached its limit of {what}"
