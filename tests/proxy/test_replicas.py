"""A request and several replicas: it goes on to the next as long as the client has had nothing, and no further."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.proxy.fakes import EVENTS, Asked, Engine, Script, Stage, chunked, raw, reply, soon, stage
from vllmd.config.types import ServerConfig
from vllmd.engines.base import Listen
from vllmd.proxy import upstream
from vllmd.proxy.gate import Target
from vllmd.proxy.limits import Limits
from vllmd.proxy.upstream import OutOfFiles

ANSWER = b'{"model":"theirs","choices":[]}'
HERS = Target("m@2", "theirs", headers=(("authorization", "Bearer hers"),))
GONE = Listen(uds="/nowhere/engine.sock")
BUSY = b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"


@contextlib.asynccontextmanager
async def two(folder: Path, first: Script, second: Script, **limits: object) -> AsyncIterator[tuple[Stage, Engine]]:
    """A stage whose model has two replicas: one that does as ``first`` says, then one by ``second``."""
    async with stage(first, limits=Limits(ServerConfig(**limits))) as act:  # type: ignore[arg-type]
        other = Engine(second)
        server = await asyncio.start_unix_server(other.serve, folder / "2.sock")
        act.gate.replicas = [(act.engine.listen, Target("m", "m")), (Listen(uds=str(folder / "2.sock")), HERS)]
        try:
            yield act, other
        finally:
            server.close()


FAILURES = {
    "it breaks off": raw(b"", close=True),
    "it breaks off within the head": raw(b"HTTP/1.1 200 OK\r\ncontent-", close=True),
    "it speaks no HTTP": raw(b"SSH-2.0\r\n\r\n"),
    "it answers 503": raw(BUSY % (2, b"{}")),
    "it answers 502": raw(b"HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_what_failed_before_a_byte_is_answered_by_the_next(tmp_path: Path, failure: str) -> None:
    """Under that one's own name for the model, with its key; the client sees nothing of it."""

    async def play() -> None:
        async with two(tmp_path, FAILURES[failure], reply(ANSWER)) as (act, other):
            client = await act.client()
            client.post(body=b'{"model":"m","stream":false}')
            answer = await client.answer()
            assert (answer.status, answer.json()["model"]) == (200, "m")
            assert json.loads(other.asked[0].body)["model"] == "theirs"
            assert other.asked[0].headers["authorization"] == "Bearer hers"
            first, second = act.gate.permits
            assert first.failed
            assert (second.failed, second.begun) == ("", 1)
            await act.at_rest()

    asyncio.run(play())


def test_one_where_nobody_listens_costs_the_client_nothing(tmp_path: Path) -> None:
    """Its process has just died."""

    async def play() -> None:
        async with two(tmp_path, reply(ANSWER), reply(ANSWER)) as (act, _):
            act.gate.replicas[0] = (GONE, Target("m", "m"))
            client = await act.client()
            client.post()
            assert (await client.answer()).status == 200
            assert "no connection to" in act.gate.permits[0].failed

    asyncio.run(play())


def test_when_the_last_one_refuses_its_own_words_are_told(tmp_path: Path) -> None:
    """503 with what the replica said, and when to come back."""
    told = b'{"error": {"message": "all slots are taken"}}'

    async def play() -> None:
        async with two(tmp_path, raw(BUSY % (2, b"{}")), raw(BUSY % (len(told), told))) as (act, _):
            client = await act.client()
            client.post()
            answer = await client.answer()
            assert answer.status == 503
            assert "answered 503: all slots are taken" in answer.json()["error"]["message"]
            assert answer.headers["retry-after"] == "1"

    asyncio.run(play())


def test_an_error_of_the_clients_own_is_passed_on(tmp_path: Path) -> None:
    """Another replica would say the same: 400, and 500 from a request that breaks the engine."""

    async def play() -> None:
        for status in (b"400 Bad Request", b"500 Internal Server Error"):
            folder = tmp_path / status.decode().partition(" ")[0]
            folder.mkdir()
            script = raw(b"HTTP/1.1 %b\r\ncontent-length: 2\r\n\r\n{}" % status)
            async with two(folder, script, reply(ANSWER)) as (act, other):
                client = await act.client()
                client.post()
                assert (await client.answer()).status == int(status.partition(b" ")[0])
                assert other.asked == []
                assert act.gate.permits[0].failed == ""

    asyncio.run(play())


def test_a_stream_that_had_begun_is_broken_off(tmp_path: Path) -> None:
    """The client has had a part of it: nobody else can go on, and it must see that it is not whole."""

    async def play() -> None:
        script = raw(EVENTS + chunked(b"data: 1\n\n"), close=True)
        async with two(tmp_path, script, reply(ANSWER)) as (act, other):
            client = await act.client()
            client.post(body=b'{"model":"m","stream":true}')
            status, _ = await client.head()
            assert status == 200
            with pytest.raises(asyncio.IncompleteReadError):
                await client.chunks()
            assert other.asked == []
            await soon(act.gate.permits[0].over.wait())
            assert act.gate.permits[0].failed

    asyncio.run(play())


def test_a_request_that_is_cut_before_its_answer_goes_elsewhere(tmp_path: Path) -> None:
    """A replica that hangs: the daemon finds out, and breaks its requests off."""

    async def hang(engine: Engine, asked: Asked, writer: asyncio.StreamWriter) -> None:
        engine.go.set()
        await asyncio.Event().wait()

    async def play() -> None:
        async with two(tmp_path, hang, reply(ANSWER)) as (act, _):
            client = await act.client()
            client.post()
            await soon(act.engine.go.wait())
            act.gate.permits[0].cut("its replica does not answer")
            assert (await client.answer()).status == 200
            await soon(act.engine.ended.wait())

    asyncio.run(play())


def test_a_client_that_leaves_is_nobodys_fault(tmp_path: Path) -> None:
    """It must not be sent to the next replica, nor count against the first."""

    async def hang(engine: Engine, asked: Asked, writer: asyncio.StreamWriter) -> None:
        engine.go.set()
        await asyncio.Event().wait()

    async def play() -> None:
        async with two(tmp_path, hang, reply(ANSWER)) as (act, other):
            client = await act.client()
            client.post()
            await soon(act.engine.go.wait())
            client.reset()
            await soon(act.gate.permits[0].over.wait())
            assert act.gate.permits[0].failed == ""
            assert other.asked == []

    asyncio.run(play())


def test_a_stream_that_heard_of_the_loading_goes_elsewhere_all_the_same(tmp_path: Path) -> None:
    """Comments are no part of the answer."""

    async def play() -> None:
        body = EVENTS + chunked(b"data: 1\n\n") + b"0\r\n\r\n"
        async with two(tmp_path, raw(b"", close=True), raw(body), loading_comment_interval=0.01) as (act, _):
            act.gate.opened.clear()
            client = await act.client()
            client.post(body=b'{"model":"m","stream":true}')
            await client.head()
            act.gate.opened.set()
            payload, _ = await client.chunks()
            assert payload.startswith(b": loading")
            assert payload.endswith(b"data: 1\n\n")

    asyncio.run(play())


def test_a_stored_response_is_asked_of_the_replica_that_has_it(tmp_path: Path) -> None:
    """Each keeps its own."""
    made = b'{"id":"resp_1","model":"theirs"}'

    async def play() -> None:
        async with two(tmp_path, raw(b"", close=True), reply(made)) as (act, _):
            client = await act.client()
            client.post("/v1/responses")
            assert (await client.answer()).status == 200
            act.gate.replicas = [(Listen(uds=str(tmp_path / "2.sock")), HERS)]
            client.send(b"GET /v1/responses/resp_1 HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (await client.answer()).status == 200
            assert act.gate.only[-1] == "m@2"

    asyncio.run(play())


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_request_that_we_could_not_send_is_no_failure_of_the_engine(
    replicas: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """We have no file descriptor: the client is told so and may come back, no replica is ejected for it."""

    async def full(*_: object) -> object:
        raise OutOfFiles("vllmd cannot connect to the engine: Too many open files", retry_after=5)

    async def play() -> None:
        async with two(tmp_path, reply(ANSWER), reply(ANSWER)) as (act, _):
            act.gate.replicas = act.gate.replicas if replicas == 2 else []
            monkeypatch.setattr(upstream, "connect", full)
            client = await act.client()
            client.post(body=b'{"model":"m","stream":false}')
            answer = await client.answer()
            monkeypatch.undo()
            assert (answer.status, answer.headers["retry-after"]) == (503, "5")
            assert "Too many open files" in answer.json()["error"]["message"]
            assert {permit.failed for permit in act.gate.permits} == {""}

    asyncio.run(play())
