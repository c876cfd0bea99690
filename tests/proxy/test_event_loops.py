"""The event loop: which one it is, and that the proxy is the same on the one that the other tests do not run on."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from tests.proxy import test_connection, test_departures, test_relay, test_server
from vllmd.daemon.event_loop import name_of, new_loop

# What loops differ in: pauses, half-closed and reset connections, ends in the middle of an answer, handed-over sockets.
SCENES: tuple[Callable[[], None], ...] = (
    test_connection.test_a_flood_of_pipelined_requests_is_held_back,
    test_departures.test_requests_behind_it_are_answered_too,
    test_departures.test_both_ends_ask_whether_the_other_is_there,
    test_relay.test_a_body_that_ends_with_the_connection_is_passed_and_ended_so,
    test_relay.test_a_client_that_takes_nothing_is_cut_off_in_the_end,
    test_relay.test_a_kept_connection_that_turns_out_closed_is_replaced_once,
    test_relay.test_a_slow_reader_holds_up_its_own_engine_and_nobody_else,
    test_relay.test_a_stream_passes_as_it_comes,
    test_relay.test_a_stream_that_takes_too_long_is_broken_off,
    test_server.test_draining_lets_requests_end_and_sends_the_idle_away,
    test_server.test_what_is_not_accepted_waits_for_the_next_one,
)


def named(wanted: str) -> str:
    """The name of the loop that is had for it."""
    loop = new_loop(wanted)
    loop.close()
    return name_of(loop)


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_on_asyncios_own(scene: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has no uvloop is served the same."""
    monkeypatch.setenv("VLLMD_SERVER_EVENT_LOOP", "asyncio")
    assert asyncio.run(running()) == "asyncio"
    scene()


async def running() -> str:
    """The name of the loop that runs this."""
    return name_of(asyncio.get_running_loop())


def test_uvloop_is_taken_where_it_is() -> None:
    """Unless asyncio's own is asked for."""
    assert named("auto").startswith("uvloop 0.")
    assert named("uvloop").startswith("uvloop 0.")
    assert named("asyncio") == "asyncio"


@pytest.mark.parametrize(
    ("module", "why"),
    [(None, "cannot be imported"), (SimpleNamespace(__version__="0.16.2"), "is of version 0.16.2, older than 0.17")],
)
def test_without_it_there_is_asyncios(
    module: object, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Said only to whoever has asked for uvloop by name."""
    monkeypatch.setitem(sys.modules, "uvloop", module)
    with caplog.at_level(logging.WARNING):
        assert named("auto") == "asyncio"
        assert caplog.messages == []
        assert named("uvloop") == "asyncio"
    (said,) = caplog.messages
    assert said.startswith(f"server.event_loop is uvloop, but it {why}")
