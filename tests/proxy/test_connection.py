"""One client's connection: order, keep-alive, uploads, deadlines."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.proxy.fakes import get, hello, post, reply, soon, stage, until
from vllmd.config.types import ServerConfig
from vllmd.proxy.http import Request, Response, event_stream
from vllmd.proxy.limits import Limits

ANSWER = b'{"model":"m"}'


def test_pipelined_requests_are_answered_in_order() -> None:
    """One after another, whatever came at once: local ones, relayed ones, errors that leave the framing sound."""

    async def play() -> None:
        async with stage(reply(ANSWER)) as act:
            client = await act.client()
            client.send(get("/hello?n=1") + post() + post("/hello", b"x" * 100) + post() + get("/hello?n=2"))
            assert (await client.answer()).json()["query"] == {"n": "1"}
            assert (await client.answer()).body == ANSWER
            assert len((await client.answer()).json()["body"]) == 100
            assert (await client.answer()).body == ANSWER
            assert (await client.answer()).json()["query"] == {"n": "2"}

    asyncio.run(play())


def test_a_flood_of_pipelined_requests_is_held_back() -> None:
    """What comes while a request is answered is read up to a limit; the rest waits with the client."""

    async def play() -> None:
        async with stage(limits=Limits(ServerConfig(pipeline=1000))) as act:
            act.gate.opened.clear()
            client = await act.client()
            client.post()
            await soon(act.gate.entered.wait())
            client.send(get("/hello") * 400_000)
            await until(lambda: client.writer.transport.get_write_buffer_size() > 0)
            act.gate.opened.set()
            assert (await client.answer()).status == 200
            for _ in range(1000):
                assert (await client.answer()).status == 200

    asyncio.run(play())


def test_head_is_answered_like_get_without_a_body() -> None:
    """The length is the GET's; the next answer follows at once."""

    async def play() -> None:
        async with stage() as act:
            client = await act.client()
            client.send(get("/hello", method="HEAD") + get("/hello"))
            head = await client.answer("HEAD")
            body = (await client.answer()).body
            assert (head.status, int(head.headers["content-length"]) - len('{"method":"HEAD"')) == (
                200,
                len(body) - len('{"method":"GET"'),
            )

    asyncio.run(play())


def test_a_client_that_ends_after_a_refusal_is_just_gone() -> None:
    """Its head came in pieces and was refused; that it ends in the middle is no news, and nothing can be written."""

    async def play() -> None:
        async with stage() as act:
            client = await act.client()
            client.send(b"GET /hello HTTP/1.1\r\n")
            await until(lambda: any(not connection.idle for connection in act.server.open_connections))
            client.send(b"Host : vllmd\r\n\r\n")
            assert (await client.answer()).status == 400
            client.writer.write_eof()
            assert await client.closed()
            await until(lambda: not act.server.connections)
            assert len(act.ended) == 1

    asyncio.run(play())


def test_a_client_that_resets_while_it_is_refused_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal's end finds no connection any more; the request before it must be over all the same."""

    class Reset:
        """A transport, but the socket behind it is connected no more."""

        def __init__(self, transport: asyncio.Transport) -> None:
            self._transport = transport

        def __getattr__(self, name: str) -> Any:
            return getattr(self._transport, name)

        def write_eof(self) -> None:
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    async def play() -> None:
        async with stage() as act:
            client = await act.client()
            await until(lambda: act.server.open_connections)
            (connection,) = act.server.open_connections
            monkeypatch.setattr(connection, "transport", Reset(connection.transport))
            client.send(post() + b"GET /hello HTTP/1.1\r\nHost : vllmd\r\n\r\n")
            await until(lambda: not act.server.connections)
            await until(lambda: act.gate.permits[0].endings)
            await until(lambda: len(asyncio.all_tasks()) == 2)  # this one, and the engine's server's connection

    asyncio.run(play())


def test_a_405_says_what_is_allowed() -> None:
    """RFC 9110, 15.5.6; OPTIONS says it, too."""

    async def play() -> None:
        async with stage() as act:
            client = await act.client()
            client.send(get("/hello", method="DELETE"))
            answer = await client.answer()
            assert (answer.status, answer.headers["allow"]) == (405, "get, head, options, post")
            other = await act.client()
            other.send(get("/hello", method="OPTIONS"))
            assert (await other.answer()).headers["allow"] == "get, head, options, post"

    asyncio.run(play())


@pytest.mark.parametrize(
    ("request_bytes", "kept"),
    [
        (get("/hello"), True),
        (get("/hello", "Connection: close"), False),
        (get("/hello", "Connection: x, CLOSE"), False),
        (get("/hello").replace(b"1.1", b"1.0"), False),
    ],
)
def test_a_connection_is_kept_unless_the_client_says_otherwise(request_bytes: bytes, kept: bool) -> None:
    """And an answer that will be the last one says so."""

    async def play() -> None:
        async with stage() as act:
            client = await act.client()
            client.send(request_bytes)
            answer = await client.answer()
            assert answer.headers.get("connection") == (None if kept else "close")
            if kept:
                client.send(get("/hello"))
                assert (await client.answer()).status == 200
            else:
                assert await client.closed()

    asyncio.run(play())


def test_an_idle_connection_expires() -> None:
    """After ``keepalive_timeout``, without a word."""

    async def play() -> None:
        async with stage(limits=Limits(ServerConfig(keepalive_timeout=0.1))) as act:
            client = await act.client()
            client.send(get("/hello"))
            await client.answer()
            assert await client.closed()

    asyncio.run(play())


def test_a_body_is_asked_for_only_if_it_will_be_taken() -> None:
    """Expect: 100-continue is answered by 100, or by the refusal."""

    async def play() -> None:
        async with stage(reply(ANSWER), Limits(ServerConfig(max_body=100))) as act:
            client = await act.client()
            head, _, body = post("/v1/completions", ANSWER, "Expect: 100-continue").partition(b"\r\n\r\n")
            client.send(head + b"\r\n\r\n")
            assert (await client.answer()).status == 100
            client.send(body)
            assert (await client.answer()).status == 200
            assert "expect" not in act.engine.asked[0].headers
            client.send(head.replace(b"Length: 13", b"Length: 101") + b"\r\n\r\n")
            assert (await client.answer()).status == 413

    asyncio.run(play())


def test_a_chunked_upload_reaches_the_engine_with_a_length() -> None:
    """Chunk sizes, extensions and trailers end here."""
    body = b'4;x=y\r\n{"mo\r\n9\r\ndel":"m"}\r\n0\r\nX-Trailer: 1\r\n\r\n'
    head = post(body=b"").replace(b"Content-Length: 0", b"Transfer-Encoding: Chunked")

    async def play() -> None:
        async with stage(reply(ANSWER)) as act:
            client = await act.client()
            for request in (head + body) * 2, b"":
                client.send(request)
            for _ in range(2):
                assert (await client.answer()).status == 200
            assert [asked.body for asked in act.engine.asked] == [b'{"model":"m"}'] * 2
            assert "x-trailer" not in act.engine.asked[0].headers

    asyncio.run(play())


@pytest.mark.parametrize("step", [1, 2, 50])
def test_a_request_may_come_in_any_pieces(step: int) -> None:
    """Byte by byte if need be."""
    request = get("/hello?n=1") + post("/hello", b"hello")

    async def play() -> None:
        async with stage() as act:
            client = await act.client()
            for pos in range(0, len(request), step):
                client.send(request[pos : pos + step])
                await asyncio.sleep(0)
            assert (await client.answer()).json()["query"] == {"n": "1"}
            assert (await client.answer()).json()["body"] == "hello"

    asyncio.run(play())


def test_large_heads_take_of_the_same_memory() -> None:
    """While they come, and as long as their request lasts: many of them are as much as a body. All is given back."""
    field = b"X-Large: " + b"a" * 20_000

    async def play() -> None:
        async with stage(limits=Limits(ServerConfig(max_buffered=70_000))) as act:
            memory = act.server.memory
            coming = [await act.client(), await act.client()]
            coming[0].send(b"GET /hello HTTP/1.1\r\nHost: a\r\n" + field)
            await until(lambda: memory.held > 20_000)
            coming[1].send(b"GET /hello HTTP/1.1\r\nHost: a\r\n" + field)
            assert (await coming[1].answer()).status == 503
            await until(lambda: memory.held < 21_000)
            coming[0].send(b"\r\n\r\n")
            assert (await coming[0].answer()).status == 200
            await until(lambda: memory.held == 0)
            # With a body, and while the request waits.
            act.gate.opened.clear()
            waiting = await act.client()
            waiting.send(post("/v1/chat/completions", ANSWER).replace(b"\r\n\r\n", b"\r\n" + field + b"\r\n\r\n"))
            await soon(act.gate.entered.wait())
            assert memory.held > 20_000 + len(ANSWER)
            act.gate.opened.set()
            await waiting.answer()
            await until(lambda: memory.held == 0)
            # One that leaves in the middle of its head.
            leaving = await act.client()
            leaving.send(b"GET /hello HTTP/1.1\r\nHost: a\r\n" + field)
            await until(lambda: memory.held > 0)
            leaving.writer.transport.abort()
            await until(lambda: memory.held == 0)

    asyncio.run(play())


def test_memory_for_bodies_is_bounded_over_all_connections() -> None:
    """The sum of what is held has a limit of its own; what was refused and what is over is given back."""

    async def play() -> None:
        async with stage(limits=Limits(ServerConfig(max_buffered=300))) as act:
            first, second, third = [await act.client() for _ in range(3)]
            first.send(post("/hello", b"x" * 120)[:-1])
            await until(lambda: act.server.memory.held == 119)
            second.post("/hello", b"x" * 100)
            answer = await second.answer()
            assert (answer.status, "retry-after" in answer.headers) == (503, True)
            third.send(post("/hello", b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + b"50\r\n")
            third.send(b"x" * 60)
            assert (await third.answer()).status == 503
            first.send(b"x")
            assert (await first.answer()).status == 200
            assert act.server.memory.held == 0

    asyncio.run(play())


def test_an_announced_body_takes_no_memory_before_it_comes() -> None:
    """Sixteen heads that announce everything there is keep nobody out: memory is taken by bytes, not by words."""

    async def play() -> None:
        async with stage(reply(ANSWER), Limits(ServerConfig(max_body=1000, max_buffered=3000))) as act:
            for _ in range(16):
                slow = await act.client()
                slow.send(post("/v1/completions", b"x" * 1000)[:-999])
            await until(lambda: act.server.memory.held == 16)
            client = await act.client()
            client.post("/v1/completions", ANSWER)
            assert (await client.answer()).status == 200

    asyncio.run(play())


def test_a_body_that_stops_is_given_up_however_fast_it_was() -> None:
    """What has come early buys no time: a body of 64 MiB would be held for hours for a byte that never comes."""

    async def play() -> None:
        async with stage(limits=Limits(ServerConfig(body_timeout=0.2, min_body_rate=1000))) as act:
            client = await act.client()
            client.send(post("/hello", b"x" * 500_000)[:-1])
            assert (await client.answer()).status == 408
            assert act.server.memory.held == 0

    asyncio.run(play())


def test_a_route_that_takes_no_body_holds_none() -> None:
    """What is sent along with a GET is dropped as it comes, and counts for nothing; a large one is refused unread."""

    async def play() -> None:
        async with stage(limits=Limits(ServerConfig(max_buffered=10))) as act:
            act.router.add("GET", "/plain", hello)
            client = await act.client()
            client.send(post("/plain", b"x" * 5000).replace(b"POST", b"GET") + get("/plain"))
            for _ in range(2):
                answer = await client.answer()
                assert (answer.status, answer.json()["body"]) == (200, "")
            client.send(post("/plain", b"x" * 70_000).replace(b"POST", b"GET")[:200])
            assert (await client.answer()).status == 413

    asyncio.run(play())


def test_a_local_stream_is_sent_piece_by_piece_and_ends_with_its_client() -> None:
    """Each piece at once; when the client leaves, the iterator is closed."""

    async def play() -> None:
        go, gone = asyncio.Event(), asyncio.Event()

        async def events() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield b"data: x\n\n"
                    await go.wait()
                    go.clear()
            finally:
                gone.set()

        async def handler(request: Request) -> Response:
            return event_stream(events())

        async with stage() as act:
            act.router.add("GET", "/events", handler)
            client = await act.client()
            client.send(get("/events"))
            assert (await client.head())[1]["x-accel-buffering"] == "no"
            for _ in range(3):
                assert await soon(client.reader.readexactly(14)) == b"9\r\ndata: x\n\n\r\n"
                go.set()
            client.close()
            await soon(gone.wait())

    asyncio.run(play())


def test_a_local_stream_that_fails_looks_broken() -> None:
    """No last chunk; the daemon lives."""

    async def events() -> AsyncIterator[bytes]:
        yield b"data: x\n\n"
        raise RuntimeError("meant by the test")

    async def handler(request: Request) -> Response:
        return event_stream(events())

    async def play() -> None:
        async with stage() as act:
            act.router.add("GET", "/events", handler)
            client = await act.client()
            client.send(get("/events"))
            await client.head()
            assert await client.rest() == b"9\r\ndata: x\n\n\r\n"

    asyncio.run(play())


def test_a_handler_for_which_there_is_no_file_left_is_a_503() -> None:
    """Many read /proc, or a file, and none of them is at fault; in a moment it may be over."""

    async def handler(request: Request) -> Response:
        raise OSError(errno.EMFILE, "Too many open files", "/proc/1/stat")

    async def play() -> None:
        async with stage() as act:
            act.router.add("GET", "/full", handler)
            client = await act.client()
            client.send(get("/full") + get("/hello"))
            answer = await client.answer()
            assert (answer.status, answer.headers["retry-after"]) == (503, "5")
            assert answer.json()["error"]["message"] == "vllmd cannot do it now: Too many open files"
            assert (await client.answer()).status == 200

    asyncio.run(play())


def test_a_route_that_cannot_be_imported_is_answered(caplog: pytest.LogCaptureFixture) -> None:
    """At the first request for one: without a descriptor it is a 503, without its file a 500, and then it works.

    So it is a 503 where its file is of another version, for it works again when the upgrade has restarted the daemon.
    """
    failures: list[Exception] = [OSError(errno.EMFILE, "Too many open files", "/x.py"), ImportError("secret")]
    failures.insert(0, ImportError("secret: cannot import name 'New' from 'vllmd.errors'", name="vllmd.errors"))

    async def play() -> None:
        async with stage() as act:

            def add() -> None:
                if failures:
                    raise failures.pop(0)
                act.router.add("GET", "/later", hello)

            act.router.add_later(add)
            for status in (503, 503, 500, 200):
                client = await act.client()
                client.send(get("/later", "X-Request-Id: r1"))
                answer = await client.answer()
                assert answer.status == status
                assert b"secret" not in answer.body
            assert "GET /later failed: vllmd was upgraded and not restarted" in caplog.text
            assert "GET /later failed\n" in caplog.text  # with the error itself, where it is a fault

    asyncio.run(play())


def test_a_handler_that_fails_is_a_500_without_its_secrets() -> None:
    """The log has the traceback; the client has the request's id."""

    async def handler(request: Request) -> Response:
        raise RuntimeError("secret")

    async def play() -> None:
        async with stage() as act:
            act.router.add("GET", "/broken", handler)
            client = await act.client()
            client.send(get("/broken", "X-Request-Id: r1") + get("/hello"))
            answer = await client.answer()
            assert answer.status == 500
            assert "secret" not in answer.body.decode()
            assert "r1" in answer.json()["error"]["message"]
            assert (await client.answer()).status == 200

    asyncio.run(play())


def test_a_half_closed_client_gets_a_short_answer() -> None:
    """``printf ... | nc``: local handlers answer all the same."""

    async def play() -> None:
        async with stage() as act:
            client = await act.client()
            client.send(get("/hello"))
            client.writer.write_eof()
            assert (await client.answer()).status == 200
            assert await client.closed()

    asyncio.run(play())


def test_a_strange_request_id_is_replaced() -> None:
    """What goes into logs and headers is printable and short."""

    async def play() -> None:
        async with stage() as act:
            client = await act.client()
            client.send(get("/hello", "X-Request-Id: a b") + get("/hello", "X-Request-Id: " + "a" * 129))
            for _ in range(2):
                assert len((await client.answer()).headers["x-request-id"]) == 32

    asyncio.run(play())


def test_an_http_1_0_client_may_keep_its_connection() -> None:
    """ab, old proxies: where they ask for it, and the answer's end can be told."""
    request = post("/v1/completions", ANSWER, "Connection: Keep-Alive").replace(b"HTTP/1.1", b"HTTP/1.0")

    async def play() -> None:
        async with stage(reply(ANSWER)) as act:
            client = await act.client()
            client.send(request + get("/hello", "Connection: keep-alive").replace(b"HTTP/1.1", b"HTTP/1.0") + request)
            for _ in range(3):
                answer = await client.answer()
                assert (answer.status, answer.headers["connection"]) == (200, "keep-alive")
            client.send(request.replace(b"Connection: Keep-Alive\r\n", b""))
            assert (await client.answer()).headers["connection"] == "close"
            assert await client.closed()

    asyncio.run(play())
