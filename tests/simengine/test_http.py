"""The wire: what a proxy may send, and what a client that leaves means."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from tests.simengine.rig import LIMIT, rig, until
from vllmd.simengine.http import Chunks, Malformed

CHUNKED = b"transfer-encoding: chunked\r\n"


def test_the_bytes_that_came_can_be_had_back(tmp_path: Path) -> None:
    """A proxy must not change a body; a large one crosses many reads."""
    body = os.urandom(3_000_000)

    async def script() -> None:
        async with rig(tmp_path) as sim:
            reply = await sim.post("/v1/completions", body, x_sim_echo="body")
            head = await sim.post("/v1/completions?a=b", b"", x_sim_echo="head", x_other="1")
        assert reply.body == body
        assert head.body.startswith(b"POST /v1/completions?a=b HTTP/1.1\r\n")
        assert b"x-other: 1\r\n" in head.body

    asyncio.run(script())


def test_a_chunked_body_is_put_together(tmp_path: Path) -> None:
    """A proxy may pass chunks on as they come, split anywhere."""
    body = b"5\r\nhello\r\n6;x=y\r\n world\r\n0\r\ntrailer: 1\r\n\r\n"

    async def script() -> None:
        async with rig(tmp_path) as sim:
            wire = await sim.wire()
            for byte in b"POST /x HTTP/1.1\r\nx-sim-echo: body\r\n" + CHUNKED + b"\r\n" + body:
                wire.send(bytes([byte]))
                await wire.writer.drain()
            assert (await wire.reply()).body == b"hello world"
            wire.close()

    asyncio.run(script())


@pytest.mark.parametrize("cut", range(1, 36))
def test_chunks_may_be_cut_anywhere(cut: int) -> None:
    """The decoder's state survives every boundary."""
    whole = b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\nnext"
    chunks, buffer = Chunks(), bytearray(whole[:cut])
    body = chunks.feed(buffer)
    buffer += whole[cut:]
    assert (chunks.feed(buffer) if body is None else body) == b"hello world"
    assert bytes(buffer) == b"next"


def test_a_bad_chunk_size_is_refused() -> None:
    """Not taken for an empty chunk, which would end the body early."""
    with pytest.raises(Malformed, match="chunk size"):
        Chunks().feed(bytearray(b"xyz\r\n"))


@pytest.mark.parametrize("head", [b"GET\r\n\r\n", b"GET / HTTP/2\r\n\r\n", b"GET / HTTP/1.1\r\nno colon\r\n\r\n"])
def test_what_is_not_http_is_refused(tmp_path: Path, head: bytes) -> None:
    """400 and the end of the connection, as uvicorn does."""

    async def script() -> None:
        async with rig(tmp_path) as sim:
            wire = await sim.wire()
            wire.send(head)
            assert (await wire.head())[0] == 400
            async with asyncio.timeout(LIMIT):
                await wire.reader.read()
            assert wire.reader.at_eof()

    asyncio.run(script())


def test_requests_share_a_connection(tmp_path: Path) -> None:
    """Keep-alive, pipelined even; ``connection: close`` ends it."""

    async def script() -> None:
        async with rig(tmp_path) as sim:
            wire = await sim.wire()
            wire.request("GET", "/version")
            wire.request("GET", "/health", connection="close")
            assert (await wire.reply()).json == {"version": "0.32.0"}
            last = await wire.reply()
            assert last.headers["connection"] == "close"
            assert await wire.reader.read() == b""

    asyncio.run(script())


def test_an_expectation_is_answered_first(tmp_path: Path) -> None:
    """curl waits for 100 before it sends a large body."""

    async def script() -> None:
        async with rig(tmp_path) as sim:
            wire = await sim.wire()
            wire.send(b"POST / HTTP/1.1\r\nexpect: 100-continue\r\ncontent-length: 2\r\nx-sim-echo: body\r\n\r\n")
            assert (await wire.head())[0] == 100
            wire.send(b"ab")
            assert (await wire.reply()).body == b"ab"
            wire.close()

    asyncio.run(script())


def test_an_idle_connection_is_closed_after_its_time(tmp_path: Path) -> None:
    """vLLM closes after 5 s: a proxy's pool must let go earlier."""

    async def script() -> None:
        async with rig(tmp_path, keep_alive=0.01) as sim:
            wire = await sim.wire()
            wire.request("GET", "/health")
            await wire.reply()
            async with asyncio.timeout(LIMIT):
                assert await wire.reader.read() == b""

    asyncio.run(script())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(tmp_path: Path, stream: bool) -> None:
    """Otherwise an abandoned answer would run on and hold up others."""

    async def script() -> None:
        async with rig(tmp_path, tokens_per_second=0.001, prompt_overhead=0, max_num_seqs=1) as sim:
            wire = await sim.stream(stream=stream)
            await until(lambda: len(sim.state.running) == 1)
            wire.close()
            await until(lambda: not sim.state.running)

    asyncio.run(script())


def test_a_client_that_does_not_read_holds_its_answer_up(tmp_path: Path) -> None:
    """Back-pressure reaches the generation; and when that client goes, its slot is free."""

    async def script() -> None:
        async with rig(tmp_path, max_model_len=1 << 30) as sim:
            wire = await sim.stream(max_tokens=1_000_000, ignore_eos=True)
            said = -1
            while sim.state.generated != said:
                said = sim.state.generated
                await asyncio.wait({asyncio.ensure_future(asyncio.sleep(0.05))})
            assert 0 < said < 100_000
            wire.writer.transport.abort()
            await until(lambda: not sim.state.running)

    asyncio.run(script())


def test_a_client_that_leaves_the_queue_is_forgotten(tmp_path: Path) -> None:
    """It must not be run when its turn comes."""

    async def script() -> None:
        async with rig(tmp_path, tokens_per_second=0.001, max_num_seqs=1) as sim:
            first, second = await sim.stream(), await sim.stream()
            await until(lambda: len(sim.state.waiting) == 1)
            second.close()
            await until(lambda: not sim.state.waiting)
            assert len(sim.state.running) == 1
            first.close()

    asyncio.run(script())


def test_slots_are_given_in_order(tmp_path: Path) -> None:
    """More requests than slots wait; first come, first served."""

    async def script() -> None:
        async with rig(tmp_path, max_num_seqs=1, prompt_overhead=0.01) as sim:
            wires = [await sim.stream(messages=[{"role": "user", "content": str(i)}]) for i in range(3)]
            order = []

            async def note(i: int) -> None:
                await wires[i].reply()
                order.append(i)

            await asyncio.gather(*(note(i) for i in range(3)))
            assert order == [0, 1, 2]

    asyncio.run(script())


def test_realtime_greets_and_answers_what_it_heard(tmp_path: Path) -> None:
    """The WebSocket route, with frames as a client sends them: masked, split as they like."""

    async def script() -> None:
        async with rig(tmp_path, served_model_name=("m",)) as sim:
            wire = await sim.wire()
            wire.send(b"GET /v1/realtime HTTP/1.1\r\nupgrade: websocket\r\nconnection: Upgrade\r\n"
                      b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")  # fmt: skip
            status, headers = await wire.head()
            assert (status, headers["sec-websocket-accept"]) == (101, "s3pplmbitxaq9kygzzhzrbk+xoo=")
            assert b"session.created" in await _frame(wire.reader)
            for text in (b'{"type":"session.update","model":"m"}',
                         b'{"type":"input_audio_buffer.append","audio":"AAAA"}',
                         b'{"type":"input_audio_buffer.commit"}'):  # fmt: skip
                wire.send(_masked(text))
            texts = [await _frame(wire.reader) for _ in range(4)]
            assert b'"text": "heard 3 bytes"' in texts[-1]
            wire.send(_masked(b"", 0x88))
            async with asyncio.timeout(LIMIT):
                await wire.reader.read()

    asyncio.run(script())


def _masked(data: bytes, first: int = 0x81) -> bytes:
    mask = b"\x01\x02\x03\x04"
    body = bytes(byte ^ mask[i % 4] for i, byte in enumerate(data))
    return bytes([first, 0x80 | len(data)]) + mask + body


async def _frame(reader: asyncio.StreamReader) -> bytes:
    async with asyncio.timeout(LIMIT):
        _, size = await reader.readexactly(2)
        if size == 126:
            size = int.from_bytes(await reader.readexactly(2))
        return await reader.readexactly(size)
