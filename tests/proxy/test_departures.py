"""A client that shuts its sending side and waits is answered; one that is gone or vanished frees its place."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.proxy.fakes import EVENTS, Client, Script, chunked, post, raw, reply, soon, stage, until
from tests.proxy.test_relay import ANSWER, endless, silent
from vllmd.config.types import ServerConfig
from vllmd.proxy import departures, limits
from vllmd.proxy.limits import KEEPALIVE, UNACKNOWLEDGED, Limits
from vllmd.proxy.peers import is_held
from vllmd.proxy.server import Server

STREAM = raw(EVENTS, chunked(b"data: 1\n\n"), chunked(b"data: [DONE]\n\n"), b"0\r\n\r\n")
IN_TIME = 120.0  # seconds in which a peer that vanished must be given up


def asked(version: str, *, stream: bool = False) -> bytes:
    body = b'{"model":"m","stream":true}' if stream else b'{"model":"m"}'
    return post(body=body).replace(b"HTTP/1.1", version.encode())


async def final(client: Client) -> bytes:
    """All that comes until the server closes, without interim answers and heads."""
    data: bytes = await soon(client.reader.read())
    while data.startswith(departures.CONTINUE):
        data = data.removeprefix(departures.CONTINUE)
    assert data.startswith(b"HTTP/1.1 200"), data
    return data.partition(b"\r\n\r\n")[2]


@pytest.fixture(params=["here", "elsewhere"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether the client is on this machine, or one of which the kernel knows nothing."""
    if request.param == "elsewhere":
        monkeypatch.setattr(departures, "is_held", lambda peer, ours: None)
    return str(request.param)


@pytest.mark.usefixtures("where")
@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("loading", [False, True])
def test_one_that_half_closes_and_waits_is_answered(version: str, stream: bool, loading: bool) -> None:
    """``printf ... | nc``: at once, or after the model was loaded; whole, or as a stream with signs of life before."""

    async def play() -> None:
        async with stage(
            STREAM if stream else reply(ANSWER), Limits(ServerConfig(loading_comment_interval=0.02))
        ) as act:
            if loading:
                act.gate.opened.clear()
            client = await act.client()
            client.send(asked(version, stream=stream))
            client.writer.write_eof()
            if loading:
                await soon(act.gate.entered.wait())
                await asyncio.sleep(3 * departures.FIRST_WAIT_SECONDS)
                act.gate.opened.set()
            body = await final(client)
            assert (b"data: [DONE]" if stream else ANSWER) in body

    asyncio.run(play())


def test_requests_behind_it_are_answered_too() -> None:
    """All that came whole is answered, in order; a beginning is told that it is one."""

    async def play() -> None:
        async with stage(reply(ANSWER)) as act:
            client = await act.client()
            client.send(asked("HTTP/1.1") * 3 + b"POST /v1/chat")
            client.writer.write_eof()
            data = (await soon(client.reader.read())).replace(departures.CONTINUE, b"")
            assert data.count(b"HTTP/1.1 200") == 3
            assert data.count(b"HTTP/1.1 400") == 1

    asyncio.run(play())


# Not one elsewhere that speaks HTTP/1.0, to which nothing may be sent before its answer: of it keepalive tells.
GONE = [(version, endless, where) for version in ("HTTP/1.1", "HTTP/1.0") for where in ("here", "elsewhere")]
GONE += [("HTTP/1.1", silent, "here"), ("HTTP/1.0", silent, "here"), ("HTTP/1.1", silent, "elsewhere")]


@pytest.mark.parametrize(("version", "script", "where"), GONE, indirect=["where"])
def test_one_that_half_closes_and_then_leaves_frees_the_engine(version: str, script: Script, where: str) -> None:
    """At once, before its answer and in the middle of it."""

    async def play() -> None:
        async with stage(script) as act:
            client = await act.client()
            client.send(asked(version))
            await until(lambda: act.engine.asked)
            client.writer.write_eof()
            await asyncio.sleep(2 * departures.FIRST_WAIT_SECONDS)
            assert not act.engine.ended.is_set()
            client.close()
            await soon(act.engine.ended.wait())

    asyncio.run(play())


@pytest.mark.parametrize("closes", [False, True])
def test_of_a_unix_socket_it_is_known(tmp_path: Path, closes: bool) -> None:
    """The kernel tells one that shut its sending side from one that is gone."""

    async def play() -> None:
        async with stage(silent if closes else reply(ANSWER)) as act:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(tmp_path / "s"))
                listener.listen()
                server = Server(act.router, Limits(ServerConfig()), [listener], act.ended.append)
                server.start()
                client = Client(*await asyncio.open_unix_connection(str(tmp_path / "s")))
                client.send(asked("HTTP/1.0"))
                client.writer.write_eof()
                if closes:
                    await until(lambda: act.engine.asked)
                    client.close()
                    await soon(act.engine.ended.wait())
                else:
                    assert ANSWER in await final(client)
                await server.close()

    asyncio.run(play())


# -- those that vanish with their machine


def test_both_ends_ask_whether_the_other_is_there() -> None:
    """After half a minute of silence; given up within two minutes, whether or not something was on its way."""

    async def play() -> None:
        async with stage(reply(ANSWER)) as act:
            client = await act.client()
            client.post()
            await client.answer()
            (connection,) = act.server.open_connections
            (upstream,) = act.relay.pool.idle()
            for end, unacknowledged in ((connection, 0.0), (upstream, UNACKNOWLEDGED)):
                sock = end.transport.get_extra_info("socket")
                read = [sock.getsockopt(socket.IPPROTO_TCP, option) for option, _ in KEEPALIVE]
                assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                assert read == [value for _, value in KEEPALIVE]
                assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == unacknowledged * 1000
            idle, between, questions = read
            assert (
                max(idle + between * questions, UNACKNOWLEDGED, departures.VANISHED_SECONDS + departures.SWEEP_SECONDS)
                <= IN_TIME
            )

    asyncio.run(play())


NUMBERS = itertools.count()  # a namespace goes some time after it was deleted
CLIENT = """
import socket, sys
sock = socket.create_connection(("10.253.71.1", int(sys.argv[1])))
sock.sendall(sys.argv[2].encode().decode("unicode_escape").encode())
print(sock.recv(1000) if sys.argv[3] == "begun" else "sent", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def far_away() -> Iterator[tuple[str, str]]:
    """A network namespace with one link to us: its name, and the link's on our side."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    name = f"v{os.getpid()}n{next(NUMBERS)}"
    link, other = f"{name}a", f"{name}b"
    for line in (
        f"ip netns add {name}",
        f"ip link add {link} type veth peer name {other} netns {name}",
        f"ip addr add 10.253.71.1/30 dev {link}",
        f"ip link set {link} up",
        f"ip -n {name} addr add 10.253.71.2/30 dev {other}",
        f"ip -n {name} link set {other} up",
    ):
        if subprocess.run(line.split(), stderr=subprocess.PIPE).returncode:
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)
            pytest.skip(f"not to be had here: {line}")
    yield name, other
    subprocess.run(["ip", "link", "del", link], check=True)  # the namespace may yet be held by what its kernel resends
    subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.mark.parametrize("script", [silent, endless], ids=["silent", "begun"])
def test_one_that_vanished_frees_its_place(
    far_away: tuple[str, str], script: Script, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Its cable is pulled while it waits, or while events are on their way to it. The times are cut short here."""
    name, link = far_away
    begun = script is endless
    monkeypatch.setattr(limits, "KEEPALIVE", tuple((option, 1) for option, _ in KEEPALIVE))
    monkeypatch.setattr(departures, "VANISHED_SECONDS", 0.5)
    monkeypatch.setattr("vllmd.proxy.server.SWEEP_SECONDS", 0.2)

    async def play() -> None:
        async with stage(script) as act:
            with socket.create_server(("10.253.71.1", 0)) as listener:
                server = Server(act.router, Limits(ServerConfig()), [listener], act.ended.append)
                server.start()
                argv = ["ip", "netns", "exec", name, sys.executable, "-c", CLIENT, str(listener.getsockname()[1])]
                argv += [repr(asked("HTTP/1.1", stream=True))[2:-1], "begun" if begun else "silent"]
                client = await asyncio.create_subprocess_exec(*argv, stdin=-1, stdout=-1)
                assert client.stdout and client.stdin
                try:
                    await soon(client.stdout.readline())
                    await until(lambda: act.engine.asked)
                    await (await asyncio.create_subprocess_exec("ip", "-n", name, "link", "set", link, "down")).wait()
                    await asyncio.wait_for(act.engine.ended.wait(), 30)
                finally:
                    client.kill()
                    await client.wait()
                await server.close()

    asyncio.run(play())


def test_a_socket_that_somebody_holds_is_told_from_one_that_nobody_does() -> None:
    """Also after it said that it says no more; one of another machine is not known."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        ours, peer = listener.accept()
        client.shutdown(socket.SHUT_WR)
        assert is_held(peer, ours.getsockname()) is True
        client.close()
        assert is_held(peer, ours.getsockname()) is False
        assert is_held(("192.0.2.1", 1), ours.getsockname()) is None
        ours.close()
