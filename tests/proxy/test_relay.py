"""A model request's way there and back."""

from __future__ import annotations

import asyncio
import gc
import json
from typing import Any

import pytest

from tests.proxy.fakes import (
    EVENTS,
    Asked,
    Engine,
    Script,
    Stage,
    chunked,
    get,
    post,
    raw,
    reply,
    reset,
    soon,
    stage,
    until,
)
from vllmd.config.types import RequestRules, ServerConfig
from vllmd.engines.base import Listen
from vllmd.errors import Unavailable
from vllmd.proxy.account import Trace
from vllmd.proxy.forward import AnswerRelay
from vllmd.proxy.gate import Target
from vllmd.proxy.http import Request
from vllmd.proxy.limits import Limits
from vllmd.proxy.tokens import from_usage

ANSWER = b'{"model":"m","choices":[],"usage":{"prompt_tokens":3,"total_tokens":12}}'


def test_the_engine_gets_the_body_byte_for_byte() -> None:
    """Odd spacing, order and escapes are the client's business; only hop-by-hop fields and keys are taken out."""
    body = b'{ "temperature":1e-1,\t"model" : "m" , "x":"\\u00e4\xc3\xa4" }\n'

    async def play() -> None:
        async with stage(reply(ANSWER)) as act:
            client = await act.client()
            client.post(
                "/v1/chat/completions?a=1&b=%20",
                body,
                "Authorization: Bearer secret",
                "X-Api-Key: secret",
                "Cookie: a=b",
                "Connection: X-Private",
                "X-Private: 1",
                "TE: trailers",
                "traceparent: 00-1-2-01",
                "X-Request-Id: mine",
                "Accept: application/json",
            )
            answer = await client.answer()
            assert (answer.status, answer.body) == (200, ANSWER)
            assert answer.headers["x-request-id"] == "mine"
            (asked,) = act.engine.asked
            assert asked.line == "POST /v1/chat/completions?a=1&b=%20 HTTP/1.1"
            assert asked.body == body
            assert asked.headers == {
                "host": "localhost",
                "traceparent": "00-1-2-01",
                "accept": "application/json",
                "content-type": "application/json",
                "x-request-id": "mine",
                "content-length": str(len(body)),
            }
            assert act.gate.permits[0].endings == [12]

    asyncio.run(play())


def test_a_traced_request_makes_the_engines_spans_children_of_ours() -> None:
    """The engine gets our ``traceparent`` instead of the client's, on every way that a request may go."""
    trace = Trace("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", "1122334455667788")

    class Tracing:
        def begin(self, request: Request) -> Trace | None:
            return trace if request.headers.get("traceparent") else None

    async def play() -> None:
        async with stage(reply(ANSWER), tracer=Tracing()) as act:
            client = await act.client()
            for fields in (["traceparent: 00-1-1122334455667788-01", "tracestate: a=b"], []):
                client.post("/v1/chat/completions", b'{"model":"m"}', *fields)
                assert (await client.answer()).status == 200
            traced, plain = act.engine.asked
            assert traced.headers["traceparent"] == trace.field
            assert traced.head.lower().count("traceparent") == 1
            assert traced.headers["tracestate"] == "a=b"
            assert "traceparent" not in plain.headers

    asyncio.run(play())


def test_a_client_whose_requests_are_not_all_traced_sends_no_second_traceparent() -> None:
    """Where its own is malformed, chance decides about each request of a connection, whose fields are all the same."""
    trace = Trace("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", "")
    decided = [None, trace, None, trace]

    class Tracing:
        def begin(self, request: Request) -> Trace | None:
            return decided[len(act.engine.asked)]

    async def play() -> None:
        nonlocal act
        async with stage(reply(ANSWER), tracer=Tracing()) as act:
            client = await act.client()
            for _ in decided:
                client.post("/v1/chat/completions", b'{"model":"m"}', "traceparent: malformed")
                assert (await client.answer()).status == 200
            assert [asked.headers["traceparent"] for asked in act.engine.asked] == ["malformed", trace.field] * 2
            assert all(asked.head.lower().count("traceparent") == 1 for asked in act.engine.asked)

    act: Any = None
    asyncio.run(play())


def test_another_name_is_put_in_and_nothing_else_changes() -> None:
    """An alias becomes the engine's own name in the request, and the client's again in the answer."""

    async def play() -> None:
        async with stage(reply(ANSWER)) as act:
            act.gate.target = Target("m", 'served "m"', headers=(("Authorization", "Bearer remote"),))
            client = await act.client()
            client.post("/v1/completions", '{"a": 1, "model" :"m-alias", "ä": "m-alias"}'.encode())
            await client.answer()
            assert act.engine.asked[0].body == '{"a": 1, "model" :"served \\"m\\"", "ä": "m-alias"}'.encode()
            assert act.engine.asked[0].headers["authorization"] == "Bearer remote"

    asyncio.run(play())


@pytest.mark.parametrize("path", ["/v1/audio/transcriptions", "/v1/audio/translations"])
def test_a_form_names_its_model_too(path: str) -> None:
    """multipart/form-data: the field is replaced, the file's bytes are not touched."""
    file = b"RIFF\r\n-- x\r\n\x00\xff"
    form = (
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n%b\r\n'
        b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n--x--\r\n'
    )

    async def play() -> None:
        async with stage(reply(ANSWER)) as act:
            act.gate.target = Target("m", "served")
            client = await act.client()
            client.post(path, form % (file, b"m-alias"), "Content-Type: multipart/form-data; boundary=x")
            assert (await client.answer()).status == 200
            assert act.engine.asked[0].body == form % (file, b"served")

    asyncio.run(play())


def test_a_stream_passes_as_it_comes() -> None:
    """Each event reaches the client before the next one is made; the bytes, framing included, are the engine's."""
    events = [b"data: {}\n\n", b"data: {1}\n\n" + b": keep-alive\n\n", b"data: [DONE]\n\n"]

    async def play() -> None:
        taken = asyncio.Event()

        async def script(engine: Engine, asked: Asked, writer: asyncio.StreamWriter) -> None:
            writer.write(EVENTS)
            for event in events:
                writer.write(chunked(event))
                await soon(taken.wait())
                taken.clear()
            writer.write(b"0\r\n\r\n")

        async with stage(script) as act:
            client = await act.client()
            client.post(body=b'{"model":"m","stream":true}')
            status, headers = await client.head()
            assert (status, headers["content-type"], headers["x-accel-buffering"]) == (200, "text/event-stream", "no")
            for event in events:
                assert await soon(client.reader.readexactly(len(chunked(event)))) == chunked(event)
                taken.set()
            assert await soon(client.reader.readexactly(5)) == b"0\r\n\r\n"

    asyncio.run(play())


STREAM = (
    EVENTS + b"".join(map(chunked, [b'data: {"model":"served","n":1}\n', b"\n", b"data: [DONE]\n\n"])) + b"0\r\n\r\n"
)


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_an_alias_is_put_back_into_a_stream(step: int) -> None:
    """However the engine's bytes are cut, every event has the name that the client asked for."""
    pieces = [STREAM[pos : pos + step] for pos in range(0, len(STREAM), step)]

    async def play() -> None:
        async with stage(raw(*pieces)) as act:
            act.gate.target = Target("m", "served")
            client = await act.client()
            client.post(body=b'{"model":"m-alias","stream":true}')
            answer = await client.answer()
            assert answer.body == b'data: {"model":"m-alias","n":1}\n\ndata: [DONE]\n\n'

    asyncio.run(play())


def test_an_old_client_gets_a_stream_without_chunks() -> None:
    """HTTP/1.0 has none: the payload comes bare and the connection's end ends it."""

    async def play() -> None:
        async with stage(raw(STREAM)) as act:
            client = await act.client()
            client.send(post(body=b'{"model":"m"}').replace(b"HTTP/1.1", b"HTTP/1.0"))
            answer = await client.answer()
            assert "transfer-encoding" not in answer.headers
            assert answer.body == b'data: {"model":"served","n":1}\n\ndata: [DONE]\n\n'

    asyncio.run(play())


def test_a_body_that_ends_with_the_connection_is_passed_and_ended_so() -> None:
    """Neither length nor chunks: the end of the engine's connection is the end of the client's."""

    async def play() -> None:
        async with stage(
            raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n", b"some", b"thing", close=True)
        ) as act:
            client = await act.client()
            client.post()
            answer = await client.answer()
            assert (answer.body, answer.headers["connection"]) == (b"something", "close")

    asyncio.run(play())


@pytest.mark.parametrize("body", [b'{"detail":"Not Found"}', b'{"detail":"not found"}'])
def test_a_route_that_the_engine_does_not_have_is_said_in_words(body: bytes) -> None:
    """A wrong kind of model, as one that embeds asked to chat; another answer of that length is the engine's own."""
    head = "HTTP/1.1 404 Not Found\r\nContent-Type: application/json\r\n"

    async def play() -> None:
        async with stage(reply(body, head)) as act:
            client = await act.client()
            client.post()
            answer = await client.answer()
            assert answer.status == 404
            if b"Not" in body:
                assert "the model 'm' does not serve /v1/" in answer.json()["error"]["message"]
                client.send(get("/tokenizer_info?model=m"))
                assert "enable-tokenizer-info-endpoint" in (await client.answer()).json()["error"]["message"]
            else:
                assert answer.body == body

    asyncio.run(play())


def test_an_engines_error_passes_as_it_is() -> None:
    """Status, fields and body are the engine's; hop-by-hop fields are not passed on."""
    fields = ["Content-Type: application/json", "X-Engine: 1", "Server: uvicorn", "Keep-Alive: x", ""]
    head = "\r\n".join(["HTTP/1.1 404 Not Found", *fields])

    async def play() -> None:
        async with stage(reply(b'{"error":{}}', head)) as act:
            client = await act.client()
            client.post()
            answer = await client.answer()
            assert (answer.status, answer.body, answer.headers["x-engine"]) == (404, b'{"error":{}}', "1")
            assert not {"server", "keep-alive"} & answer.headers.keys()

    asyncio.run(play())


def test_interim_answers_are_not_the_answer() -> None:
    """100 and 103 of an engine are passed over."""

    async def play() -> None:
        early = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
        async with stage(raw(early + b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")) as act:
            client = await act.client()
            client.post()
            assert (await client.answer()).body == b"ok"

    asyncio.run(play())


def test_one_engine_connection_serves_many_requests() -> None:
    """Kept between requests, and after a complete answer only."""

    async def play() -> None:
        async with stage(reply(ANSWER)) as act:
            client = await act.client()
            for _ in range(5):
                client.post()
                assert (await client.answer()).status == 200
            assert (act.engine.connections, len(act.relay.pool.idle())) == (1, 1)

    asyncio.run(play())


def test_a_kept_connection_expires() -> None:
    """Engines close theirs after 5 s; ours goes earlier, by itself."""

    async def play() -> None:
        async with stage(reply(ANSWER), Limits(ServerConfig(upstream_idle=0.05))) as act:
            client = await act.client()
            client.post()
            await client.answer()
            await soon(act.engine.ended.wait())
            assert act.relay.pool.idle() == []
            client.post()
            assert (await client.answer()).status == 200
            assert act.engine.connections == 2

    asyncio.run(play())


def test_a_kept_connection_that_turns_out_closed_is_replaced_once() -> None:
    """The race with the engine's own keep-alive limit: nothing was answered, so the request goes again."""

    async def script(engine: Engine, asked: Asked, writer: asyncio.StreamWriter) -> None:
        if len(engine.asked) == 2:
            writer.close()  # the request was taken, and the connection is gone without a byte
            return
        await reply(ANSWER)(engine, asked, writer)

    async def play() -> None:
        async with stage(script) as act:
            client = await act.client()
            for _ in range(2):
                client.post()
                assert (await client.answer()).status == 200
            assert [asked.line for asked in act.engine.asked] == ["POST /v1/chat/completions HTTP/1.1"] * 3
            assert len(act.gate.permits) == 2

    asyncio.run(play())


@pytest.mark.parametrize(
    "script",
    [
        raw(close=True),
        raw(b"HTTP/1.1 200", close=True),
        raw(b"nonsense\r\n\r\n"),
        raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n"),
        raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n"),
        raw(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 300_000),
        raw(b"HTTP/1.1 101 Switching Protocols\r\n\r\n", close=True),
    ],
)
def test_an_engine_that_answers_nothing_sound_is_a_502(script: object) -> None:
    """Before the first byte for the client the truth can still be told; a fresh connection is not tried twice."""

    async def play() -> None:
        async with stage(script) as act:  # type: ignore[arg-type]
            client = await act.client()
            client.post()
            answer = await client.answer()
            assert (answer.status, answer.json()["error"]["code"]) == (502, "upstream_failed")
            assert len(act.engine.asked) == 1
            client.send(get("/hello"))
            assert (await client.answer()).status == 200

    asyncio.run(play())


@pytest.mark.parametrize("part", [b"HTTP/1.1 200", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"])
def test_a_request_that_was_answered_in_part_is_not_sent_again(part: bytes) -> None:
    """On a kept connection, too, a byte of an answer means that the engine has had the request: it may have acted."""

    async def script(engine: Engine, asked: Asked, writer: asyncio.StreamWriter) -> None:
        await (raw(part, close=True) if len(engine.asked) == 2 else reply(ANSWER))(engine, asked, writer)

    async def play() -> None:
        async with stage(script) as act:
            client = await act.client()
            client.post()
            assert (await client.answer()).status == 200
            client.post()
            await until(lambda: len(act.engine.asked) == 2)
            await until(lambda: all(permit.over.is_set() for permit in act.gate.permits))
            assert len(act.engine.asked) == 2

    asyncio.run(play())


def test_who_finds_nobody_listening_waits_at_the_gate_again() -> None:
    """Its engine has just died and the gate does not know yet: nothing was sent, so nothing is sent twice."""

    async def play() -> None:
        async with stage(reply(ANSWER)) as act:
            listening, act.gate.upstream = act.gate.upstream, Listen(uds="/no/such/engine.sock")
            client = await act.client()
            client.post("/v1/completions", b'{"model":"m"}')
            await until(lambda: len(act.gate.permits) >= 2)
            act.gate.opened.clear()  # now it knows, and starts another
            await until(lambda: act.gate.waiting == 1)
            act.gate.upstream = listening
            act.gate.opened.set()
            answer = await client.answer()
            assert (answer.status, answer.body) == (200, ANSWER)
            assert len(act.engine.asked) == 1

    asyncio.run(play())


def test_an_engine_that_is_not_there_is_a_502() -> None:
    """The message says what is missing, and not where sockets of engines are: that is no client's business."""

    async def play() -> None:
        async with stage() as act:
            act.gate.upstream = Listen(uds="/nowhere/engine.sock")
            client = await act.client()
            client.post()
            answer = await client.answer()
            assert answer.status == 502
            told = answer.json()["error"]["message"]
            assert told == "no connection to the engine's socket: No such file or directory"

    asyncio.run(play())


async def nonsense_later(engine: Engine, asked: Asked, writer: asyncio.StreamWriter) -> None:
    """A chunk, and when the client has it, no chunk."""
    writer.write(EVENTS + chunked(b"data: 1\n\n"))
    await soon(engine.go.wait())
    writer.write(b"nonsense\r\n")


CLOSE_ENDED = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n"


async def reset_in_the_middle(engine: Engine, asked: Asked, writer: asyncio.StreamWriter) -> None:
    """Dies before its answer, which has no length, is over."""
    writer.write(CLOSE_ENDED + b"abc")
    await soon(engine.go.wait())
    reset(writer)


@pytest.mark.parametrize(
    ("script", "version"),
    [(raw(EVENTS + chunked(b"abc") + b"5\r\nde", close=True), "1.0"), (reset_in_the_middle, "1.1")],
)
def test_a_truncated_answer_that_ends_with_the_connection_ends_with_a_reset(script: object, version: str) -> None:
    """Old clients, and bodies without a length: an orderly close would say that this was all."""

    async def play() -> None:
        async with stage(script) as act:  # type: ignore[arg-type]
            client = await act.client()
            client.send(post().replace(b"HTTP/1.1", f"HTTP/{version}".encode()))
            assert (await client.head())[0] == 200
            assert (await soon(client.reader.readexactly(3))) == b"abc"
            act.engine.go.set()
            with pytest.raises(ConnectionResetError):
                await soon(client.reader.read(-1))
            await until(lambda: act.ended)
            assert act.ended[0].error == "UpstreamFailed"

    asyncio.run(play())


@pytest.mark.parametrize(
    ("script", "came"),
    [
        (raw(EVENTS + chunked(b"data: 1\n\n"), close=True), chunked(b"data: 1\n\n")),
        (raw(EVENTS + chunked(b"data: 1\n\n") + b"5\r\nab", close=True), chunked(b"data: 1\n\n") + b"5\r\nab"),
        (nonsense_later, chunked(b"data: 1\n\n")),
        (raw(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", close=True), b"abc"),
    ],
)
def test_a_truncated_answer_looks_truncated(script: object, came: bytes) -> None:
    """What came is passed on, then the connection ends: no last chunk, no full length, no clean end."""

    async def play() -> None:
        async with stage(script) as act:  # type: ignore[arg-type]
            client = await act.client()
            client.post()
            assert (await client.head())[0] == 200
            act.engine.go.set()
            assert await client.rest() == came
            await until(lambda: act.ended)
            assert act.ended[0].error == "UpstreamFailed"

    asyncio.run(play())


async def endless(engine: Engine, asked: Asked, writer: asyncio.StreamWriter) -> None:
    """A stream that goes on as long as somebody takes it."""
    writer.write(EVENTS)
    while True:
        writer.write(chunked(b"data: " + b"x" * 1000 + b"\n\n"))
        await writer.drain()
        await asyncio.sleep(0)


async def silent(engine: Engine, asked: Asked, writer: asyncio.StreamWriter) -> None:
    """An engine that takes the request and thinks."""
    await asyncio.Event().wait()


def _leave_by_close(act: Stage) -> None:
    act.clients[0].close()


def _leave_by_reset(act: Stage) -> None:
    act.clients[0].reset()


LEAVING = [_leave_by_close, _leave_by_reset]  # one that only shuts its sending side waits: test_departures.py


@pytest.mark.parametrize("leave", LEAVING)
@pytest.mark.parametrize("script", [endless, silent])
def test_a_client_that_leaves_frees_the_engine(script: object, leave: object) -> None:
    """Its engine connection is closed at once, before or in the middle of the answer, so generating stops."""

    async def play() -> None:
        async with stage(script) as act:  # type: ignore[arg-type]
            client = await act.client()
            client.post()
            await until(lambda: act.engine.asked)
            if script is endless:
                await client.head()
            leave(act)  # type: ignore[operator]
            await soon(act.engine.ended.wait())
            await soon(act.gate.permits[0].over.wait())
            assert act.relay.pool.idle() == []

    asyncio.run(play())


@pytest.mark.parametrize("leave", LEAVING)
def test_a_client_that_leaves_the_queue_is_taken_off_it(leave: object) -> None:
    """The gate's wait is cancelled and owes no permit."""

    async def play() -> None:
        async with stage() as act:
            act.gate.opened.clear()
            client = await act.client()
            client.post()
            await soon(act.gate.entered.wait())
            leave(act)  # type: ignore[operator]
            await until(lambda: act.gate.left == 1)
            assert (act.gate.permits, act.engine.asked) == ([], [])
            await until(lambda: act.ended)
            assert act.ended[0].error == "ClientGone"

    asyncio.run(play())


def test_a_slow_reader_holds_up_its_own_engine_and_nobody_else() -> None:
    """Its engine is not read any more once the buffers are full; another client streams on beside it."""
    written = 0

    async def script(engine: Engine, asked: Asked, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        if b"slow" not in asked.body:
            await reply(ANSWER)(engine, asked, writer)
            return
        writer.write(EVENTS)
        while True:
            writer.write(chunked(b"x" * 65536))
            written += 65536
            await writer.drain()
            await asyncio.sleep(0)

    async def settled() -> int:
        """How much was written when no more was for a while; the kernel's buffers decide."""
        last = -1
        while last != written:
            last = written
            await asyncio.sleep(0.1)
        return last

    async def play() -> None:
        async with stage(script) as act:
            slow, quick = await act.client(), await act.client()
            slow.writer.transport.pause_reading()  # type: ignore[attr-defined]
            slow.post(body=b'{"model":"m","slow":1}')
            stuck = await soon(settled())
            assert 0 < stuck < 64 << 20
            for _ in range(3):
                quick.post()
                assert (await quick.answer()).status == 200
            assert written == stuck
            slow.writer.transport.resume_reading()  # type: ignore[attr-defined]
            await soon(slow.reader.readexactly(stuck + (1 << 20)))
            assert written > stuck

    asyncio.run(play())


def test_a_client_that_takes_nothing_is_cut_off_in_the_end() -> None:
    """An engine is not held for ever by somebody who stopped reading."""

    async def play() -> None:
        async with stage(endless, Limits(ServerConfig(send_timeout=0.2))) as act:
            client = await act.client()
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            client.post()
            await soon(act.engine.ended.wait())
            await soon(act.gate.permits[0].over.wait())

    asyncio.run(play())


@pytest.mark.parametrize(("script", "status"), [(silent, 503), (endless, 200)])
def test_a_cut_request_ends(script: object, status: int) -> None:
    """The daemon may break a request off: an error before the answer began, a truncation after."""

    async def play() -> None:
        async with stage(script) as act:  # type: ignore[arg-type]
            client = await act.client()
            client.post()
            await until(lambda: act.engine.asked)
            head = asyncio.ensure_future(client.head())
            if script is endless:
                await head
            act.gate.permits[0].cut("its drain limit has passed")
            assert (await head)[0] == status
            assert not (await client.rest()).endswith(b"0\r\n\r\n") if script is endless else True
            await soon(act.engine.ended.wait())
            await soon(act.gate.permits[0].over.wait())
            act.gate.permits[0].cut("again")

    asyncio.run(play())


def test_a_refusal_comes_with_its_reason() -> None:
    """What the gate raises is what the client reads, Retry-After included."""

    async def play() -> None:
        async with stage() as act:
            act.gate.refusal = Unavailable("the queue is full", retry_after=7)
            client = await act.client()
            client.post()
            answer = await client.answer()
            assert (answer.status, answer.headers["retry-after"]) == (503, "7")
            assert answer.json()["error"]["message"] == "the queue is full"

    asyncio.run(play())


def test_a_response_is_looked_up_where_it_was_made() -> None:
    """GET /v1/responses/{id} has no model: the one that answered the POST is remembered."""

    async def play() -> None:
        async with stage(reply(b'{"id": "resp_1", "model": "m"}')) as act:
            client = await act.client()
            client.post("/v1/responses")
            await client.answer()
            client.send(get("/v1/responses/resp_1?starting_after=2"))
            assert (await client.answer("GET")).status == 200
            assert act.engine.asked[1].line == "GET /v1/responses/resp_1?starting_after=2 HTTP/1.1"
            assert act.engine.asked[1].body == b""
            client.send(get("/v1/responses/resp_2"))
            assert (await client.answer("GET")).status == 404
            act.relay.requests.responses.forget("another")
            client.send(get("/v1/responses/resp_1"))
            assert (await client.answer("GET")).status == 200
            act.relay.requests.responses.forget(
                "m"
            )  # its engine has ended: to ask would start it in order to hear that it has nothing
            client.send(get("/v1/responses/resp_1"))
            assert (await client.answer("GET")).status == 404
            assert len(act.gate.permits) == 3

    asyncio.run(play())


def test_a_response_keeps_the_name_that_it_was_asked_for_by() -> None:
    """The GET has no name, but its answer has: the one that the POST had."""

    async def play() -> None:
        async with stage(reply(b'{"id": "resp_1", "model": "served"}')) as act:
            act.gate.target = Target("m", "served")
            client = await act.client()
            client.post("/v1/responses", b'{"model":"m-alias"}')
            assert (await client.answer()).json()["model"] == "m-alias"
            client.send(get("/v1/responses/resp_1"))
            assert (await client.answer("GET")).json()["model"] == "m-alias"

    asyncio.run(play())


def test_the_rest_of_an_engines_api_is_behind_upstream() -> None:
    """/upstream/{model}/...: the longest model name that fits, with or without its slash escaped."""

    async def play() -> None:
        async with stage() as act:
            client = await act.client()
            client.send(get("/upstream/m-alias/metrics?a=1"))
            assert (await client.answer("GET")).status == 200
            assert act.engine.asked[0].line == "GET /metrics?a=1 HTTP/1.1"
            client.send(get("/upstream/unknown/metrics"))
            assert (await client.answer("GET")).status == 404
            client.send(get("/upstream/m/files/wake_up/a%2Fb%20c.css"))
            assert (await client.answer("GET")).status == 200
            assert act.engine.asked[1].line == "GET /files/wake_up/a%2Fb%20c.css HTTP/1.1"

    asyncio.run(play())


def test_a_models_name_is_no_word_against_it() -> None:
    """What is passed on is judged by the engine's path alone: a model may be called whatever it is."""

    async def play() -> None:
        async with stage() as act:
            act.gate.names = ("lab/sleep-7b",)
            client = await act.client()
            for path, status in [
                ("metrics", 200),
                ("sleep", 403),
                ("metrics/SLEEP", 403),
                ("fault_tolerance/apply", 403),
                ("METRICS", 403),
                ("", 403),
            ]:
                client.send(get(f"/upstream/lab/sleep-7b/{path}"))
                assert (await client.answer("GET")).status == status
            assert [asked.line for asked in act.engine.asked] == ["GET /metrics HTTP/1.1"]

    asyncio.run(play())


def test_an_engine_does_not_speak_for_our_origin() -> None:
    """Which pages may read an answer, cookies, other servers: ours to say, so neither side hears of the other's."""
    ours = ("Access-Control-Allow-Origin: *", "Set-Cookie: a=b", "Alt-Svc: h3", "Strict-Transport-Security: max-age=1")
    head = "\r\n".join(["HTTP/1.1 200 OK", "Content-Type: application/json", *ours, ""])

    async def play() -> None:
        async with stage(reply(b"{}", head)) as act:
            act.router.cors.configure(["https://chat.example"])
            client = await act.client()
            client.post("/v1/completions", b'{"model":"m"}', "Origin: https://chat.example")
            answer = await client.answer()
            assert answer.headers.pop("access-control-allow-origin") == "https://chat.example"
            assert not {field.split(":")[0].lower() for field in ours} & answer.headers.keys()
            assert "origin" not in act.engine.asked[0].headers

    asyncio.run(play())


@pytest.mark.parametrize("told", ["Content-Length: 7\r\n", "Transfer-Encoding: chunked\r\n"])
def test_the_head_of_an_answer_tells_what_a_get_would(told: str) -> None:
    """HEAD is the engine's to answer; a length in it is that of the body which does not come."""
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n{told}\r\n"

    async def play() -> None:
        async with stage(raw(head.encode())) as act:
            client = await act.client()
            for _ in range(2):
                client.send(get("/upstream/m/version", method="HEAD"))
                status, headers = await client.head()
                assert (status, headers.get("content-length")) == (200, "7" if "Length" in told else None)

    asyncio.run(play())


USAGES = [
    (b'{"content":[],"usage":{"input_tokens":11,"output_tokens":3}}', 14),
    (b'{"usage": {"output_tokens" : 3}}', None),  # half of it: what was sent is not in it
    (b'{"usage":{"input_tokens":11,"input_tokens_details":{"x":1},"output_tokens":4,"total_tokens":15}}', 15),
    (
        b'data: {"usage":{"input_tokens":9,"output_tokens":0}}\n\ndata: {"usage":{"input_tokens":9,"output_tokens":3}}',
        12,
    ),
    (b'{"input_tokens":11}', None),
    (b'{"text":"\\"total_tokens\\": 5, \\"output_tokens\\": 6"}', None),
    (b'{"usage":null}', None),
]


@pytest.mark.parametrize(("tail", "tokens"), USAGES)
def test_the_usage_is_read_in_every_apis_words(tail: bytes, tokens: int | None) -> None:
    """OpenAI's has a total, Anthropic's has not; counting tokens spends none; what a text says is no usage."""
    found = from_usage(tail)
    assert (found.total if found else None) == tokens


def test_a_route_that_the_model_does_not_serve_is_a_404() -> None:
    """Before anything is loaded for it."""

    async def play() -> None:
        async with stage() as act:
            act.gate.target = Target("m", "m", frozenset({"/v1/embeddings"}))
            client = await act.client()
            client.post()
            assert (await client.answer()).status == 404
            client.post("/v1/embeddings")
            assert (await client.answer()).status == 200
            assert len(act.gate.permits) == 1

    asyncio.run(play())


RULES = RequestRules(strip=("user", "logit_bias"), set={"temperature": 0.5, "stop": ["a"]}, default={"top_p": 0.9})


def test_a_models_rules_change_the_request() -> None:
    """Members are taken out, set and filled in; what no rule names keeps its spelling, floats included."""
    body = b'{"user":"me","model":"m-alias","temperature": 1,"x":1.50,"messages":[{"user":"\\u00e4"}]}'

    async def play() -> None:
        async with stage(reply(b'{"model":"served"}')) as act:
            act.gate.target = Target("m", "served", rules=RULES)
            client = await act.client()
            client.post("/v1/chat/completions", body)
            assert (await client.answer()).json() == {"model": "m-alias"}
            sent = act.engine.asked[0].body
            assert b'"x":1.50,"messages":[{"user":"\\u00e4"}]' in sent
            expected = {"model": "served", "temperature": 0.5, "stop": ["a"], "top_p": 0.9}
            assert {key: value for key, value in json.loads(sent).items() if key not in ("x", "messages")} == expected

    asyncio.run(play())


def test_a_rule_about_streaming_is_heeded_by_ourselves() -> None:
    """A request whose stream was switched off waits for its model in silence, as one that never asked."""

    async def play() -> None:
        async with stage(reply(ANSWER), Limits(ServerConfig(loading_comment_interval=0.01))) as act:
            act.gate.target = Target("m", "m", rules=RequestRules(set={"stream": False}))
            act.gate.opened.clear()
            client = await act.client()
            client.post(body=b'{"model":"m","stream":true}')
            await soon(act.gate.entered.wait())
            await asyncio.sleep(0.05)  # several intervals: a comment would have come
            act.gate.opened.set()
            answer = await client.answer()
            assert (answer.headers["content-type"], answer.body) == ("application/json", ANSWER)

    asyncio.run(play())


def test_anthropics_clients_get_errors_in_anthropics_shape() -> None:
    """Their SDK reads ``type`` and ``error.type``; everybody else gets OpenAI's."""

    async def play() -> None:
        async with stage(reply(ANSWER)) as act:
            client = await act.client()
            client.post("/v1/messages", b'{"model":"nobody"}')
            answer = await client.answer()
            told = {"type": "not_found_error", "message": "no model 'nobody'; there is 'm'"}
            assert (answer.status, answer.json()) == (404, {"type": "error", "error": told})
            client.post("/v1/messages", b'{"model":')
            assert (await client.answer()).json()["error"]["type"] == "invalid_request_error"
            client.post("/v1/completions", b'{"model":"nobody"}')
            assert (await client.answer()).json()["error"]["code"] == "model_not_found"
            client.send(b"POST /v1/messages HTTP/1.1\r\nHost: vllmd\r\nContent-Length: 999999999\r\n\r\n")
            assert (await client.answer()).json()["error"]["type"] == "request_too_large"

    asyncio.run(play())


def test_a_request_that_takes_too_long_is_answered_504() -> None:
    """At the gate or at the engine; its permit ends and the engine's connection is closed, so it stops working."""

    async def never(engine: Engine, asked: Asked, writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async def play() -> None:
        async with stage(never, Limits(ServerConfig(request_timeout=0.1))) as act:
            for shut in (True, False):
                (act.gate.opened.clear if shut else act.gate.opened.set)()
                client = await act.client()
                client.post()
                answer = await client.answer()
                assert (answer.status, answer.json()["error"]["code"]) == (504, "request_timeout")
                assert await client.closed()
            await soon(act.engine.ended.wait())
            assert [exchange.error for exchange in act.ended] == ["TookTooLong"] * 2

    asyncio.run(play())


def test_a_stream_that_takes_too_long_is_broken_off() -> None:
    """Its 200 has gone out, so the client sees that the body has no end."""

    async def endless(engine: Engine, asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(EVENTS + chunked(b"data: {}\n\n"))
        await asyncio.Event().wait()

    async def play() -> None:
        async with stage(endless, Limits(ServerConfig(request_timeout=0.1))) as act:
            client = await act.client()
            client.post(body=b'{"model":"m","stream":true}')
            assert (await client.head())[0] == 200
            assert await client.rest() == chunked(b"data: {}\n\n")

    asyncio.run(play())


def test_many_refused_requests_in_one_piece_are_answered_in_order() -> None:
    """Each is answered within the very call that read it; that must not pile up one upon the other."""

    async def play() -> None:
        async with stage(reply(ANSWER), Limits(ServerConfig(pipeline=1 << 20))) as act:
            client = await act.client()
            client.send(post(body=b'{"model":"nobody"}') * 2000 + post())
            for _ in range(2000):
                assert (await client.answer()).status == 404
            assert (await client.answer()).body == ANSWER

    asyncio.run(play())


@pytest.mark.parametrize(
    ("location", "path", "told"),
    [
        ("http://localhost/v1/chat/completions/?a=1", "/v1/chat/completions", "/v1/chat/completions/?a=1"),
        ("http://127.0.0.1:{port}/docs", "/v1/completions", "/docs"),
        ("//127.0.0.1:{port}/docs?a", "/v1/completions", "/docs?a"),
        ("http://LOCALHOST:{port}", "/v1/completions", "/"),
        ("http://0.0.0.0:{port}/docs", "/v1/completions", "/docs"),
        ("http://127.0.0.1:{port}?a=1", "/v1/completions", "/?a=1"),
        ("//elsewhere.example/x", "/v1/completions", "//elsewhere.example/x"),
        ("/login", "/v1/completions", "/login"),
        ("https://elsewhere.example/x", "/v1/completions", "https://elsewhere.example/x"),
        ("next", "/v1/completions", "next"),
    ],
)
def test_a_redirect_makes_sense_outside(location: str, path: str, told: str) -> None:
    """An engine's own address means nothing to a client; another server's is left alone."""

    async def play() -> None:
        async with stage(reply(b"")) as act:
            where = location.format(port=act.gate.upstream.port)
            act.engine.script = reply(b"", f"HTTP/1.1 307 Go\r\nLocation: {where}\r\n")
            client = await act.client()
            for _ in range(2):  # the second head is known already
                client.post(path)
                answer = await client.answer()
                assert (answer.status, answer.headers["location"]) == (307, told)

    asyncio.run(play())


@pytest.mark.parametrize("query", ["key=s", "a=1&api_key=s&b", "API-Key=s&a=1", "a=1&access_token=s", "token=s"])
def test_a_key_in_a_query_reaches_no_engine(query: str) -> None:
    """It opens nothing here, and an engine would write it to its log; what else is asked goes on."""

    async def play() -> None:
        async with stage(reply(ANSWER)) as act:
            client = await act.client()
            client.post(f"/v1/completions?{query}")
            assert (await client.answer()).status == 200
            seen = act.engine.asked[0].line
            assert "=s" not in seen and ("a=1" in seen) == ("a=1" in query)

    asyncio.run(play())


def test_azures_paths_name_the_model() -> None:
    """Its clients call a model a deployment, and their bodies say of the model what they like."""

    async def play() -> None:
        async with stage(reply(ANSWER)) as act:
            client = await act.client()
            for path in ("/openai/deployments/m-alias/completions?api-version=2024", "/v1/engines/m-alias/completions"):
                client.post(path, b'{"model":"gpt-4o","prompt":"x"}')
                assert (await client.answer()).status == 200
                asked = act.engine.asked[-1]
                assert (asked.line.split()[1].partition("?")[0], json.loads(asked.body)["model"]) == (
                    "/v1/completions",
                    "m",
                )

    asyncio.run(play())


def test_an_engines_page_is_one_slash_further() -> None:
    """Links in it are relative, and its redirects stay within its own paths."""

    async def play() -> None:
        async with stage(reply(b"", "HTTP/1.1 302 Go\r\nLocation: /app?x=1\r\n")) as act:
            act.gate.target = Target("m", "m", own_api=frozenset({"GET /{rest:path}", "GET /"}))
            client = await act.client()
            client.send(get("/upstream/m?a=1"))
            answer = await client.answer()
            assert (answer.status, answer.headers["location"]) == (308, "/upstream/m/?a=1")
            client.send(get("/upstream/m/"))
            answer = await client.answer()
            assert (answer.status, answer.headers["location"]) == (302, "/upstream/m/app?x=1")

    asyncio.run(play())


@pytest.mark.parametrize(
    ("script", "status"),
    [(reply(ANSWER), 200), (reply(ANSWER, "HTTP/1.1 400 Bad\r\n"), 400), (raw(close=True), 502)],
    ids=["answered", "refused", "broken off"],
)
def test_what_is_over_is_freed_at_once(script: Script, status: int) -> None:
    """Bodies of 64 MiB: in a cycle of references they would stay, uncounted, until the collector comes by."""

    async def play() -> None:
        async with stage(script) as act:
            client = await act.client()
            client.post()
            assert (await client.answer()).status == status
            await until(lambda: act.gate.permits[0].endings)
            act.gate.permits[0].cut = lambda reason: None  # as a real one does when it is done
            await until(lambda: not forwards())

    def forwards() -> list[AnswerRelay]:
        return [each for each in gc.get_objects() if isinstance(each, AnswerRelay)]

    gc.collect()
    gc.disable()
    try:
        asyncio.run(play())
    finally:
        gc.enable()
