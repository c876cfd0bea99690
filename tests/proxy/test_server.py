"""Accepting, counting, stopping."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
import struct
from pathlib import Path
from typing import Any

from tests.proxy.fakes import Client, get, hello, reply, soon, stage, until
from vllmd.config.types import ServerConfig
from vllmd.errors import Unauthorized
from vllmd.proxy import server
from vllmd.proxy.access import EVERYTHING, Caller
from vllmd.proxy.http import Request, Response, json_response
from vllmd.proxy.limits import Limits
from vllmd.proxy.routing import Router
from vllmd.proxy.server import Server


def test_what_is_not_accepted_waits_for_the_next_one() -> None:
    """An idle exit stops accepting without closing the listener: a client that comes then is served later."""

    async def play() -> None:
        async with stage() as act:
            act.server.stop_accepting()
            client = await act.client()
            client.send(get("/hello"))
            answering = asyncio.ensure_future(client.answer())
            await asyncio.sleep(0.05)
            assert (answering.done(), act.server.connections) == (False, 0)
            act.server.start()
            assert (await answering).status == 200

    asyncio.run(play())


def test_draining_lets_requests_end_and_sends_the_idle_away() -> None:
    """What is under way is answered, with Connection: close; idle connections are closed at once."""

    async def play() -> None:
        async with stage(reply(b"{}")) as act:
            act.gate.opened.clear()
            idle, busy, fresh = [await act.client() for _ in range(3)]
            idle.send(get("/hello"))
            await idle.answer()
            busy.post()
            await soon(act.gate.entered.wait())
            await until(lambda: act.server.connections == 3)
            draining = asyncio.ensure_future(act.server.drain(5.0, grace=0.1))
            assert await idle.closed()
            assert await fresh.closed()
            act.gate.opened.set()
            answer = await busy.answer()
            assert (answer.status, await busy.closed()) == (200, True)
            assert await soon(draining)

    asyncio.run(play())


def test_a_connection_accepted_just_before_the_drain_gets_its_answer() -> None:
    """Its first request may be on the way; a reset would be the client's loss."""

    async def play() -> None:
        async with stage() as act:
            fresh = await act.client()
            await until(lambda: act.server.connections == 1)
            draining = asyncio.ensure_future(act.server.drain(5.0, grace=2.0))
            await asyncio.sleep(0)
            fresh.send(get("/hello"))
            answer = await fresh.answer()
            assert (answer.status, answer.headers["connection"]) == (200, "close")
            assert await soon(draining)

    asyncio.run(play())


def test_a_drain_has_an_end() -> None:
    """Whoever is left after the limit is cut off by ``close``, and its permit ends."""

    async def play() -> None:
        async with stage() as act:
            act.gate.opened.clear()
            client = await act.client()
            client.post()
            await soon(act.gate.entered.wait())
            assert not await act.server.drain(0.05, grace=0.01)
            await act.server.close(0.05)
            assert await client.closed()
            await until(lambda: act.gate.left == 1)

    asyncio.run(play())


def test_too_many_connections_are_told_so() -> None:
    """Over the limit a client is answered 503 and closed; those before it are served on."""

    async def play() -> None:
        async with stage(limits=Limits(ServerConfig(max_connections=2))) as act:
            first, second = [await act.client() for _ in range(2)]
            await until(lambda: act.server.connections == 2)
            third = await act.client()
            answer = await third.answer()
            assert (answer.status, "retry-after" in answer.headers) == (503, True)
            first.close()
            await until(lambda: act.server.connections == 1)
            for client in (second, await act.client()):
                client.send(get("/hello"))
                assert (await client.answer()).status == 200

    asyncio.run(play())


def test_clients_leave_file_descriptors_to_others() -> None:
    """Without any no engine could be asked, started or looked at; who connects then is told to come back."""

    async def play() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            router = Router()
            router.add("GET", "/hello", hello)
            free = [os.open(os.devnull, os.O_RDONLY) for _ in range(9)]
            for number in free:
                os.close(number)
            server = Server(router, Limits(ServerConfig()), [listener], files=free[-1])
            server.start()
            clients = [Client(*await soon(asyncio.open_connection(*listener.getsockname()))) for _ in range(8)]
            answers = []
            for client in clients:
                client.send(get("/hello"))
                answers.append((await client.answer()).status)
            assert set(answers) == {200, 503}
            assert server.connections < 8
            for client in clients:
                client.close()
            await server.close(1.0)

    asyncio.run(play())


def test_one_address_cannot_take_all_connections() -> None:
    """429 beyond its share."""

    async def play() -> None:
        async with stage(limits=Limits(ServerConfig(max_connections_per_address=1))) as act:
            first = await act.client()
            await until(lambda: act.server.connections == 1)
            assert (await (await act.client()).answer()).status == 429
            first.close()
            await until(lambda: act.server.connections == 0)
            retry = await act.client()
            retry.send(get("/hello"))
            assert (await retry.answer()).status == 200

    asyncio.run(play())


class FullListener:
    """A listener for which there are no file descriptors, once."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self.refused = 0

    def accept(self) -> tuple[socket.socket, object]:
        """The kernel's answer."""
        if not self.refused:
            self.refused += 1
            raise OSError(errno.EMFILE, "Too many open files")
        return self._listener.accept()

    def __getattr__(self, name: str) -> object:
        return getattr(self._listener, name)


def test_running_out_of_file_descriptors_is_survived() -> None:
    """Accepting rests a moment instead of spinning; the client waits in the queue meanwhile."""

    async def play() -> None:
        with socket.create_server(("127.0.0.1", 0)) as real:
            listener = FullListener(real)
            router = Router()
            router.add("GET", "/hello", hello)
            server = Server(router, Limits(ServerConfig()), [listener])  # type: ignore[list-item]
            server.start()
            client = Client(*await soon(asyncio.open_connection(*real.getsockname())))
            client.send(get("/hello"))
            assert (await client.answer()).status == 200
            assert listener.refused == 1
            client.close()
            await server.close(1.0)

    asyncio.run(play())


def test_a_unix_socket_tells_who_is_there(tmp_path: Path) -> None:
    """The peer's process and user come from the kernel; the path stays when the server is done."""
    seen: list[Request] = []

    async def who(request: Request) -> Response:
        seen.append(request)
        return json_response({})

    async def play() -> None:
        path = tmp_path / "admin.sock"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            router = Router()
            router.add("GET", "/who", who)
            server = Server(router, Limits(ServerConfig(max_connections_per_address=1)), [listener])
            server.start()
            for _ in range(2):
                client = Client(*await soon(asyncio.open_unix_connection(path)))
                client.send(get("/who", "Connection: close"))
                assert (await client.answer()).status == 200
                client.close()
            await server.close(1.0)
        assert path.exists()

    asyncio.run(play())
    assert [(r.peer.pid, r.peer.uid, r.peer.local) for r in seen] == [(os.getpid(), os.getuid(), True)] * 2


class OneKey:
    """Lets in who says ``Bearer good``."""

    def identify(self, request: Request) -> Caller:
        """The key's owner, or somebody who may not do much."""
        if request.headers.get("authorization") == "Bearer good":
            return Caller("goodname", EVERYTHING)
        return Caller(refusal=lambda: Unauthorized("no"))


def test_a_client_without_a_key_is_refused_before_its_body_is_read() -> None:
    """401 at the head; open routes stay open."""

    async def tell(request: Request) -> Response:
        return json_response({"key": request.key})

    async def play() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            router = Router(OneKey())
            router.add("POST", "/closed/{id:path}/x", tell)
            router.add("GET", "/open", tell, "open")
            server = Server(router, Limits(ServerConfig()), [listener])
            server.start()
            client = Client(*await soon(asyncio.open_connection(*listener.getsockname())))
            client.send(get("/open") + b"POST /closed/a/b/x HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer good\r\n\r\n")
            assert (await client.answer()).json() == {"key": ""}
            assert (await client.answer()).json() == {"key": "goodname"}
            client.send(b"POST /closed/a%2Fb/x HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
            answer = await client.answer()
            assert (answer.status, answer.headers["www-authenticate"]) == (401, "bearer")
            client.close()
            await server.close(1.0)

    asyncio.run(play())


def test_a_connection_that_is_refused_is_told_of() -> None:
    """No request is read, so none is noted: the daemon writes it to its log."""

    async def play() -> None:
        told: list[str] = []
        limits = Limits(ServerConfig(max_connections=1))
        with socket.create_server(("127.0.0.1", 0)) as listener:
            server = Server(Router(), limits, [listener], on_refused=told.append)
            server.start()
            _, first = await asyncio.open_connection(*listener.getsockname())
            await until(lambda: server.connections == 1)
            second = Client(*await asyncio.open_connection(*listener.getsockname()))
            assert (await soon(second.answer())).status == 503
            assert told == ["too many connections; try again later (1 are open)"]
            for writer in (first, second.writer):
                writer.close()
            await server.close()

    asyncio.run(play())


def test_a_client_that_resets_before_it_is_served_gives_its_place_back() -> None:
    """As a load balancer's check does. The kernel tells no address of such a connection any more."""

    async def play() -> None:
        limits = Limits(ServerConfig(max_connections_per_address=2))
        async with stage(limits=limits) as act:
            for number in (1, 2):
                with socket.create_connection(("127.0.0.1", act.port)) as gone:
                    gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                await until(lambda number=number: act.server.accepted == number and not act.server.connections)
            client = await act.client()
            client.send(get("/hello"))
            assert (await client.answer()).status == 200

    asyncio.run(play())


def test_a_client_that_says_nothing_to_tls_has_a_place_as_any_other() -> None:
    """It counts for its address, is no request that a stop waits for, and has one time limit for all that it owes."""

    async def play() -> None:
        limits = Limits(ServerConfig(max_connections_per_address=2))
        async with stage(limits=limits) as act:
            act.server.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            silent, slow = await act.client(), await act.client()
            await until(lambda: act.server.connections == 2)
            third = await act.client()
            assert (await third.answer()).status == 429
            loop, given = asyncio.get_running_loop(), list[float]()
            connect = loop.connect_accepted_socket

            async def noted(*arguments: Any, **options: Any) -> Any:
                given.append(options["ssl_handshake_timeout"])
                return await connect(*arguments, **options)

            loop.connect_accepted_socket = noted  # type: ignore[method-assign]
            loop.call_later(0.05, slow.send, b"\x16")  # takes so much of its time
            await until(lambda: given != [])
            assert given[0] < server.HANDSHAKE_SECONDS, "what was left of it when the first byte came"
            assert act.server.busy == 0
            silent.close()
            await until(lambda: act.server.connections == 1)
            another = await act.client()
            await until(lambda: act.server.connections == 2)
            assert await asyncio.wait_for(act.server.drain(60.0, grace=0.0), 30), "nobody is waited for"
            another.close()

    asyncio.run(play())
