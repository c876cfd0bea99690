"""The daemon asks only the engine that it started: before it is ready, and when it is found again."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from tests.daemon.rig import FakeEngine, Rig, soon, tell
from tests.daemon.test_adoption import notes
from vllmd.core import events
from vllmd.daemon import engine_manager
from vllmd.daemon.adoption import examine
from vllmd.daemon.engine_keys import EngineKeys
from vllmd.daemon.engine_resolver import EngineResolver
from vllmd.daemon.launch_planner import without_key
from vllmd.engines.base import Listen
from vllmd.launcher.client import Running, StartOrder

SOMEBODY = 4242


@pytest.fixture(autouse=True)
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is waited for in vain is not waited for long."""
    monkeypatch.setattr(engine_manager, "KILL_LIMIT", 0.1)


def test_a_start_fails_at_once_where_somebody_else_answers(tmp_path: Path) -> None:
    """Not after start_timeout, and with his name; he was asked nothing."""

    async def story(rig: Rig) -> None:
        engines: list[FakeEngine] = []
        rig.prepare = engines.append
        start = rig.launcher.start

        async def as_somebody(order: StartOrder) -> Running:
            return replace(await start(order), uid=SOMEBODY)

        rig.launcher.start = as_somebody  # type: ignore[method-assign]
        await rig.start()
        failed = await rig.event()
        assert isinstance(failed, events.EngineStartFailed)
        assert f"not to the engine's user {SOMEBODY}" in failed.reason
        assert engines[0].asked == []
        assert "SIGKILL" in rig.launcher.signals

    tell(story, tmp_path)


def test_an_engine_whose_socket_is_a_link_is_not_taken_over(tmp_path: Path) -> None:
    """Nor one whose user the launcher does not know."""

    async def story(rig: Rig) -> None:
        engine = FakeEngine(rig.gpu, str(tmp_path / "real.sock"))
        await engine.open()
        (tmp_path / "e.sock").symlink_to("real.sock")
        for name, owner in (("e.sock", os.geteuid()), ("real.sock", -1)):
            told = notes(rig.model, tmp_path / name)
            running = Running("m-000001", 1, "vllmd-model-m-000001.scope", metadata=told, uid=owner)
            found = await soon(examine(running, {"m": rig.model}, EngineResolver()))
            assert found.state is None
            assert "no connection to" in found.why
        assert engine.asked == []
        engine.close()

    tell(story, tmp_path)


def test_notes_tell_that_there_is_a_key_but_not_which() -> None:
    """They are extended attributes, which everybody may read."""
    listen = Listen(port=33300, key="of-this-start", owner=1)
    assert "of-this-start" not in json.dumps(without_key(listen))
    assert Listen(**without_key(listen)).key
    assert "of-this-start" not in repr(listen)


def test_a_found_engine_has_its_key_again(tmp_path: Path) -> None:
    """The same secret and the same name make the same key, in another daemon as well."""
    shown: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        shown.extend(line.partition(" ")[2] for line in head.splitlines() if line.startswith("authorization:"))
        writer.write(b'HTTP/1.1 200 X\r\nContent-Length: 22\r\nConnection: close\r\n\r\n{"is_sleeping": false} ')
        writer.close()

    async def story(rig: Rig) -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, family=socket.AF_INET)
        listen = Listen(port=server.sockets[0].getsockname()[1], key="x")
        told = {**notes(rig.model, tmp_path / "x"), "listen": json.dumps(without_key(listen))}
        running = Running("m-000001", 1, "vllmd-model-m-000001.scope", metadata=told, uid=os.geteuid())
        key = EngineKeys(tmp_path).of("m-000001")
        await soon(examine(running, {"m": rig.model}, EngineResolver(), EngineKeys(tmp_path).of))
        server.close()
        assert shown == [f"bearer {key}"]

    tell(story, tmp_path)


def test_keys_differ_by_start_and_by_machine(tmp_path: Path) -> None:
    """Who knows one knows no other."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    here, there = EngineKeys(tmp_path / "a"), EngineKeys(tmp_path / "b")
    keys = {here.of("m-1"), here.of("m-2"), there.of("m-1"), EngineKeys(None).of("m-1"), EngineKeys(None).of("m-1")}
    assert len(keys) == 5
    assert here.of("m-1") == EngineKeys(tmp_path / "a").of("m-1")


def test_the_secret_is_the_daemons_alone(tmp_path: Path) -> None:
    """Whatever the umask; a damaged one is made anew, and where none can be kept there is one all the same."""
    before = os.umask(0)
    try:
        key = EngineKeys(tmp_path).of("m-1")
    finally:
        os.umask(before)
    assert (tmp_path / "engine.key").stat().st_mode & 0o777 == 0o600
    (tmp_path / "engine.key").write_bytes(b"short")
    assert EngineKeys(tmp_path).of("m-1") != key
    assert EngineKeys(tmp_path / "none").of("m-1")
