"""Limits of keys, with the clock in the test's hand."""

from __future__ import annotations

import asyncio

import pytest

from vllmd.admin.counters import Counters
from vllmd.config.types import KeyConfig, ModelConfig, ReplicaConfig
from vllmd.core import commands, events
from vllmd.daemon.admission_gate import AdmissionGate, Permit
from vllmd.daemon.engine_resolver import EngineResolver
from vllmd.daemon.quotas import Bucket, Quotas
from vllmd.engines.base import Listen
from vllmd.errors import TooManyRequests, Unavailable, UpstreamFailed
from vllmd.proxy.tokens import Tokens, prompt_tokens


class Clock:
    """Stands still until it is told not to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Core:
    """What is behind the gate: it admits everybody, or refuses everybody."""

    def __init__(self) -> None:
        self.gate: AdmissionGate
        self.refuses = False
        self.at_once = False  # it admits without an event
        self.kept_alive: list[float] = []

    def post(self, event: events.Event) -> None:
        if isinstance(event, events.RequestArrived) and self.refuses:
            self.gate.reject(commands.Reject(event.request, "Unavailable", "no room"))
        elif isinstance(event, events.RequestArrived):
            self.gate.admit(commands.Admit(event.request, "m"))
        elif isinstance(event, events.KeptAlive):
            self.kept_alive.append(event.seconds)

    def admit_at_once(self, request: str, model: str) -> str | None:
        return "m" if self.at_once else None

    def finish_at_once(self, request: str) -> bool:
        return False

    def address_of(self, replica: str) -> Listen:
        return Listen(uds="/engine.sock")

    def phase_of(self, model: str) -> str:
        return "weights"

    def unreached(self, replica: str) -> None: ...

    def retried(self, replica: str) -> None: ...


class Act:
    """A gate with limits."""

    def __init__(self, **limits: int) -> None:
        self.clock, self.core, self.counters = Clock(), Core(), Counters()
        self.key = KeyConfig("k", "digest", **limits)  # type: ignore[arg-type]
        self.quotas = Quotas([self.key], self.clock)
        self.gate = self.core.gate = AdmissionGate(EngineResolver(), self.quotas, self.counters)
        self.gate.configure({"m": ModelConfig("m")}, {"m": ModelConfig("m")})
        self.gate.open(self.core)

    def acquire(self, key: str = "k", body: bytes = b"") -> Permit:
        return asyncio.run(self.gate.acquire("m", key, body=body))

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


def test_who_does_not_wait_is_limited_all_the_same() -> None:
    """And who would have to wait has taken nothing yet."""
    act = Act(requests_per_minute=1)
    assert act.gate.try_acquire("m", "k") is None
    act.core.at_once = True
    assert act.gate.try_acquire("m", "k") is not None
    with pytest.raises(TooManyRequests):
        act.gate.try_acquire("m", "k")


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
    first.release()
    first.release()
    act.core.refuses = True
    with pytest.raises(Unavailable):
        act.acquire()
    act.core.refuses = False
    act.acquire()
    act.refused()


def test_tokens_per_minute_are_charged_afterwards() -> None:
    """An answer may overdraw; the key then waits until it is above nothing again."""
    act = Act(tokens_per_minute=60)
    act.acquire().release(Tokens(120, 0))
    assert act.refused() == 61
    act.clock.now += 61
    act.acquire()
    act.counters.add_up()
    assert act.counters.key_tokens[("k",)] == act.counters.tokens[("m",)] == 120


PROMPT = b'{"prompt":"' + b"word " * 48 + b'"}'  # of 240 letters: some 60 tokens


def test_a_prompt_is_charged_when_it_arrives() -> None:
    """Or a key could send any number at once before the first one is answered; one that gets nowhere costs nothing."""
    act = Act(tokens_per_minute=60)
    act.core.refuses = True
    with pytest.raises(Unavailable):
        act.acquire(body=PROMPT)
    act.core.refuses = False
    act.acquire(body=PROMPT)
    assert act.refused() == 4


def test_the_usage_puts_the_guess_of_the_prompt_right() -> None:
    """What was taken too much comes back, what was too little is taken."""
    act = Act(tokens_per_minute=60)
    act.acquire(body=PROMPT).release(Tokens(10, 0))
    act.acquire(body=PROMPT).release(Tokens(80, 0))
    assert act.refused() == 31
    act.counters.add_up()
    assert act.counters.key_tokens[("k",)] == 10 + 80


def test_a_stream_without_usage_is_charged_for_its_prompt_too() -> None:
    """Clients of streams get no usage unless they ask: eight long prompts a minute were free."""
    act = Act(tokens_per_minute=60)
    act.acquire(body=PROMPT * 2).release(size=250 * 5)
    assert act.refused() == 126 + 5 - 60 + 1


def test_files_in_a_request_are_not_counted_by_their_letters() -> None:
    """An image of a megabyte is not 250,000 tokens."""
    picture = b'{"messages":[{"url":"data:image/png;base64,' + b"A" * (1 << 20) + b'"},"' + b"word" * 100 + b'"]}'
    assert 1100 <= prompt_tokens(picture) <= 1120
    assert prompt_tokens(b'--zz\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + bytes(1 << 20)) == 1000
    assert prompt_tokens(b"") == 0


def test_an_answer_that_does_not_tell_its_tokens_is_charged_by_its_size() -> None:
    """Or a client could leave out the usage and be free; told twice it is charged once."""
    act = Act(tokens_per_minute=60)
    permit = act.acquire()
    permit.release(size=250 * 61)
    permit.release(size=250 * 1000)
    assert act.refused() == 2
    act.clock.now += 2
    act.acquire()


def test_a_request_that_is_sent_again_is_charged_once_and_is_one_at_a_time() -> None:
    """An attempt without an answer took nothing; while the next one runs its key has one request running."""
    act = Act(tokens_per_minute=60, concurrency=1)
    act.gate.configure({"m": ModelConfig("m", replicas=ReplicaConfig(retries=1))}, {"m": ModelConfig("m")})
    first = act.acquire(body=PROMPT)
    first.release(failed="it broke off")
    second = asyncio.run(first.retry(UpstreamFailed("it broke off")))
    assert act.refused() == 1
    second.release(Tokens(10, 0))
    act.acquire()


def test_other_keys_are_not_limited() -> None:
    """Nor are requests without one."""
    act = Act(requests_per_minute=1)
    for key in ("", "other", "", "other"):
        act.acquire(key).release(Tokens(5, 0))
    act.counters.add_up()
    assert act.counters.tokens[("m",)] == 4 * 5
    assert act.counters.key_tokens == {("other",): 10}


def test_a_reload_keeps_what_was_used_by_keys_that_did_not_change() -> None:
    """Else every reload would be a way around the limits."""
    act = Act(requests_per_minute=1)
    act.acquire()
    act.quotas.configure([act.key])
    act.refused()
    act.quotas.configure([KeyConfig("k", "digest", requests_per_minute=5)])
    act.acquire()


def test_waits_are_told() -> None:
    """Also of those that did not have to."""
    act = Act(concurrency=5)
    act.acquire()
    act.counters.add_up()
    assert sum(act.counters.waits[("m",)].counts) == 1


@pytest.mark.parametrize(
    ("limit", "wish", "passed"),
    [(None, 9e9, [9e9]), (60.0, 9e9, [60.0]), (60.0, 5.0, [5.0]), (60.0, 0.0, [0.0]), (0.0, 0.0, [])],
)
def test_a_key_keeps_a_model_alive_within_its_limit(limit: float | None, wish: float, passed: list[float]) -> None:
    """One whose limit is 0 has no say, not even that the model may go."""
    act = Act(keep_alive_limit=limit)  # type: ignore[arg-type]
    act.gate.keep_alive("m", "k", wish)
    assert act.core.kept_alive == passed


NOON = 19_999 * 86400 + 43200.0  # 2024-10-03


class Days:
    """A key with limits by day and month, and a calendar that the test turns."""

    def __init__(self, **limits: int) -> None:
        self.wall = NOON
        self.keys = [KeyConfig("k", "-", **limits)]  # type: ignore[arg-type]
        self.quotas = Quotas(self.keys, lambda: 0.0, lambda: self.wall)

    def use(self, tokens: int) -> None:
        use = self.quotas.begin("k", b"")
        assert use is not None
        use.end(Tokens(tokens, 0), 0)

    def refused(self) -> tuple[str, float]:
        with pytest.raises(TooManyRequests) as caught:
            self.quotas.begin("k", b"")
        return caught.value.message, caught.value.retry_after or 0


def test_tokens_per_day_begin_anew_at_midnight() -> None:
    """In UTC; and whoever is over is told when to come back."""
    act = Days(tokens_per_day=100)
    act.use(60)
    act.use(60)
    assert act.refused() == ("the key 'k' has reached its limit of 100 tokens per day", 43200)
    act.wall = NOON + 43200
    act.use(1)


def test_the_month_outlives_the_day() -> None:
    """Until the first of the next one."""
    act = Days(tokens_per_month=100, tokens_per_day=1000)
    act.use(100)
    act.wall += 86400
    message, wait = act.refused()
    assert "per month" in message
    act.wall += wait
    act.use(1)
    act.wall -= 1
    assert "per month" in act.refused()[0]


def test_a_clock_that_is_set_forward_and_back_gives_nothing_twice() -> None:
    """What was used of a day and of a month is known when the clock comes back to them."""
    act = Days(tokens_per_day=100, tokens_per_month=150)
    act.use(90)
    for jump in (86400, 40 * 86400, 365 * 86400):
        act.wall += jump
        act.use(5)
        act.wall -= jump
    act.use(10)
    assert act.refused()[1] == 43200
    act.wall += 43200  # a true midnight; the day has 5 of the wrong one
    act.use(45)
    assert "150 tokens per month" in act.refused()[0]


def test_devices_count_too() -> None:
    """A model that is held for a key takes of its seconds, also where nobody asks."""
    act = Days(device_seconds_per_day=50)
    act.quotas.spent("k", 0.0, 49.0)
    act.use(10)
    act.quotas.spent("k", 0.0, 2.0)
    assert "seconds of devices per day" in act.refused()[0]


def test_what_was_used_before_counts() -> None:
    """By an earlier daemon, today and this month; and it stays when the limits change."""
    act = Days(tokens_per_month=100)
    act.quotas.spent_this_month("k", 80.0, 0.0)
    act.use(10)
    act.quotas.configure([KeyConfig("k", "-", tokens_per_month=90)])
    assert "90 tokens per month" in act.refused()[0]
    act.quotas.configure([KeyConfig("k", "-", tokens_per_day=20)])
    act.use(10)
    assert "per day" in act.refused()[0]


def test_a_rank_is_the_keys() -> None:
    """As it is configured now."""
    quotas = Quotas([KeyConfig("k", "-", priority=5)])
    assert (quotas.rank("k"), quotas.rank("")) == ((5, 1), (0, 1))
    quotas.configure([KeyConfig("k", "-", share=3)])
    assert quotas.rank("k") == (0, 3)
