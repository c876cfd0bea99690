"""Coroutines whose steps are taken at once."""

from __future__ import annotations

import asyncio

import pytest

from vllmd.proxy.eager import Begun, Bell, Eager


def test_what_waits_for_nothing_is_over_at_once() -> None:
    """Not even a loop is needed; its value can be awaited all the same."""

    async def seven() -> int:
        return 7

    begun = Begun(seven())
    assert begun.over
    assert asyncio.run(begun.rest()) == 7


def test_an_error_of_the_first_step_is_raised_at_once() -> None:
    """As if it had been called."""

    async def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        Begun(fail())


def test_the_rest_goes_on_in_a_task() -> None:
    """Through several waits, bare turns of the loop among them, to its value."""

    async def play() -> None:
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def twice() -> int:
            await asyncio.sleep(0)
            async with asyncio.timeout(10):
                return 2 * await answer

        begun = Begun(twice())
        assert not begun.over
        task = asyncio.create_task(begun.rest())
        answer.set_result(4)
        assert await task == 8

    asyncio.run(play())


@pytest.mark.parametrize("cleans_up", [False, True])
def test_a_cancelled_wait_reaches_the_coroutine(cleans_up: bool) -> None:
    """It may still wait for something before it ends; the task is cancelled in the end."""

    async def play() -> None:
        seen = []

        async def wait() -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if cleans_up:
                    await asyncio.sleep(0)
                seen.append("cancelled")
                raise

        task = asyncio.create_task(Begun(wait()).rest())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert seen == ["cancelled"]

    asyncio.run(play())


def test_what_waits_for_a_bell_goes_on_as_it_rings() -> None:
    """Without a turn of the loop, without a task, and any number of times."""

    async def play() -> None:
        bells = [Bell(), Bell()]
        steps = []

        async def hear() -> None:
            for bell in bells:
                await bell
                steps.append(asyncio.all_tasks())

        running = Eager(hear(), asyncio.get_running_loop())
        assert running.waits
        for bell in bells:
            bell.ring()
            bell.ring()
        assert steps == [{asyncio.current_task()}] * 2
        assert not running.waits

    asyncio.run(play())


def test_any_other_wait_brings_a_task() -> None:
    """So that time limits can be had after it, and bells are still heard."""

    async def play() -> None:
        bell, other, over = Bell(), Bell(), asyncio.Event()

        async def hear() -> None:
            await bell
            await asyncio.sleep(0)
            async with asyncio.timeout(10):
                await other
            over.set()

        running = Eager(hear(), asyncio.get_running_loop())
        bell.ring()
        await asyncio.sleep(0)
        other.ring()
        await over.wait()
        assert not running.waits

    asyncio.run(play())


@pytest.mark.parametrize("rung_too", [False, True])
def test_a_cancelled_wait_for_a_bell_ends_in_the_next_turn(rung_too: bool) -> None:
    """Whoever cancels goes on first; a bell that rings after that is not heard."""

    async def play() -> None:
        bell, seen = Bell(), []

        async def hear() -> None:
            try:
                await bell
            except asyncio.CancelledError:
                seen.append("cancelled")

        running = Eager(hear(), asyncio.get_running_loop())
        running.cancel()
        running.cancel()
        if rung_too:
            bell.ring()
        assert not seen
        await asyncio.sleep(0)
        assert seen == ["cancelled"]
        assert not running.waits

    asyncio.run(play())
