"""Ollama's routes between a client and an engine: streams, errors before and within them, a client that leaves."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tests.ollama.test_answers import DONE, chunk, usage
from tests.proxy.fakes import EVENTS, Answer, Asked, Engine, Script, Stage, chunked, raw, reply, soon, stage, until
from vllmd.api.answers import Card, ModelLine
from vllmd.config.types import RequestRules, ServerConfig
from vllmd.errors import EngineFailed, Unavailable
from vllmd.ollama.endpoints import add_ollama_routes
from vllmd.proxy.access import ANYBODY
from vllmd.proxy.gate import Target
from vllmd.proxy.limits import Limits

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
STREAM = [chunk({"content": "a"}), chunk({"content": "b"}), chunk({}, "stop"), usage(), DONE]
WHOLE = {"choices": [{"message": {"role": "assistant", "content": "ab"}, "finish_reason": "stop"}]}
CARD = Card("m", display_name="M", aliases=("m-alias",), engine="vllm", max_model_len=99,
            capabilities=("chat", "embeddings", "tools"))  # fmt: skip


class FakeStatus:
    """One model, ``m``."""

    async def models(self) -> list[Card]:
        return [CARD, replace(CARD, id="secret", hidden=True, aliases=())]

    async def model(self, name: str) -> Card | None:
        return next((card for card in await self.models() if card.id == name), None)

    async def status(self) -> SimpleNamespace:
        known = {"memory": 5, "devices": (0, 1), "rests_in": 60.0}
        return SimpleNamespace(models=[ModelLine(name, "running", **known) for name in ("m", "secret")])

    def resolve(self, name: str, caller: object = ANYBODY) -> str:
        return SimpleNamespace(m="m", secret="secret").__dict__[name.removesuffix(":latest")]

    def called(self, name: str, caller: object = ANYBODY) -> str:
        return SimpleNamespace(m="m", secret="secret").__dict__[name.removesuffix(":latest")]


@contextlib.asynccontextmanager
async def ollama(script: Script | None = None, limits: Limits | None = None) -> AsyncIterator[Stage]:
    """A proxy with Ollama's routes in front of an engine."""
    async with stage(script, limits) as act:
        add_ollama_routes(act.router, act.relay, SimpleNamespace(status=FakeStatus()))  # type: ignore[arg-type]
        yield act


async def ask(act: Stage, path: str, body: object, *fields: str) -> Answer:
    client = await act.client()
    client.post(path, body if isinstance(body, bytes) else json.dumps(body).encode(), *fields)
    return await client.answer()


def texts(answer: Answer) -> list[Any]:
    """The texts of a chat's lines; an error's line as it is."""
    lines = [json.loads(line) for line in answer.body.splitlines()]
    return [line.get("error") or line["message"]["content"] for line in lines]


FRAMINGS = [
    raw(EVENTS, *map(chunked, STREAM), b"0\r\n\r\n"),
    raw(EVENTS + chunked(b"".join(STREAM)) + b"0\r\n\r\n"),
    raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n", *STREAM, close=True),
    reply(b"".join(STREAM), "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"),
]


@pytest.mark.parametrize("script", FRAMINGS)
@pytest.mark.parametrize("served", ["m", "other"])
def test_a_stream_is_lines_whatever_the_engines_framing(script: Script, served: str) -> None:
    """One line an event, the last one with the counts; the engine is asked for them, under its own name."""

    async def play() -> None:
        async with ollama(script) as act:
            act.gate.target = Target("m", served)
            answer = await ask(act, "/api/chat", CHAT, "Authorization: Bearer secret", "Accept: application/x-ndjson")
            assert (answer.status, answer.headers["content-type"]) == (200, "application/x-ndjson")
            assert texts(answer) == ["a", "b", ""]
            last = json.loads(answer.body.splitlines()[-1])
            assert (last["model"], last["done"], last["done_reason"], last["eval_count"]) == ("m", True, "stop", 2)
            (asked,) = act.engine.asked
            assert asked.line == "POST /v1/chat/completions HTTP/1.1"
            assert not {"authorization", "accept"} & asked.headers.keys()
            assert json.loads(asked.body)["model"] == served
            assert json.loads(asked.body)["stream_options"] == {"include_usage": True}
            assert act.ended[0].model == "m"

    asyncio.run(play())


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
def test_what_is_over_leaves_nothing_to_the_cycle_collector(path: str) -> None:
    """A few objects in a circle at each request were a third of what Ollama's route cost the daemon in a burst."""

    async def play() -> None:
        async with ollama(FRAMINGS[1]) as act:
            client, body = await act.client(), json.dumps({**CHAT, "stream": True}).encode()

            async def rounds(number: int) -> None:
                for _ in range(number):
                    client.post(path, body)
                    assert (await client.answer()).status == 200
                await until(lambda: len(act.ended) == number)
                for kept in (act.gate.permits, act.ended, act.engine.asked):
                    kept.clear()

            await rounds(2)
            gc.collect()
            gc.disable()
            try:
                await rounds(20)
                assert gc.collect() < 20
            finally:
                gc.enable()

    asyncio.run(play())


def test_connections_are_kept() -> None:
    """A second request comes on the same one, in both directions."""

    async def play() -> None:
        async with ollama(FRAMINGS[0]) as act:
            client = await act.client()
            for _ in range(2):
                client.post("/api/chat", json.dumps(CHAT).encode())
                assert texts(await client.answer()) == ["a", "b", ""]
            assert act.engine.connections == 1

    asyncio.run(play())


@pytest.mark.parametrize("kind", ["application/json", "application/x-www-form-urlencoded", "text/plain"])
def test_an_answer_that_is_no_stream_whatever_the_body_is_called(kind: str) -> None:
    """What people copy for curl has its default type."""

    async def play() -> None:
        async with ollama(reply(json.dumps(WHOLE).encode())) as act:
            answer = await ask(act, "/api/chat", {**CHAT, "stream": False}, f"Content-Type: {kind}")
            assert (answer.headers["content-type"], answer.json()["message"]["content"]) == ("application/json", "ab")
            assert "stream" not in json.loads(act.engine.asked[0].body)

    asyncio.run(play())


def test_a_client_that_waits_for_lines_gets_one_where_the_engine_does_not_stream() -> None:
    """Some servers elsewhere cannot."""

    async def play() -> None:
        async with ollama(reply(json.dumps(WHOLE).encode())) as act:
            answer = await ask(act, "/api/chat", CHAT)
            assert (answer.headers["content-type"], texts(answer)) == ("application/x-ndjson", ["ab"])

    asyncio.run(play())


def test_the_models_rules_hold() -> None:
    """What it sets and strips, and the system prompt of a variant, as on OpenAI's routes."""
    rules = RequestRules(strip=("top_k",), set={"seed": 1}, default={"temperature": 0.5, "top_p": 1}, system="be brief")

    async def play() -> None:
        async with ollama(FRAMINGS[0]) as act:
            act.gate.target = Target("m", "served", rules=rules)
            answer = await ask(act, "/api/chat", {**CHAT, "options": {"top_k": 3, "top_p": 0.9}})
            assert texts(answer) == ["a", "b", ""]
            sent = json.loads(act.engine.asked[0].body)
            assert (sent["model"], sent["stream"], sent["seed"], "top_k" in sent) == ("served", True, 1, False)
            assert (sent["temperature"], sent["top_p"]) == (0.5, 0.9)
            assert [each["role"] for each in sent["messages"]] == ["system", "user"]

    asyncio.run(play())


def test_http_1_0_gets_its_lines() -> None:
    """Without chunks, up to the connection's end."""

    async def play() -> None:
        async with ollama(FRAMINGS[0]) as act:
            client, body = await act.client(), json.dumps(CHAT).encode()
            client.send(b"POST /api/chat HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            status, headers = await client.head()
            assert (status, headers["connection"]) == (200, "close")
            assert len((await client.rest()).splitlines()) == 3

    asyncio.run(play())


REFUSED = [
    (b'{"error":{"message":"too many tokens","code":400}}', "too many tokens"),
    (b"not json", "not json"),
    (b"", "the engine answered 400"),
]


@pytest.mark.parametrize(("body", "why"), REFUSED)
@pytest.mark.parametrize("stream", [True, False])
def test_an_engines_refusal_in_ollamas_form(body: bytes, why: str, stream: bool) -> None:
    """With its status."""

    async def play() -> None:
        async with ollama(reply(body, "HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\n")) as act:
            answer = await ask(act, "/api/chat", {**CHAT, "stream": stream})
            assert (answer.status, answer.json()) == (400, {"error": why})

    asyncio.run(play())


def test_our_own_refusals_in_ollamas_form() -> None:
    """Unknown models, wrong members, engines that failed, methods and paths: ``{"error": "..."}``, and Retry-After."""

    async def play() -> None:
        async with ollama() as act:
            assert "no model 'x'" in (await ask(act, "/api/chat", {**CHAT, "model": "x"})).json()["error"]
            assert (await ask(act, "/api/chat", {**CHAT, "think": 1})).json()["error"].startswith("'think' must be")
            assert "missing" in (await ask(act, "/api/chat", b"")).json()["error"]
            assert "does not take" in (await ask(act, "/api/tags", b"")).json()["error"]
            assert "there is no /api/nothing here" in (await ask(act, "/api/nothing", b"")).json()["error"]
            act.gate.refusal = Unavailable("full", retry_after=7)
            answer = await ask(act, "/api/chat", CHAT)
            assert (answer.status, answer.headers["retry-after"], answer.json()) == (503, "7", {"error": "full"})
            act.gate.target = Target("m", "m", routes=frozenset({"/v1/embeddings"}))
            assert (await ask(act, "/api/chat", CHAT)).json() == {"error": "the model 'm' does not chat"}

    asyncio.run(play())


def test_signs_of_life_while_it_loads_and_a_failure_after_them() -> None:
    """Lines without text; then the failure can only be a line, too."""

    async def play() -> None:
        async with ollama(limits=Limits(ServerConfig(loading_comment_interval=0.02))) as act:
            act.gate.opened.clear()
            client = await act.client()
            client.post("/api/chat", json.dumps(CHAT).encode())
            assert (await client.head())[0] == 200
            size = int(await soon(client.reader.readuntil(b"\r\n")), 16)
            first = json.loads(await soon(client.reader.readexactly(size + 2)))
            assert (first["message"], first["done"]) == ({"role": "assistant", "content": ""}, False)
            act.gate.refusal = EngineFailed("m: out of memory")
            act.gate.opened.set()
            payload, _ = await client.chunks()
            assert json.loads(payload.splitlines()[-1]) == {"error": "m: out of memory"}

    asyncio.run(play())


async def stops(engine: Engine, asked: Asked, writer: asyncio.StreamWriter) -> None:
    """An engine that dies in the middle."""
    writer.write(EVENTS + chunked(STREAM[0]))
    await writer.drain()
    writer.close()


def test_an_engine_that_dies_within_a_stream_is_the_last_line() -> None:
    """No client takes what came for a whole answer; the connection to the client goes on."""

    async def play() -> None:
        async with ollama(stops) as act:
            client = await act.client()
            for _ in range(2):
                client.post("/api/chat", json.dumps(CHAT).encode())
                assert texts(await client.answer()) == ["a", "the engine broke off its answer"]

    asyncio.run(play())


def test_an_engine_that_dies_before_it_answers_is_an_error() -> None:
    """Whether the answer was to be a stream or not."""

    async def play() -> None:
        async with ollama(raw(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", close=True)) as act:
            answer = await ask(act, "/api/chat", {**CHAT, "stream": False})
            assert (answer.status, answer.json()) == (502, {"error": "the engine broke off its answer"})

    asyncio.run(play())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_the_engine(stream: bool) -> None:
    """Its connection to the engine is closed, so that it stops generating; the place is free."""

    async def endless(engine: Engine, asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(EVENTS + chunked(STREAM[0]))
        await engine.go.wait()

    async def play() -> None:
        async with ollama(endless) as act:
            client = await act.client()
            client.post("/api/chat", json.dumps({**CHAT, "stream": stream}).encode())
            if stream:
                assert (await client.head())[0] == 200
            await until(lambda: act.engine.asked)
            client.close()
            await soon(act.engine.ended.wait())
            assert act.ended[0].error == "ClientGone"

    asyncio.run(play())


@pytest.mark.parametrize("stream", [True, False])
def test_an_engine_that_says_too_much_is_cut_off(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An event without an end, or an answer of gigabytes: the client learns of it, and the engine's connection ends."""
    monkeypatch.setattr("vllmd.ollama.lines.MAX_EVENT_BYTES", 100_000)
    monkeypatch.setattr("vllmd.ollama.inner.MAX_WHOLE_BYTES", 100_000)
    head = (
        EVENTS if stream else b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )

    async def pour(engine: Engine, asked: Asked, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        while True:
            writer.write(chunked(b"x" * 10_000))
            await writer.drain()

    async def play() -> None:
        async with ollama(pour) as act:
            answer = await ask(act, "/api/chat", {**CHAT, "stream": stream})
            assert (answer.status, "more than 100000 bytes" in answer.json()["error"]) == (502, True)
            await soon(act.engine.ended.wait())

    asyncio.run(play())


def test_a_client_that_takes_nothing_pauses_the_engine() -> None:
    """What the engine makes is not heaped up here."""
    made = 0
    event = chunked(chunk({"content": "x" * 10_000}))

    async def pour(engine: Engine, asked: Asked, writer: asyncio.StreamWriter) -> None:
        nonlocal made
        writer.write(EVENTS)
        while True:
            writer.write(event)
            await writer.drain()
            made += 1

    async def play() -> None:
        async with ollama(pour) as act:
            client = await act.client()
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            client.post("/api/chat", json.dumps(CHAT).encode())
            before = -1
            while made != before:  # until it makes no more for a while
                before = made
                await asyncio.sleep(0.3)
            assert made < 5000  # 50 MB; sockets' buffers hold less

    asyncio.run(play())


def test_a_large_body_is_translated_and_counted() -> None:
    """An image of megabytes; nothing of it stays counted when the answer is over (the stage looks)."""
    image = "iVBORw0KGgo" + "A" * (3 << 20)

    async def play() -> None:
        async with ollama(reply(json.dumps(WHOLE).encode())) as act:
            messages = [{"role": "user", "content": "what", "images": [image]}]
            answer = await ask(act, "/api/chat", {**CHAT, "messages": messages, "stream": False})
            assert answer.status == 200
            asked = json.loads(act.engine.asked[0].body)["messages"][0]["content"]
            assert asked[1]["image_url"]["url"] == f"data:image/png;base64,{image}"

    asyncio.run(play())


def test_what_is_held_of_a_body_is_what_is_sent() -> None:
    """A megabyte of blanks is forgotten once it has been read."""

    async def wait(engine: Engine, asked: Asked, writer: asyncio.StreamWriter) -> None:
        await engine.go.wait()
        await reply(json.dumps(WHOLE).encode())(engine, asked, writer)

    async def play() -> None:
        async with ollama(wait) as act:
            client = await act.client()
            client.post("/api/chat", json.dumps({**CHAT, "stream": False}).encode() + b" " * (1 << 20))
            await until(lambda: act.engine.asked)
            assert 0 < act.server.memory.held < 1000
            act.engine.go.set()
            assert (await client.answer()).status == 200

    asyncio.run(play())


def test_a_body_that_is_too_large_is_refused() -> None:
    """At its head."""

    async def play() -> None:
        async with ollama(limits=Limits(ServerConfig(max_body=1000))) as act:
            answer = await ask(act, "/api/chat", b" " * 1001)
            assert (answer.status, "at most 1000" in answer.json()["error"]) == (413, True)

    asyncio.run(play())


def test_options_without_effect_are_told_in_a_header() -> None:
    """The answer is as it would be without them."""

    async def play() -> None:
        async with ollama(reply(json.dumps(WHOLE).encode())) as act:
            options = {"num_ctx": 1, "num_gpu": 2, "x\r\nSet-Cookie: y": 3, "ä€": 4}
            answer = await ask(act, "/api/chat", {**CHAT, "stream": False, "options": options})
            assert answer.headers["x-vllmd-ignored"].startswith("num_ctx, num_gpu, x%0d%0aset-cookie%3a%20y, ")
            assert "set-cookie" not in answer.headers

    asyncio.run(play())


LOADS = [
    ({}, "load", []),
    ({"keep_alive": "5m"}, "load", [300.0]),
    ({"keep_alive": -1}, "load", [float("inf")]),
    ({"keep_alive": 0}, "unload", [0.0]),
    ({"keep_alive": "0s"}, "unload", [0.0]),
]


@pytest.mark.parametrize(("members", "reason", "kept"), LOADS)
@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_a_request_that_asks_nothing(path: str, members: dict[str, Any], reason: str, kept: list[float]) -> None:
    """It waits until the model is there, as any request; or lets it go, and waits for nothing."""

    async def play() -> None:
        async with ollama() as act:
            answer = (await ask(act, path, {"model": "m", **members})).json()
            assert (answer["done"], answer["done_reason"]) == (True, reason)
            assert len(act.gate.permits) == (reason == "load")
            assert act.gate.kept_alive == [("m", "", seconds) for seconds in kept]
            assert act.engine.asked == []

    asyncio.run(play())


def test_keep_alive_of_a_request_and_a_wrong_one() -> None:
    """The engine does not see it."""

    async def play() -> None:
        async with ollama(FRAMINGS[0]) as act:
            assert (await ask(act, "/api/chat", {**CHAT, "keep_alive": "1h"})).status == 200
            assert act.gate.kept_alive == [("m", "", 3600.0)]
            assert b"keep_alive" not in act.engine.asked[0].body
            answer = await ask(act, "/api/chat", {**CHAT, "keep_alive": "long"})
            assert (answer.status, "keep_alive must be" in answer.json()["error"]) == (400, True)

    asyncio.run(play())


def test_embeddings() -> None:
    """Both routes."""

    async def play() -> None:
        async with ollama(reply(b'{"data":[{"embedding":[0.5,1]}],"usage":{"prompt_tokens":2}}')) as act:
            new = (await ask(act, "/api/embed", {"model": "m", "input": "a"})).json()
            assert (new["embeddings"], new["prompt_eval_count"], new["model"]) == ([[0.5, 1]], 2, "m")
            assert (await ask(act, "/api/embeddings", {"model": "m", "prompt": "a"})).json() == {"embedding": [0.5, 1]}
            assert (await ask(act, "/api/embed", {"model": "m", "input": []})).json()["embeddings"] == []
            answer = await ask(act, "/api/embed", {"model": "m", "input": ["a", "b"]})
            assert (answer.status, answer.json()["error"]) == (502, "the engine gave 1 embeddings for 2 texts")

    asyncio.run(play())


async def got(act: Stage, path: str, *fields: str, method: str = "GET") -> Answer:
    client = await act.client()
    client.send("\r\n".join([f"{method} {path} HTTP/1.1", "Host: vllmd", *fields, "", ""]).encode())
    return await client.answer(method)


def test_what_needs_no_engine() -> None:
    """The words that clients look for, lists without hidden models, and names with tags."""

    async def play() -> None:
        async with ollama() as act:
            assert (await got(act, "/")).body == b"Ollama is running"
            assert (await got(act, "/", method="HEAD")).status == 200
            assert (await got(act, "/", "Accept: text/html,*/*")).status == 404
            assert (await got(act, "/api/version")).json()["version"].count(".") == 2
            listed = (await got(act, "/api/tags")).json()["models"]
            assert [each["model"] for each in listed] == ["m:latest", "m-alias:latest"]
            assert len(listed[0]["digest"]) == 64
            (running,) = (await got(act, "/api/ps")).json()["models"]
            assert (running["name"], running["size_vram"], running["context_length"]) == ("m:latest", 10, 99)
            shown = (await ask(act, "/api/show", {"name": "m:latest"})).json()
            assert shown["capabilities"] == ["completion", "embedding", "tools"]
            assert shown["model_info"]["vllm.context_length"] == 99

    asyncio.run(play())


def test_what_changes_models() -> None:
    """One that is here is pulled; for everything else there is nobody who could do it, and that is what is said."""

    async def play() -> None:
        async with ollama() as act:
            assert (await ask(act, "/api/pull", {"model": "m", "stream": False})).json() == {"status": "success"}
            lines = (await ask(act, "/api/pull", {"model": "m"})).body.splitlines()
            assert json.loads(lines[-1]) == {"status": "success"}
            for path in ("/api/create", "/api/copy", "/api/push", "/api/blobs/sha256:00"):
                body = {"source": "m", "destination": "n"} if path == "/api/copy" else {"model": "n", "from": "m"}
                answer = await ask(act, path, body)
                assert (answer.status, len(answer.json()["error"]) > 20) == (501, True)
            assert (await got(act, "/api/blobs/sha256:00", method="HEAD")).status == 404

    asyncio.run(play())
