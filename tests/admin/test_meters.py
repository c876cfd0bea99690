"""Limits of keys, with the clock in the test's hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from vllmd.config.types import KeyConfig
from vllmd.daemon.meters import Bucket, MeteredGate, Meters, prompt_tokens
from vllmd.engines.base import Listen
from vllmd.errors import TooManyRequests, Unavailable, VllmdError
from vllmd.proxy.access import ANYBODY, Caller
from vllmd.proxy.gate import Permit, Target


class Clock:
    """Stands still until it is told not to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class OpenGate:
    """Lets everybody pass; notes whose permits ended with how many tokens."""

    def __init__(self) -> None:
        self.ended: list[int | None] = []
        self.refusal: Exception | None = None
        self.kept_alive: list[float] = []

    def resolve(self, name: str, caller: Caller = ANYBODY) -> Target:
        return Target(name, name)

    def loading(self, model: str) -> str:
        return "weights"

    def keep_alive(self, model: str, key: str, seconds: float) -> None:
        self.kept_alive.append(seconds)

    async def acquire(self, model: str, key: str, request_id: str, only: str = "", body: bytes = b"") -> Permit:
        if self.refusal:
            raise self.refusal
        return _Permit(self.ended)


class _Permit:
    upstream = Listen(uds="/engine.sock")
    target = None

    def __init__(self, ended: list[int | None]) -> None:
        self._ended = ended

    def answered(self, streamed: bool) -> None: ...

    def done(self, tokens: int | None = None, failed: str = "") -> None:
        self._ended.append(tokens)

    async def retry(self, error: VllmdError) -> Permit:
        return _Permit(self._ended)

    def on_cut(self, callback: Callable[[str], None]) -> None:
        callback("cut")


class Noted:
    """A ledger that only remembers."""

    def __init__(self) -> None:
        self.waits: list[tuple[str, float]] = []
        self.uses: list[tuple[str, str, int]] = []

    def waited(self, model: str, seconds: float) -> None:
        self.waits.append((model, seconds))

    def used(self, model: str, key: str, tokens: int) -> None:
        self.uses.append((model, key, tokens))


class Act:
    """A gate with limits."""

    def __init__(self, **limits: int) -> None:
        self.clock, self.inner, self.noted = Clock(), OpenGate(), Noted()
        self.key = KeyConfig("k", "digest", **limits)  # type: ignore[arg-type]
        self.meters = Meters([self.key], self.clock)
        self.gate = MeteredGate(self.inner, self.meters, self.noted)
        self._requests = 0

    def acquire(self, key: str = "k", body: bytes = b"") -> Permit:
        self._requests += 1
        return asyncio.run(self.gate.acquire("m", key, f"r{self._requests}", body=body))

    def refused(self) -> float:
        """Seconds after which the refused client is to come back."""
        with pytest.raises(TooManyRequests) as refusal:
            self.acquire()
        assert refusal.value.retry_after is not None
        return refusal.value.retry_after


def test_a_bucket_fills_steadily_and_no_further_than_a_minutes_worth() -> None:
    """Sixty a minute is one a second, however long nobody came."""
    bucket = Bucket(60, 0.0)
    bucket.take(60)
    assert bucket.wait(0.0, 1.0) == pytest.approx(1.0)
    assert bucket.wait(1.0, 1.0) == 0.0
    bucket.wait(10_000.0, 1.0)
    bucket.take(60)
    assert bucket.wait(10_000.0, 1.0) == pytest.approx(1.0)


def test_requests_per_minute() -> None:
    """The third of two a minute is told when to come back, and then it may."""
    act = Act(requests_per_minute=2)
    act.acquire()
    act.acquire()
    assert act.refused() == 30
    act.clock.now += 30
    act.acquire()


def test_a_refused_request_takes_nothing() -> None:
    """Whoever hammers at the limit does not push it away."""
    act = Act(requests_per_minute=1)
    act.acquire()
    for _ in range(10):
        act.refused()
    act.clock.now += 60
    act.acquire()


def test_concurrency() -> None:
    """A place is free again when a request ends, however often it says so, and when it never got in."""
    act = Act(concurrency=1)
    first = act.acquire()
    assert act.refused() == 1
    first.done()
    first.done()
    act.inner.refusal = Unavailable("no room")
    with pytest.raises(Unavailable):
        act.acquire()
    act.inner.refusal = None
    act.acquire()
    act.refused()


def test_tokens_per_minute_are_charged_afterwards() -> None:
    """An answer may overdraw; the key then waits until it is above nothing again."""
    act = Act(tokens_per_minute=60)
    act.acquire().done(120)
    assert act.refused() == 61
    act.clock.now += 61
    act.acquire()
    assert act.noted.uses == [("m", "k", 120)]


PROMPT = b'{"prompt":"' + b"word " * 48 + b'"}'  # of 240 letters: some 60 tokens


def test_a_prompt_is_charged_when_it_arrives() -> None:
    """Or a key could send any number at once before the first one is answered; one that gets nowhere costs nothing."""
    act = Act(tokens_per_minute=60)
    act.inner.refusal = Unavailable("no room")
    with pytest.raises(Unavailable):
        act.acquire(body=PROMPT)
    act.inner.refusal = None
    act.acquire(body=PROMPT)
    assert act.refused() == 4


def test_the_usage_puts_the_guess_of_the_prompt_right() -> None:
    """What was taken too much comes back, what was too little is taken."""
    act = Act(tokens_per_minute=60)
    act.acquire(body=PROMPT).done(10)
    act.acquire(body=PROMPT).done(80)
    assert act.refused() == 31
    assert act.noted.uses == [("m", "k", 10), ("m", "k", 80)]


def test_a_stream_without_usage_is_charged_for_its_prompt_too() -> None:
    """Clients of streams get no usage unless they ask: eight long prompts a minute were free."""
    act = Act(tokens_per_minute=60)
    act.acquire(body=PROMPT * 2).done()
    act.gate.settle("r1", 250 * 5)
    assert act.refused() == 126 + 5 - 60 + 1


def test_files_in_a_request_are_not_counted_by_their_letters() -> None:
    """An image of a megabyte is not 250,000 tokens."""
    picture = b'{"messages":[{"url":"data:image/png;base64,' + b"A" * (1 << 20) + b'"},"' + b"word" * 100 + b'"]}'
    assert 1100 <= prompt_tokens(picture) <= 1120
    assert prompt_tokens(b'--zz\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + bytes(1 << 20)) == 1000
    assert prompt_tokens(b"") == 0


@pytest.mark.parametrize("order", ["answer first", "connection first"])
def test_an_answer_that_does_not_tell_its_tokens_is_charged_by_its_size(order: str) -> None:
    """Or a client could leave out the usage and be free; whichever end is heard of first."""
    act = Act(tokens_per_minute=60)
    permit = act.acquire()
    ends = [lambda: permit.done(), lambda: act.gate.settle("r1", 250 * 61)]
    for end in ends if order == "answer first" else reversed(ends):
        end()
    assert act.refused() == 2
    act.gate.settle("r1", 250 * 1000)  # twice counts once
    act.clock.now += 2
    act.acquire()


def test_other_keys_are_not_limited() -> None:
    """Nor are requests without one."""
    act = Act(requests_per_minute=1)
    for key in ("", "other", "", "other"):
        act.acquire(key).done(5)
    assert act.noted.uses[:2] == [("m", "", 5), ("m", "other", 5)]


def test_a_reload_keeps_what_was_used_by_keys_that_did_not_change() -> None:
    """Else every reload would be a way around the limits."""
    act = Act(requests_per_minute=1)
    act.acquire()
    act.meters.configure([act.key])
    act.refused()
    act.meters.configure([KeyConfig("k", "digest", requests_per_minute=5)])
    act.acquire()


def test_the_gates_other_words_pass_unchanged() -> None:
    """Waits are told, cuts and progress reach the proxy."""
    act = Act(concurrency=5)
    permit, heard = act.acquire(), list[str]()
    permit.on_cut(heard.append)
    assert heard == ["cut"]
    assert permit.upstream.uds == "/engine.sock"
    assert act.gate.loading("m") == "weights"
    assert act.gate.resolve("x").model == "x"
    assert act.noted.waits == [("m", 0.0)]


@pytest.mark.parametrize(
    ("limit", "wish", "passed"),
    [(None, 9e9, [9e9]), (60.0, 9e9, [60.0]), (60.0, 5.0, [5.0]), (60.0, 0.0, [0.0]), (0.0, 0.0, [])],
)
def test_a_key_keeps_a_model_alive_within_its_limit(limit: float | None, wish: float, passed: list[float]) -> None:
    """One whose limit is 0 has no say, not even that the model may go."""
    act = Act(keep_alive_limit=limit)  # type: ignore[arg-type]
    act.gate.keep_alive("m", "k", wish)
    assert act.inner.kept_alive == passed
