"""Coroutines whose first step is taken at once."""

from __future__ import annotations

import asyncio

import pytest

from vllmd.proxy.eager import Begun


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
