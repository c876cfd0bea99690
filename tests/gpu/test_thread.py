"""A driver that never answers costs one thread, and keeps nobody from leaving."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest

from vllmd.gpu import in_thread


def test_results_and_exceptions_come_back() -> None:
    """As from any call."""

    async def both() -> int:
        with pytest.raises(ZeroDivisionError):
            await in_thread(lambda: 1 // 0)
        return await in_thread(lambda: 42)

    assert asyncio.run(both()) == 42


def test_a_late_answer_to_nobody_is_dropped() -> None:
    """The waiter gave up; when the driver answers at last, nothing complains."""
    answer = threading.Event()

    async def give_up() -> list[object]:
        complaints: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        before = set(threading.enumerate())
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(in_thread(answer.wait), 0.01)
        (stuck,) = set(threading.enumerate()) - before
        answer.set()
        await asyncio.to_thread(stuck.join, 10)
        await asyncio.sleep(0)  # one turn of the loop, for what the thread left it
        return complaints

    assert asyncio.run(give_up()) == []


def test_the_interpreter_exits_with_a_call_still_stuck() -> None:
    """A wedged driver must not keep the daemon from stopping: with ``asyncio.to_thread`` this hangs for ever."""
    program = """
import asyncio, threading
from vllmd.gpu import in_thread
async def main():
    try:
        await asyncio.wait_for(in_thread(threading.Event().wait), 0.05)
    except asyncio.TimeoutError:
        print("gave up")
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "gave up\n"
