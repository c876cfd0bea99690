"""The daemon's end of the launcher's socket, against a launcher whose every answer the test decides."""

from __future__ import annotations

import asyncio
import logging
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from vllmd.launcher import client as client_module
from vllmd.launcher.client import LauncherClient, LauncherFailed
from vllmd.launcher.protocol import (
    MAX_PACKET,
    PROTOCOL,
    Engines,
    Exited,
    ExitReport,
    Info,
    LauncherInfo,
    List,
    Message,
    Running,
    Start,
    Started,
    StartOrder,
    Tail,
    decode,
    encode,
)

ORDER = StartOrder("small-1", ("/bin/true",))
LIVES = LauncherInfo("scopes", "", (), PROTOCOL)


class ScriptedLauncher:
    """Listens like the launcher; the test reads each request, and says when to answer what, and when it dies."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.setblocking(False)
        self._connection: socket.socket | None = None

    async def accept(self) -> None:
        """The client has connected, perhaps again."""
        self._connection, _ = await asyncio.wait_for(asyncio.get_running_loop().sock_accept(self._listener), 10)

    async def read(self) -> tuple[int, Message]:
        assert self._connection
        packet = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self._connection, MAX_PACKET), 10)
        return decode(packet)

    def say(self, message: Message, id: int = 0) -> None:
        assert self._connection
        self._connection.sendall(encode(message, id))

    def die(self) -> None:
        assert self._connection
        self._connection.close()

    def close(self) -> None:
        self.die()
        self._listener.close()


async def answer_lists(launcher: ScriptedLauncher, engines: tuple[Running, ...], until: type[Message]) -> int:
    """Answer every List with these engines until another request comes; returns its number."""
    while True:
        id, request = await launcher.read()
        if isinstance(request, until):
            return id
        assert isinstance(request, List)
        launcher.say(Engines(engines), id)


def test_the_end_of_what_a_dying_launcher_had_begun_is_no_end_of_the_engine(tmp_path: Path) -> None:
    """The start goes on under the next launcher; an exit reported meanwhile would be taken for the new engine's."""
    asyncio.run(asyncio.wait_for(_started_by_the_second(tmp_path), 60))


async def _started_by_the_second(tmp_path: Path) -> None:
    exits: asyncio.Queue[ExitReport] = asyncio.Queue()
    launcher = ScriptedLauncher(tmp_path / "s")
    client, _ = await asyncio.gather(LauncherClient.at(tmp_path / "s", exits.put_nowait).open(), launcher.accept())
    try:
        starting = asyncio.ensure_future(client.start(ORDER))
        assert isinstance((await launcher.read())[1], Start)
        launcher.die()
        await launcher.accept()
        half_started = Running(ORDER.instance, 0, "half.scope", ending=True)
        for _ in range(2):  # the client that catches up, and the start that looks for its engine
            id, request = await launcher.read()
            assert isinstance(request, List)
            launcher.say(Engines((half_started,)), id)
        launcher.say(Exited(ExitReport(ORDER.instance)))
        id = await answer_lists(launcher, (), until=Start)
        whole = Running(ORDER.instance, 7, "whole.scope")
        launcher.say(Started(whole), id)
        assert await starting == whole
        assert exits.empty()
        launcher.say(Exited(ExitReport(ORDER.instance, status=3)))  # that one is the engine's
        assert await exits.get() == ExitReport(ORDER.instance, status=3)
    finally:
        await client.close()
        launcher.close()


def test_who_asks_before_the_end_was_noticed_waits_for_the_next_launcher(tmp_path: Path) -> None:
    """The packet cannot be sent; to try again at once, for ever, would stop the whole daemon."""
    asyncio.run(asyncio.wait_for(_asked_of_the_dead(tmp_path), 60))


async def _asked_of_the_dead(tmp_path: Path) -> None:
    launcher = ScriptedLauncher(tmp_path / "s")
    client, _ = await asyncio.gather(LauncherClient.at(tmp_path / "s").open(), launcher.accept())
    try:
        launcher.die()
        asking = asyncio.ensure_future(client.list())  # its first step comes before the loop looks at the socket
        await launcher.accept()
        for _ in range(2):  # the client that catches up, and who asked
            id, request = await launcher.read()
            assert isinstance(request, List)
            launcher.say(Engines(()), id)
        assert await asking == []
    finally:
        await client.close()
        launcher.close()


def test_a_launcher_that_hangs_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every start and stop waits for it; and that it answers again. Until then ``trouble`` says so to whoever asks."""
    monkeypatch.setattr(client_module, "SILENCE_SECONDS", 0.0)
    monkeypatch.setattr(client_module, "LIFE_SECONDS", 0.0)
    caplog.set_level(logging.INFO)
    asyncio.run(asyncio.wait_for(_hangs(tmp_path, caplog), 60))
    said = [record.getMessage() for record in caplog.records if "answer" in record.getMessage()]
    assert said[0].startswith("the launcher hangs, and no engine starts or ends: it has not answered a List for 0 s")
    assert said[1:] == ["the launcher answers again"]


async def _hangs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    launcher = ScriptedLauncher(tmp_path / "s")
    client, _ = await asyncio.gather(LauncherClient.at(tmp_path / "s").open(), launcher.accept())
    try:
        asking = [asyncio.ensure_future(client.list()) for _ in range(2)]
        while "has not answered" not in caplog.text:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert client.trouble.startswith("it has not answered a List")
        asked = [await launcher.read(), await launcher.read()]  # what asks for a sign of life may have been sent, too
        for id, _ in asked:
            launcher.say(Engines(()), id)
        await asyncio.gather(*asking)
        assert client.trouble == ""
    finally:
        await client.close()
        launcher.close()


@pytest.mark.parametrize("kind", [Start, Tail])
def test_a_launcher_that_lives_is_not_blamed_for_what_takes_long(
    kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A start whose own processes hang, and a journalctl in a large journal: asked for a sign of life, it gives one."""
    monkeypatch.setattr(client_module, "SILENCE_SECONDS", 0.0)
    order = StartOrder("a", ("x",), timeout=0.001)

    async def story() -> None:
        launcher = ScriptedLauncher(tmp_path / "s")
        client, _ = await asyncio.gather(LauncherClient.at(tmp_path / "s").open(), launcher.accept())
        asking = asyncio.ensure_future(client.start(order) if kind is Start else client.tail("a"))
        try:
            assert isinstance((await launcher.read())[1], kind)
            id, request = await launcher.read()
            assert isinstance(request, Info)
            launcher.say(LIVES, id)
            later = asyncio.ensure_future(client.info())
            id, _ = await launcher.read()
            launcher.say(LIVES, id)
            assert await later == LIVES
            assert (client.trouble, asking.done()) == ("", False)
        finally:
            asking.cancel()
            await client.close()
            launcher.close()

    asyncio.run(asyncio.wait_for(story(), 60))
    assert "the launcher hangs" not in caplog.text


def test_a_launcher_is_not_blamed_for_what_is_read_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon itself was held up, or stopped, until the time for a sign of life was over; the sign was there."""
    monkeypatch.setattr(client_module, "SILENCE_SECONDS", 0.0)
    monkeypatch.setattr(client_module, "LIFE_SECONDS", 0.05)

    async def story() -> None:
        launcher, loop = ScriptedLauncher(tmp_path / "s"), asyncio.get_running_loop()
        client, _ = await asyncio.gather(LauncherClient.at(tmp_path / "s").open(), launcher.accept())
        asking = asyncio.ensure_future(client.tail("a"))
        await launcher.read()
        id, request = await launcher.read()
        assert isinstance(request, Info)
        launcher.say(LIVES, id)
        over = loop.time() + 2 * client_module.LIFE_SECONDS
        while loop.time() < over:
            pass
        for _ in range(20):
            await asyncio.sleep(0)
        assert (client.trouble, asking.done()) == ("", False)
        asking.cancel()
        await client.close()
        launcher.close()

    asyncio.run(asyncio.wait_for(story(), 60))


def test_why_there_is_no_launcher_is_told(tmp_path: Path) -> None:
    """The daemon tries again for ever; until one is there, `vllmctl status` says why nothing starts. One of an older
    version is waited out."""

    async def story() -> None:
        client = LauncherClient.at(tmp_path / "s")
        with pytest.raises(LauncherFailed):
            await client.open()
        assert client.trouble.startswith("it cannot be connected to: ")
        launcher = ScriptedLauncher(tmp_path / "s")
        await asyncio.gather(client.open(), launcher.accept())
        assert client.trouble == ""
        for version in (PROTOCOL - 1, PROTOCOL):
            asking = asyncio.ensure_future(client.info())
            id, _ = await launcher.read()
            launcher.say(replace(LIVES, protocol=version), id)
            await asking
            assert ("older version" in client.trouble) is (version < PROTOCOL)
        launcher.close()
        (tmp_path / "s").unlink()
        while not client.trouble:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert client.trouble.startswith("it cannot be connected to: ")
        assert "vllmd-launcher.socket" in client.trouble
        again = ScriptedLauncher(tmp_path / "s")
        await again.accept()
        while client.trouble:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await client.close()
        again.close()

    asyncio.run(asyncio.wait_for(story(), 60))
