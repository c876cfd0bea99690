"""The sleep protocol, as vLLM 0.32 really behaves: its traps are what a manager must survive."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.simengine.rig import Rig, rig, until
from vllmd.simengine.device import FakeGpu, device_usage, make_device

GiB = 1 << 30
SIZES = {"memory": 20 * GiB, "memory_asleep": GiB, "weights": 12 * GiB}


def gpu(tmp_path: Path) -> dict[str, Any]:
    return {"device_file": (str(make_device(tmp_path / "gpu", 24 * GiB)),)} | SIZES


def held(sim: Rig) -> int:
    return device_usage(sim.options.device_file[0]).used // GiB


async def text(sim: Rig) -> str:
    return str((await sim.chat()).json["choices"][0]["message"]["content"])


def test_sleep_frees_memory_and_wake_brings_it_back(tmp_path: Path) -> None:
    """Level 1: everything but a residue is free while it sleeps."""

    async def script() -> None:
        async with rig(tmp_path, **gpu(tmp_path)) as sim:
            assert held(sim) == 20
            asleep = await sim.post("/sleep?level=1")
            assert (asleep.status, asleep.json) == (200, {"status": "sleeping", "level": 1})
            assert held(sim) == 1
            assert (await sim.call("GET", "/is_sleeping")).json == {"is_sleeping": True}
            assert (await sim.call("GET", "/health")).status == 200
            assert (await sim.post("/wake_up")).json == {"status": "awake", "tags": None}
            assert held(sim) == 20
            assert await text(sim) == "hello big world"

    asyncio.run(script())


def test_a_request_to_a_sleeper_hangs_until_it_wakes(tmp_path: Path) -> None:
    """No error, no answer: the gate must be in front."""

    async def script() -> None:
        async with rig(tmp_path) as sim:
            await sim.post("/sleep")
            request = asyncio.ensure_future(text(sim))
            await until(lambda: len(sim.state.waiting) == 1)
            assert not request.done()
            await sim.post("/wake_up")
            assert await request == "hello big world"

    asyncio.run(script())


def test_abort_answers_what_runs_with_200_and_the_reason_abort(tmp_path: Path) -> None:
    """The default mode cuts answers without any error: a client would take the half for the whole."""

    async def script() -> None:
        async with rig(tmp_path, tokens_per_second=0.01) as sim:
            request = asyncio.ensure_future(sim.chat())
            await until(lambda: sim.state.generated == 1)
            await sim.post("/sleep")
            reply = await request
            choice = reply.json["choices"][0]
            assert (reply.status, choice["finish_reason"], choice["message"]["content"]) == (200, "abort", "hello")

    asyncio.run(script())


def test_wait_lets_what_runs_finish_and_keeps_what_queues(tmp_path: Path) -> None:
    """The queued request is served after the wake."""

    async def script() -> None:
        # The sleep must come between two tokens, however busy the machine is.
        async with rig(tmp_path, tokens_per_second=2, max_num_seqs=1) as sim:
            running = asyncio.ensure_future(text(sim))
            await until(lambda: sim.state.generated == 1)
            queued = asyncio.ensure_future(text(sim))
            await until(lambda: len(sim.state.waiting) == 1)
            await sim.post("/sleep?mode=wait")
            assert await running == "hello big world"
            assert len(sim.state.waiting) == 1
            await sim.post("/wake_up")
            assert await queued == "hello big world"

    asyncio.run(script())


def test_keep_freezes_what_runs_and_goes_on_after_the_wake(tmp_path: Path) -> None:
    """What a preempting scheduler builds on: the answer is the same, only later."""

    async def script() -> None:
        async with rig(tmp_path, tokens_per_second=2) as sim:
            running = asyncio.ensure_future(text(sim))
            await until(lambda: sim.state.generated == 1)
            await sim.post("/sleep?mode=keep")
            said = sim.state.generated
            await asyncio.wait({running}, timeout=0.05)
            assert (sim.state.generated, running.done()) == (said, False)
            await sim.post("/wake_up")
            assert await running == "hello big world"

    asyncio.run(script())


def test_a_second_sleep_changes_nothing_but_the_metric(tmp_path: Path) -> None:
    """1 -> 2 while asleep answers 200 and does not deepen: the weights are still there after a plain wake."""

    async def script() -> None:
        async with rig(tmp_path, **gpu(tmp_path)) as sim:
            await sim.post("/sleep?level=1")
            assert (await sim.post("/sleep?level=2")).json == {"status": "sleeping", "level": 2}
            metrics = (await sim.call("GET", "/metrics")).body.decode()
            assert 'sleep_state="discard_all"} 1.0' in metrics
            await sim.post("/wake_up")
            assert await text(sim) == "hello big world"

    asyncio.run(script())


def test_a_plain_wake_from_level_2_serves_garbage(tmp_path: Path) -> None:
    """200, awake, and nonsense: only the right order of calls helps."""

    async def script() -> None:
        async with rig(tmp_path) as sim:
            await sim.post("/sleep?level=2")
            assert (await sim.post("/wake_up")).json["status"] == "awake"
            assert await text(sim) == "!!!"
            await sim.post("/collective_rpc", {"method": "reload_weights"})
            assert await text(sim) == "hello big world"

    asyncio.run(script())


def test_the_right_order_wakes_from_level_2(tmp_path: Path) -> None:
    """Memory comes back in two steps; requests run only after the second."""

    async def script() -> None:
        async with rig(tmp_path, **gpu(tmp_path)) as sim:
            await sim.post("/sleep?level=2")
            request = asyncio.ensure_future(text(sim))
            assert (await sim.post("/wake_up?tags=weights")).json == {"status": "sleeping", "tags": ["weights"]}
            assert held(sim) == 12
            assert (await sim.post("/collective_rpc", {"method": "reload_weights"})).json == {"results": [None]}
            assert not request.done()
            assert (await sim.post("/wake_up?tags=kv_cache")).json["status"] == "awake"
            assert held(sim) == 20
            assert await request == "hello big world"

    asyncio.run(script())


def test_weights_cannot_be_reloaded_into_unmapped_memory(tmp_path: Path) -> None:
    """500, as the worker dies of an illegal access."""

    async def script() -> None:
        async with rig(tmp_path) as sim:
            await sim.post("/sleep?level=2")
            assert (await sim.post("/collective_rpc", {"method": "reload_weights"})).status == 500

    asyncio.run(script())


def test_a_wake_without_room_fails_and_can_be_tried_again(tmp_path: Path) -> None:
    """No roll-back: it is still asleep, and what was mapped stays so."""

    async def script() -> None:
        async with rig(tmp_path, **gpu(tmp_path)) as sim:
            await sim.post("/sleep")
            other = FakeGpu(sim.options.device_file[0], pid=1)
            other.hold(10 * GiB)
            failed = await sim.post("/wake_up")
            assert failed.status == 500
            assert "CUDA Error: out of memory" in failed.json["error"]["message"]
            assert (await sim.call("GET", "/is_sleeping")).json == {"is_sleeping": True}
            assert held(sim) == 22
            other.hold(0)
            assert (await sim.post("/wake_up")).status == 200
            assert held(sim) == 20

    asyncio.run(script())


def test_a_sleep_that_answers_500_has_unmapped_all_the_same(tmp_path: Path) -> None:
    """vLLM's hazard: a wake then believes that there is nothing to do, and garbage is served."""

    async def script() -> None:
        async with rig(tmp_path, fail=("sleep-500",), **gpu(tmp_path)) as sim:
            assert (await sim.post("/sleep")).status == 500
            assert held(sim) == 1
            assert (await sim.post("/wake_up")).status == 200
            assert await text(sim) == "!!!"

    asyncio.run(script())


def test_a_sleep_may_answer_200_and_free_nothing(tmp_path: Path) -> None:
    """Which is why a manager looks at the device."""

    async def script() -> None:
        async with rig(tmp_path, fail=("sleep-keeps-memory",), **gpu(tmp_path)) as sim:
            assert (await sim.post("/sleep")).status == 200
            assert held(sim) == 20

    asyncio.run(script())


def test_level_0_only_pauses(tmp_path: Path) -> None:
    """No memory is touched; ``tags=scheduling`` resumes."""

    async def script() -> None:
        async with rig(tmp_path, **gpu(tmp_path)) as sim:
            await sim.post("/sleep?level=0")
            assert (held(sim), sim.state.is_sleeping) == (20, True)
            assert (await sim.post("/wake_up?tags=scheduling")).json["status"] == "awake"
            assert await text(sim) == "hello big world"

    asyncio.run(script())


@pytest.mark.parametrize("path", ["/sleep?level=3", "/sleep?level=x", "/sleep?mode=never"])
def test_what_is_wrong_is_refused(tmp_path: Path, path: str) -> None:
    """400, and it goes on serving."""

    async def script() -> None:
        async with rig(tmp_path) as sim:
            assert (await sim.post(path)).status == 400
            assert not sim.state.is_sleeping

    asyncio.run(script())


def test_an_unknown_tag_wakes_nothing(tmp_path: Path) -> None:
    """A warning and 200."""

    async def script() -> None:
        async with rig(tmp_path) as sim:
            await sim.post("/sleep")
            assert (await sim.post("/wake_up?tags=weights&tags=foo")).json["status"] == "sleeping"
            assert sim.state.tags == {"weights", "kv_cache"}

    asyncio.run(script())


def test_pause_and_resume(tmp_path: Path) -> None:
    """The scheduler alone; sleeping by vLLM's own account."""

    async def script() -> None:
        async with rig(tmp_path) as sim:
            await sim.post("/pause?mode=keep")
            assert (await sim.call("GET", "/is_paused")).json == {"is_paused": True}
            assert (await sim.call("GET", "/is_sleeping")).json == {"is_sleeping": True}
            await sim.post("/resume")
            assert await text(sim) == "hello big world"

    asyncio.run(script())


def test_wake_failures_can_be_switched_on_and_off(tmp_path: Path) -> None:
    """A file of failures is read each time: a rehearsal can break a running engine and mend it."""

    async def script() -> None:
        failures = tmp_path / "failures"
        async with rig(tmp_path, fail_file=str(failures)) as sim:
            await sim.post("/sleep")
            failures.write_text("wake-500\n")
            assert (await sim.post("/wake_up")).status == 500
            failures.write_text("")
            assert (await sim.post("/wake_up")).status == 200

    asyncio.run(script())
