"""Failures on demand, those of a request: each does what its line in the table says."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.simengine.rig import rig, until


def test_an_error_in_mid_stream_comes_under_status_200(tmp_path: Path) -> None:
    """As vLLM does it: an error event, then [DONE]."""

    async def script() -> None:
        async with rig(tmp_path, fail=("error-mid-stream",)) as sim:
            reply = await sim.chat(stream=True, max_tokens=9, ignore_eos=True)
        assert reply.status == 200
        assert reply.events[-2]["error"]["code"] == 500
        assert reply.events[-1] == "[DONE]"

    asyncio.run(script())


def test_a_stream_can_stall(tmp_path: Path) -> None:
    """Three tokens, then silence, with the connection open."""

    async def script() -> None:
        async with rig(tmp_path, fail=("stall-mid-stream",)) as sim:
            wire = await sim.stream(max_tokens=9, ignore_eos=True)
            await wire.head()
            for _ in range(4):
                assert await wire.chunk()
            silence = asyncio.ensure_future(wire.chunk())
            await asyncio.wait({silence}, timeout=0.05)
            assert not silence.done()
            silence.cancel()
            wire.close()

    asyncio.run(script())


def test_slow_headers_delay_the_first_byte_only(tmp_path: Path) -> None:
    """Of requests to the model; /health answers at once."""

    async def script() -> None:
        async with rig(tmp_path, fail=("slow-headers=0.05",)) as sim:
            began = asyncio.get_running_loop().time()
            assert (await sim.chat()).status == 200
            assert asyncio.get_running_loop().time() - began >= 0.05

    asyncio.run(script())


def test_a_hanging_engine_is_healthy(tmp_path: Path) -> None:
    """Which is what makes it nasty."""

    async def script() -> None:
        async with rig(tmp_path, fail=("hang",)) as sim:
            request = asyncio.ensure_future(sim.chat())
            await until(lambda: True)
            assert (await sim.call("GET", "/health")).status == 200
            assert not request.done()
            request.cancel()

    asyncio.run(script())


def test_a_dead_core_shows_in_health_and_requests(tmp_path: Path) -> None:
    """503 and 500, as when vLLM's core died and its API server did not."""

    async def script() -> None:
        async with rig(tmp_path, fail=("dead",)) as sim:
            assert (await sim.call("GET", "/health")).status == 503
            assert (await sim.chat()).status == 500

    asyncio.run(script())
