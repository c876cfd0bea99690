"""What a client hears while its model loads."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.proxy.fakes import EVENTS, Asked, Client, Engine, chunked, post, raw, reply, soon, stage
from vllmd.config.types import ServerConfig
from vllmd.errors import EngineFailed
from vllmd.proxy.gate import Target
from vllmd.proxy.limits import Limits

QUICK = Limits(ServerConfig(loading_comment_interval=0.02))
STREAM = b'{"model":"m","stream":true}'
COMMENT = chunked(b": loading m: weights\n\n")
EVENT = b'data: {"model":"m"}\n\ndata: [DONE]\n\n'


async def comments(client: Client, number: int) -> None:
    """Read the early head and so many comments."""
    status, headers = await client.head()
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert headers["x-accel-buffering"] == "no"
    for _ in range(number):
        assert await soon(client.reader.readexactly(len(COMMENT))) == COMMENT


async def events(client: Client) -> bytes:
    """The rest of the stream without comments."""
    payload, _ = await client.chunks()
    return payload.replace(b": loading m: weights\n\n", b"")


@pytest.mark.parametrize(
    ("script", "served"),
    [
        (raw(EVENTS + chunked(EVENT) + b"0\r\n\r\n"), "m"),
        (raw(EVENTS + chunked(EVENT.replace(b'"m"', b'"served"')) + b"0\r\n\r\n"), "served"),
        (raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n", EVENT, close=True), "m"),
    ],
)
def test_a_stream_gets_comments_and_then_its_events(script: object, served: str) -> None:
    """The client's 200 goes out after an interval, and whatever the engine's framing, the stream goes on in ours."""

    async def play() -> None:
        async with stage(script, QUICK) as act:  # type: ignore[arg-type]
            act.gate.target = Target("m", served)
            act.gate.opened.clear()
            client = await act.client()
            client.post(body=STREAM)
            await comments(client, 3)
            act.gate.opened.set()
            assert await events(client) == EVENT
            client.post(body=STREAM)
            assert (await client.head())[0] == 200

    asyncio.run(play())


@pytest.mark.parametrize("body", [b'{"model":"m"}', b'{"model":"m","stream":false}'])
def test_a_plain_request_waits_for_its_status(body: bytes) -> None:
    """Only who asked for a stream gets one."""

    async def play() -> None:
        async with stage(reply(b"{}"), QUICK) as act:
            act.gate.opened.clear()
            client, other = await act.client(), await act.client()
            client.post(body=body)
            other.post(body=STREAM)
            await comments(other, 2)
            act.gate.refusal = EngineFailed("it did not start")
            act.gate.opened.set()
            assert (await client.answer()).status == 503
            await events(other)

    asyncio.run(play())


FAILURES = {
    "/v1/chat/completions": (
        b'data: {"error": {"message": "it did not start", "type": "server_error", "param": null, '
        b'"code": "engine_failed"}}\n\ndata: [DONE]\n\n'
    ),
    "/v1/messages": (
        b'event: error\ndata: {"type": "error", "error": '
        b'{"type": "overloaded_error", "message": "it did not start"}}\n\n'
    ),
    "/v1/responses": (
        b'event: error\ndata: {"error": {"message": "it did not start", "type": "server_error", "param": null, '
        b'"code": "engine_failed"}}\n\n'
    ),
}


@pytest.mark.parametrize("path", FAILURES)
def test_a_failure_after_the_comments_is_an_event(path: str) -> None:
    """The status has gone out, so the stream tells it, each API in its own way; then it ends properly."""

    async def play() -> None:
        async with stage(limits=QUICK) as act:
            act.gate.opened.clear()
            client = await act.client()
            client.post(path, STREAM)
            await comments(client, 1)
            act.gate.refusal = EngineFailed("it did not start")
            act.gate.opened.set()
            assert await events(client) == FAILURES[path]
            assert act.ended[0].error == "EngineFailed"
            act.gate.refusal = None
            client.post()
            assert (await client.answer()).status == 200

    asyncio.run(play())


def test_an_engines_error_after_the_comments_is_an_event() -> None:
    """The engine's own words, on one line."""
    head = "HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\n"

    async def play() -> None:
        async with stage(reply(b'{"error":\n{"message":"too long"}}', head), QUICK) as act:
            act.gate.opened.clear()
            client = await act.client()
            client.post(body=STREAM)
            await comments(client, 1)
            act.gate.opened.set()
            assert await events(client) == b'data: {"error": {"message":"too long"}}\n\ndata: [DONE]\n\n'

    asyncio.run(play())


def test_a_ready_model_gets_no_early_head() -> None:
    """Within the interval everything is as if there were none."""

    async def play() -> None:
        async with stage(
            raw(EVENTS + chunked(EVENT) + b"0\r\n\r\n"), Limits(ServerConfig(loading_comment_interval=5))
        ) as act:
            client = await act.client()
            client.post(body=STREAM)
            assert (await client.answer()).raw == chunked(EVENT) + b"0\r\n\r\n"

    asyncio.run(play())


def test_a_client_that_leaves_ends_its_comments() -> None:
    """No timer is left behind, and the gate is told."""

    async def play() -> None:
        async with stage(limits=QUICK) as act:
            act.gate.opened.clear()
            client = await act.client()
            client.post(body=STREAM)
            await comments(client, 1)

    asyncio.run(play())


def test_chat_clients_may_be_told_as_reasoning() -> None:
    """Where it is switched on: text that a chat window shows, in the form of the engine's own chunks."""
    limits = Limits(ServerConfig(loading_comment_interval=0.02, loading_as_reasoning=True))

    async def play() -> None:
        async with stage(raw(EVENTS + chunked(EVENT) + b"0\r\n\r\n"), limits) as act:
            act.gate.opened.clear()
            client = await act.client()
            client.post(body=STREAM.replace(b'"m"', b'"m-alias"'))
            assert (await client.head())[0] == 200
            act.gate.opened.set()
            told, *_ = (await client.chunks())[0].split(b"\n\n")
            event = json.loads(told.removeprefix(b"data: "))
            assert (event["object"], event["model"]) == ("chat.completion.chunk", "m-alias")
            delta = event["choices"][0]["delta"]
            assert delta["reasoning"] == delta["reasoning_content"] == "loading m: weights\n"

    asyncio.run(play())


def slow(*answer: bytes, head: bytes = b"") -> object:
    """An engine that sends ``head`` at once, and the rest when the test says so."""

    async def script(engine: Engine, asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        await writer.drain()
        await engine.go.wait()
        for piece in answer:
            writer.write(piece)
        await writer.drain()

    return script


@pytest.mark.parametrize("head", [b"", EVENTS], ids=["without a head", "behind the engine's head"])
@pytest.mark.parametrize("served", ["m", "served"])
def test_a_stream_gets_comments_while_the_prompt_is_read(head: bytes, served: str) -> None:
    """Until the first byte of the answer: prompts are long, and clients, proxies and phones give up meanwhile."""
    event = EVENT.replace(b'"m"', b'"%b"' % served.encode())
    rest = (b"" if head else EVENTS, chunked(event), b"0\r\n\r\n")

    async def play() -> None:
        async with stage(slow(*rest, head=head), QUICK) as act:  # type: ignore[arg-type]
            act.gate.target = Target("m", served)
            client = await act.client()
            client.post(body=STREAM)
            assert (await client.head())[0] == 200
            for _ in range(3):
                size = int(await soon(client.reader.readuntil(b"\r\n")), 16)
                assert (await soon(client.reader.readexactly(size + 2))).endswith(b"reading the prompt\n\n\r\n")
            act.engine.go.set()
            payload, _ = await client.chunks()
            assert payload.endswith(EVENT)
            assert (
                payload.removesuffix(EVENT)
                .replace(b": reading the prompt\n\n", b"")
                .replace(b": m: reading the prompt\n\n", b"")
                == b""
            )

    asyncio.run(play())


def test_an_http_1_0_client_hears_comments_too() -> None:
    """Behind old proxies: without chunks, up to the connection's end."""
    answer = (EVENTS, chunked(EVENT), b"0\r\n\r\n")

    async def play() -> None:
        async with stage(slow(*answer), QUICK) as act:  # type: ignore[arg-type]
            act.gate.opened.clear()
            client = await act.client()
            client.send(post(body=STREAM).replace(b"HTTP/1.1", b"HTTP/1.0"))
            status, headers = await client.head()
            assert (status, headers["connection"], "transfer-encoding" in headers) == (200, "close", False)
            assert await soon(client.reader.readuntil(b"\n\n")) == b": loading m: weights\n\n"
            act.gate.opened.set()
            await soon(client.reader.readuntil(b"reading the prompt\n\n"))
            act.engine.go.set()
            assert (await client.rest()).endswith(EVENT)

    asyncio.run(play())


def test_a_plain_answer_gets_no_comments() -> None:
    """Nor does a stream that has begun."""

    async def play() -> None:
        async with stage(slow(reply_bytes(b"{}")), QUICK) as act:  # type: ignore[arg-type]
            client = await act.client()
            client.post(body=b'{"model":"m"}')
            await soon(act.gate.entered.wait())
            assert not len(act.relay.heartbeats)
            act.engine.go.set()
            assert (await client.answer()).body == b"{}"
            client.post(body=STREAM)
            assert (await client.answer()).body == b"{}"
            assert not len(act.relay.heartbeats)

    asyncio.run(play())


def reply_bytes(body: bytes) -> bytes:
    """A whole answer."""
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
