"""The loop on which a task begins and goes on within the callback that brought what it waits for."""

from __future__ import annotations

import asyncio
import selectors
import socket
import threading

from tests.proxy.fakes import BOUND, FakeGate, post, soon
from vllmd.config.types import ServerConfig
from vllmd.engines.base import Listen
from vllmd.proxy.forward import Relay
from vllmd.proxy.limits import Limits
from vllmd.proxy.loop import Loop, Selector, begin, resume
from vllmd.proxy.models import add_model_routes
from vllmd.proxy.routing import Router
from vllmd.proxy.server import Server

told: list[str] = []


async def tells(future: asyncio.Future[None]) -> None:
    """Say how far it is, and in which task."""
    async with asyncio.timeout(BOUND):  # which needs to know its task, before the first wait as well
        told.append("begun")
        await future
        told.append("resumed")


def test_a_task_begins_and_goes_on_at_once() -> None:
    """No turn of the loop passes before its first step, nor between the result and the step after it."""

    async def play() -> None:
        told.clear()
        loop, done = asyncio.get_running_loop(), asyncio.Event()
        future = loop.create_future()

        def callback() -> None:  # as asyncio calls a protocol: in no task
            task = begin(loop, tells(future))
            assert told == ["begun"] and not task.done()
            resume(future)
            assert told == ["begun", "resumed"] and task.done()
            done.set()

        loop.call_soon(callback)
        await soon(done.wait())

    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(play())


def test_tasks_do_not_nest() -> None:
    """Within a task a new one waits for its turn, and so does one that is resumed: nothing recurses."""

    async def play() -> None:
        told.clear()
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        task = begin(loop, tells(future))
        assert told == []
        await asyncio.sleep(0)
        resume(future)
        assert told == ["begun"]
        await soon(task)
        assert told == ["begun", "resumed"]

    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(play())


def test_on_another_loop_it_is_as_asyncio_has_it() -> None:
    """Whoever uses the proxy on a loop of his own gets the same in turns."""

    async def play() -> None:
        told.clear()
        loop = asyncio.get_running_loop()
        future, tasks = loop.create_future(), []
        loop.call_soon(lambda: tasks.append(begin(loop, tells(future))))
        loop.call_soon(lambda: told.append("turn"))
        await asyncio.sleep(0)
        loop.call_soon(resume, future)
        await asyncio.sleep(0)
        await soon(tasks[0])
        assert told == ["turn", "begun", "resumed"]

    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        runner.run(play())


def test_a_task_that_began_at_once_can_be_cancelled() -> None:
    """It is an ordinary one."""

    async def play() -> None:
        loop, tasks = asyncio.get_running_loop(), list[asyncio.Task[None]]()
        future = loop.create_future()
        loop.call_soon(lambda: tasks.append(begin(loop, tells(future))))
        await asyncio.sleep(0)
        tasks[0].cancel()
        await soon(asyncio.wait(tasks))
        assert tasks[0].cancelled()

    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(play())


class Counting(Selector):
    """Counts the turns of its loop."""

    turns = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Count, and do it."""
        self.turns += 1
        return super().select(timeout)


ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


def engine(listener: socket.socket) -> None:
    """Answer each request of one connection, in a thread of its own."""
    with listener.accept()[0] as sock:
        while sock.recv(1 << 16):
            sock.sendall(ANSWER)


def asked(port: int, selector: Counting) -> list[int]:
    """The turns that each of several requests on one connection took."""
    turns = []
    with socket.create_connection(("127.0.0.1", port), timeout=BOUND) as sock:
        for _ in range(8):
            before = selector.turns
            sock.sendall(post())
            assert sock.recv(1 << 16).startswith(b"HTTP/1.1 200")
            turns.append(selector.turns - before)
    return turns


def test_a_warm_request_takes_two_turns_of_the_loop() -> None:
    """One brings the request, one the engine's answer: a third would be a system call that brings nothing.

    The second one may still be under way when the client has its answer, so it counts before or after that.
    """
    selector = Counting()

    async def play() -> None:
        with socket.create_server(("127.0.0.1", 0)) as upstream, socket.create_server(("127.0.0.1", 0)) as listener:
            threading.Thread(target=engine, args=(upstream,), daemon=True).start()
            router, limits = Router(), Limits(ServerConfig())
            relay = Relay(FakeGate(Listen(port=upstream.getsockname()[1])), limits)
            add_model_routes(router, relay)
            server = Server(router, limits, [listener])
            server.start()
            turns = await soon(asyncio.to_thread(asked, listener.getsockname()[1], selector))
            assert min(turns[1:]) <= 2, turns
            assert sum(turns[1:]) <= 2 * len(turns), turns
            await server.close()
            relay.pool.close()

    with asyncio.Runner(loop_factory=lambda: Loop(selector)) as runner:
        runner.run(play())
