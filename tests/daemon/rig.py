"""An engine manager whose launcher, engines and core are this test's: nothing is started, everything else is real.

An engine is a Unix socket here that answers as the stand-in does; it holds
memory in a real device file. Nothing waits for time to pass but for events.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vllmd.config.types import DeviceConfig, ModelConfig
from vllmd.core import commands, events
from vllmd.core.types import Placement
from vllmd.daemon.engine_manager import EngineManager
from vllmd.daemon.engine_resolver import EngineResolver
from vllmd.daemon.launch_planner import LaunchPlanner, Paths
from vllmd.daemon.memory import Memory
from vllmd.daemon.ports import PortPool
from vllmd.gpu.declared import DeclaredDevices
from vllmd.launcher.client import ExitReport, LauncherFailed, Running, StartOrder
from vllmd.simengine.device import FakeGpu, make_device
from vllmd.sizes import GiB

AWAKE, ASLEEP = 50 * GiB, GiB
OK = (200, b"{}")


async def soon(awaitable: Awaitable[Any]) -> Any:
    """Its result, in a time that only a defect exceeds."""
    return await asyncio.wait_for(awaitable, 60)


@dataclass
class FakeEngine:
    """An engine's socket. ``answers``: per path, or None to never answer."""

    gpu: FakeGpu
    listen: str
    asleep: bool = False
    answers: dict[str, tuple[int, bytes] | None] = field(default_factory=dict)
    completion: Callable[[], Awaitable[bytes]] | None = None  # the body of an answer to /v1/completions
    asked: list[str] = field(default_factory=list)
    was_asked: asyncio.Event = field(default_factory=asyncio.Event)
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)  # somebody hung up without an answer
    server: asyncio.Server | None = None
    connections: set[asyncio.StreamWriter] = field(default_factory=set)

    async def open(self) -> None:
        if self.listen:
            self.server = await asyncio.start_unix_server(self._serve, self.listen)

    def close(self) -> None:
        """As when its process ends: nobody listens, and every connection breaks off."""
        if self.server:
            self.server.close()
        for writer in self.connections:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.add(writer)
        try:
            await self._exchange(reader, writer)
        except asyncio.IncompleteReadError:  # it was only looked whether anybody listens
            pass
        finally:
            self.connections.discard(writer)
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        path = head.split()[1].decode()
        size = next((int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0)
        await reader.readexactly(size)
        answer = self._answer(path)
        self.asked.append(path)
        self.was_asked.set()
        if self.completion and path == "/v1/completions":
            answer = 200, await self.completion()
        if answer is None:
            await reader.read()
            self.left.set()
        else:
            writer.write(
                b"HTTP/1.1 %d X\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % (answer[0], len(answer[1]))
            )
            writer.write(answer[1])

    def _answer(self, path: str) -> tuple[int, bytes] | None:
        name = path.partition("?")[0]
        if name in self.answers:
            return self.answers[name]
        if name == "/sleep":
            self.asleep = True
            self.gpu.hold(ASLEEP)
        elif name == "/wake_up":
            self.asleep = False
            self.woken.set()
            self.gpu.hold(AWAKE)
        elif name == "/is_sleeping":
            return 200, b'{"is_sleeping": %s}' % (b"true" if self.asleep else b"false")
        return OK


class FakeLauncher:
    """Takes orders. ``refusal`` refuses a start, ``held_up`` delays it; signals and kills end an engine unless deaf."""

    def __init__(self) -> None:
        self.orders: list[StartOrder] = []
        self.engines: dict[str, FakeEngine] = {}
        self.notes: dict[str, dict[str, str]] = {}
        self.signals: list[str] = []
        self.abandoned: list[str] = []
        self.refusal: LauncherFailed | None = None
        self.held_up: asyncio.Event | None = None
        self.ordered = asyncio.Event()
        self.started = asyncio.Event()
        self.deaf: set[str] = set()  # of SIGTERM, SIGKILL
        self.on_exit: Callable[[ExitReport], None] = lambda report: None
        self.make: Callable[[StartOrder], FakeEngine]
        self.dying: Callable[[], None] = lambda: None

    async def start(self, order: StartOrder) -> Running:
        self.orders.append(order)
        self.ordered.set()
        if self.held_up:
            await self.held_up.wait()
        if self.refusal:
            raise self.refusal
        engine = self.engines[order.instance] = self.make(order)
        self.notes[order.instance] = dict(order.metadata)
        await engine.open()
        self.started.set()
        unit = f"vllmd-model-{order.instance}.scope"
        return Running(order.instance, os.getpid(), unit, uid=os.geteuid())

    async def signal(self, instance: str, number: int) -> None:
        self._end("SIGTERM", instance, 0)

    async def kill(self, instance: str) -> None:
        self._end("SIGKILL", instance, -9)

    def _end(self, name: str, instance: str, status: int) -> None:
        self.signals.append(name)
        if instance not in self.engines:
            raise LauncherFailed(f"there is no {instance}")
        if name not in self.deaf:
            self.dying()
            self.exit(instance, status)

    def exit(self, instance: str, status: int, *lines: str) -> None:
        """The engine's end, and its last words."""
        engine = self.engines.pop(instance)
        engine.gpu.hold(0)
        engine.close()
        signal = -status if status < 0 else None
        self.on_exit(ExitReport(instance, None if signal else status, signal, log_tail=lines))

    def abandon(self, instance: str) -> None:
        self.abandoned.append(instance)

    async def annotate(self, instance: str, metadata: Mapping[str, str]) -> None:
        if instance not in self.engines:
            raise LauncherFailed(f"there is no {instance}")
        self.notes[instance].update(metadata)

    async def follow(self, instance: str, lines: int = 50) -> None: ...
    async def unfollow(self, instance: str) -> None: ...


class Rig:
    """An engine manager on one declared device of 80 GiB, in its own event loop."""

    def __init__(self, folder: Path) -> None:
        self.gpu = FakeGpu(make_device(folder / "gpu0", 80 * GiB))
        self.launcher = FakeLauncher()
        self.launcher.make = self._engine
        self.posted: asyncio.Queue[events.Event] = asyncio.Queue()
        self.looked = 0
        self.usual: dict[str, float] = {}  # seconds, by kind of change
        devices = DeclaredDevices([DeviceConfig(80 * GiB, file=self.gpu.path)], 0)
        self.memory = Memory(devices, {0: self.gpu.path})
        self.ports = PortPool(33300, 33301)
        self.engine_manager = EngineManager(
            self.launcher,  # type: ignore[arg-type]
            self.posted.put_nowait,
            self.memory,
            LaunchPlanner(self.memory, Paths(folder / "run"), EngineResolver(), self.ports),
            look=self._look,
            usual=lambda model, kind: self.usual.get(kind, 0.0),
        )
        self.launcher.on_exit = self.engine_manager.on_exit
        self.prepare: Callable[[FakeEngine], None] = lambda engine: None
        self.configure()

    def configure(self, **settings: Any) -> None:
        """Settings of the one model, ``m``."""
        self.model = replace(ModelConfig("m", engine="sim", stop_timeout=0.1), **settings)
        self.engine_manager.configure({"m": self.model}, {})

    async def start(self) -> None:
        """Give the command."""
        self.engine_manager.start(commands.StartEngine("m", Placement((0,)), AWAKE))

    async def ready(self) -> FakeEngine:
        """An engine that serves."""
        await self.start()
        assert isinstance(await self.event(), events.EngineReady)
        return self.engine

    @property
    def engine(self) -> FakeEngine:
        (engine,) = self.launcher.engines.values()
        return engine

    @property
    def instance(self) -> str:
        return self.launcher.orders[-1].instance

    async def event(self) -> events.Event:
        """The next event that is posted."""
        return await soon(self.posted.get())  # type: ignore[no-any-return]

    async def nothing_more(self) -> None:
        """Every task has ended, and none of them posted anything."""
        while self.engine_manager.tasks.running:
            await soon(asyncio.wait(self.engine_manager.tasks.running))
        assert self.posted.empty()

    async def _look(self) -> None:
        self.looked += 1

    def _engine(self, order: StartOrder) -> FakeEngine:
        self.gpu.hold(AWAKE)
        Path(order.run_dir).mkdir(parents=True)
        engine = FakeEngine(self.gpu, order.listen_uds)
        self.prepare(engine)
        return engine


Story = Callable[[Rig], Awaitable[None]]


def tell(story: Story, folder: Path) -> None:
    """Run the story to its end, in a time that only a defect exceeds."""

    async def told() -> None:
        rig = Rig(folder)
        try:
            await story(rig)
        finally:
            for engine in rig.launcher.engines.values():
                engine.close()

    asyncio.run(asyncio.wait_for(told(), 120))
