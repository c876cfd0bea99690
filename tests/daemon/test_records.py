"""Who watches requests end: a bounded number of them, whatever the rate; and what of use cannot be told."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.daemon.test_spans import SERVED
from vllmd.api.answers import Usage
from vllmd.config.types import RecordsConfig
from vllmd.daemon.records import MOST_AT_ONCE, Records, Watcher
from vllmd.errors import Unavailable
from vllmd.proxy.access import ANYBODY, Caller
from vllmd.proxy.exchange import Exchange
from vllmd.proxy.http import Headers, Peer, Request
from vllmd.records.ring import Filter, Ring
from vllmd.records.store import Store, StoreError

# An exchange, as far as it is looked at here.
ENDED = {
    "model": "m",
    "offer": "",
    "account": None,
    "status": 200,
    "error": "",
    "request": SimpleNamespace(caller=ANYBODY),
}


def watcher(caller: Caller = ANYBODY, *, failed: bool = False) -> Watcher:
    return Watcher(Filter(failed=failed), caller)


def test_of_many_requests_a_watcher_is_told_the_newest() -> None:
    """What is wanted is chosen first: a failed request is not pushed out by those that nobody asked for."""
    every, failures = watcher(), watcher(failed=True)
    failed = SERVED._replace(number=0, status=502, error="UpstreamFailed")
    for each in (failed, *(SERVED._replace(number=number) for number in range(1, 10 * MOST_AT_ONCE))):
        every.offer(each)
        failures.offer(each)
    assert [entry.number for entry in every.waiting] == list(range(9 * MOST_AT_ONCE, 10 * MOST_AT_ONCE))
    assert [entry.number for entry in failures.waiting] == [0]


def test_a_watcher_hears_of_nothing_that_it_may_not_see() -> None:
    """A key sees its own requests only."""
    stranger = watcher(Caller("bob"))
    stranger.offer(SERVED)
    assert not stranger.waiting and not stranger.has_entries.is_set()


def test_use_that_a_full_disk_hides_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that could not be laid out lacks a table; that the disk is full is what somebody can mend."""

    def lacking(*question: object) -> None:
        raise StoreError("the record of use cannot be used now: no such table: days")

    monkeypatch.setattr(Store, "ask", lacking)

    async def asked() -> None:
        records = Records(RecordsConfig(), tmp_path / "usage.db")
        with pytest.raises(Unavailable, match="no such table"):
            await records.usage("key", 0.0, 1.0, "", "")
        records.trouble = "the record of use cannot be used now: database or disk is full"
        with pytest.raises(Unavailable, match="disk is full"):
            await records.usage("key", 0.0, 1.0, "", "")

    asyncio.run(asked())


def test_use_that_was_gathered_before_recording_was_switched_off_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a reload between a request and its being written lost it, and at a shutdown ended that with an error."""
    monkeypatch.setattr(Ring, "note", lambda *_: SERVED._replace(at=time.time()))

    async def asked() -> Usage:
        records = Records(RecordsConfig(), tmp_path / "usage.db")
        records.ended(cast(Any, SimpleNamespace(**ENDED)))
        records.configure(RecordsConfig(usage=False))
        await records.flush()
        records.configure(RecordsConfig())
        try:
            return await records.usage("key", None, None, None, "")
        finally:
            await records.close()

    assert sum(row.requests for row in asyncio.run(asked()).rows) == 1


def test_an_access_log_that_is_wanted_no_more_is_no_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be written was told on every screen; once nobody wants it written it is not."""
    monkeypatch.setattr(Ring, "note", lambda *_: SERVED)
    lost, ended = RecordsConfig(access_log=str(tmp_path / "nowhere" / "log")), cast(Any, SimpleNamespace(**ENDED))

    async def asked() -> None:
        for then in (RecordsConfig(), RecordsConfig(access_log="journal")):
            records = Records(lost, None)
            records.ended(ended)
            await records.flush()
            assert records.log_trouble.startswith(f"the access log {lost.access_log} cannot be written")
            records.ended(ended)
            records.configure(then)
            await records.flush()
            assert records.log_trouble == ""

    asyncio.run(asked())


def test_a_store_of_another_version_does_not_break_off_a_shutdown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is imported with the first requests. When the package was upgraded before, the daemon drains without it."""
    monkeypatch.setattr(Ring, "note", lambda *_: SERVED)
    monkeypatch.setitem(sys.modules, "vllmd.records.store", None)  # importing it raises ImportError

    async def ended() -> str:
        records = Records(RecordsConfig(), tmp_path / "usage.db")
        records.ended(cast(Any, SimpleNamespace(**ENDED)))
        await records.close()
        return records.trouble

    assert "requests cannot be recorded: import of vllmd.records.store" in asyncio.run(ended())


def test_a_request_came_when_it_came_whatever_became_of_the_clock_since(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it was under way somebody set the clock, or the machine slept: in the list, and in the record of use."""
    came = time.time()
    request = Request("POST", "/v1/chat/completions", "/v1/chat/completions", "", Headers([]), Peer("127.0.0.1", 4711))
    exchange = Exchange(request, cast(Any, None), lambda data: None, keep_alive=True)
    exchange.model = "m"
    monkeypatch.setattr(time, "time", lambda: came + 86400)
    records = Records(RecordsConfig(), None, under_way=lambda: [exchange])
    (entry,) = records.requests("", None, "", None, False, None, 10, ANYBODY).under_way
    assert entry.at == pytest.approx(came, abs=60)
    assert Ring(1).note(exchange).at == pytest.approx(entry.at, abs=1)


@pytest.mark.parametrize(("error", "payer"), [("TooManyRequests", "alice"), ("ClientGone", "bob"), ("", "bob")])
def test_whose_request_was_refused_pays_for_no_model(error: str, payer: str) -> None:
    """The memory of a model at rest is booked to the key that used it last; who has it load and leaves has used it."""
    paid: list[str] = []
    records = Records(RecordsConfig(), None, spend=lambda key, device_seconds: paid.append(key))
    for caller, outcome in ((Caller("alice"), ""), (Caller("bob"), error)):
        request = Request("POST", "/v1/chat/completions", "/v1/chat/completions", "", Headers(), caller=caller)
        exchange = Exchange(request, cast(Any, None), lambda data: None, keep_alive=True)
        exchange.model, exchange.error = "m", outcome
        records.ended(exchange)
    view = SimpleNamespace(name="m", replicas=[SimpleNamespace(devices=(0,), memory=1)])
    seen = cast(Any, SimpleNamespace(devices=[SimpleNamespace(index=0, memory=2)], models=[view]))
    records.look(seen, {})
    records.look(seen, {})
    assert paid == [payer]
