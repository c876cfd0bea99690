"""Where this process has no file descriptor left, nobody else is blamed for it: no engine, no device, no port."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.daemon.rig import Rig, tell
from vllmd.core import commands, events
from vllmd.core.types import Placement
from vllmd.daemon import calls, device_readings, ports, processes
from vllmd.daemon.calls import Liveness, check_liveness, nobody_listens, timed_probe
from vllmd.daemon.device_readings import DeviceReadings
from vllmd.daemon.ports import PortPool
from vllmd.engines.base import Listen
from vllmd.errors import OUT_OF_FILES, Unavailable, out_of_files
from vllmd.gpu import NoDevices
from vllmd.gpu.attribution import pids_of
from vllmd.launcher import spawn as spawning
from vllmd.launcher.protocol import StartOrder
from vllmd.launcher.spawn import OURSELVES, spawn
from vllmd.proxy import peers, upstream
from vllmd.proxy.upstream import OutOfFiles


def full(*_: object, **__: object) -> Any:
    """What the kernel says then."""
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def for_a_while(times: int, then: Callable[..., Any]) -> Callable[..., Any]:
    """Out of files so many times, and then as ever."""
    left = [times]

    def called(*arguments: object, **options: object) -> Any:
        if left[0]:
            left[0] -= 1
            full()
        return then(*arguments, **options)

    return called


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts follow each other at once."""
    monkeypatch.setattr(calls, "FILES_PAUSE", 0.01)


def test_no_port_counts_as_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The start is refused for a moment, with the reason, and all ports are there afterwards."""
    pool = PortPool(33300, 33302)
    with monkeypatch.context() as out:
        out.setattr(ports.socket, "socket", full)
        with pytest.raises(Unavailable, match="look for a free port: Too many open files"):
            pool.reserve()
    assert len({pool.reserve() for _ in range(3)}) == 3


def test_a_start_says_so_and_is_no_defect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that needs a port gets none: its start has failed for now, and not by an internal error."""

    async def story(rig: Rig) -> None:
        rig.configure(engine="sglang", model="some/model")
        monkeypatch.setattr(ports.socket, "socket", full)
        rig.engine_manager.start(commands.StartEngine("m", Placement((0,)), 1 << 30))
        failed = await rig.event()
        monkeypatch.undo()
        assert isinstance(failed, events.EngineStartFailed)
        assert "internal error" not in failed.reason
        assert not failed.permanent

    tell(story, tmp_path)


def test_a_version_that_cannot_be_looked_for_is_not_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model would have failed for good, as one whose settings are wrong."""

    async def story(rig: Rig) -> None:
        rig.configure(engine="sglang", model="some/model", engine_version="1.0")
        with monkeypatch.context() as out:
            out.setattr(Path, "iterdir", full)
            rig.engine_manager.start(commands.StartEngine("m", Placement((0,)), 1 << 30))
        failed = await rig.event()
        assert isinstance(failed, events.EngineStartFailed)
        assert failed.reason == "m: vllmd cannot start it now: Too many open files" and not failed.permanent

    tell(story, tmp_path)


def test_a_start_waits_for_an_engine_that_cannot_be_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether anybody listens there is unknown then."""
    monkeypatch.setattr(calls.socket, "socket", full)
    assert nobody_listens(Listen(uds="/nowhere")) is False


def test_a_call_waits_for_a_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sleep that could not be asked for would end in a stop of the engine."""

    async def story(rig: Rig) -> None:
        await rig.ready()
        monkeypatch.setattr(upstream, "connected", for_a_while(3, upstream.connected))
        rig.engine_manager.sleep(commands.SleepEngine("m", 1))
        assert isinstance(await rig.event(), events.EngineAsleep)

    tell(story, tmp_path)


def test_a_probe_that_was_not_sent_has_not_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The core hears that the replica was not asked; one that was asked late is not slower for that."""

    async def story(rig: Rig) -> None:
        await rig.ready()
        process = rig.engine_manager.processes["m"]
        monkeypatch.setattr(calls, "FILES_PAUSE", 0.2)
        monkeypatch.setattr(upstream, "connected", for_a_while(2, connected))
        began = time.monotonic()
        seconds, why = await timed_probe(process, 60.0)
        assert (why, seconds is None) == ("", False)
        assert time.monotonic() - began - (seconds or 0.0) > 0.3  # the two pauses are not its own
        monkeypatch.setattr(upstream, "connected", full)
        with pytest.raises(OutOfFiles):
            await timed_probe(process, 0.1)
        rig.engine_manager.probe(commands.ProbeReplica("p", "m", 0.1))
        told = await rig.event()
        assert told == events.ReplicaProbed("p", None, told.reason, unsent=True)

    connected = upstream.connected
    tell(story, tmp_path)


def test_an_engine_whose_queue_is_full_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has half a minute to go on, not the two seconds of one that is gone."""

    async def busy(*_: object) -> socket.socket:
        raise BlockingIOError(errno.EAGAIN, "its queue of connections is full")

    async def story(rig: Rig) -> None:
        await rig.ready()
        monkeypatch.setattr(upstream, "connected", busy)
        found, why = await check_liveness(rig.engine_manager.processes["m"], 1.0)
        assert found is Liveness.SILENT
        assert "connection" in why

    tell(story, tmp_path)


@pytest.mark.parametrize(
    ("number", "asked"), [(errno.EADDRNOTAVAIL, Liveness.UNKNOWN), (errno.ECONNREFUSED, Liveness.REFUSED)]
)
def test_ports_of_ours_that_are_used_up_are_not_the_engines(
    number: int, asked: Liveness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel has none left for our end of the connection."""

    async def failing(*_: object) -> socket.socket:
        raise OSError(number, os.strerror(number))

    async def story(rig: Rig) -> None:
        await rig.ready()
        monkeypatch.setattr(upstream, "connected", failing)
        assert (await check_liveness(rig.engine_manager.processes["m"], 1.0))[0] is asked

    tell(story, tmp_path)


def test_who_listens_is_not_somebody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's list cannot be read: that is told, instead of that nobody is in it."""
    monkeypatch.setattr(peers, "listener", lambda *_: None)
    monkeypatch.setattr(peers.Path, "read_text", full)

    async def play() -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            engine = Listen(port=server.getsockname()[1], owner=os.getuid())
            with pytest.raises(OutOfFiles, match="Too many open files"):
                await upstream.connect(engine, 5.0, asyncio.Protocol())

    asyncio.run(play())


def test_the_memory_of_an_engine_is_no_strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its processes cannot be listed, so nothing at all is told of the devices; a driver does not hang, either."""
    (tmp_path / "cgroup.procs").write_text("12\n")
    with monkeypatch.context() as out:
        out.setattr(Path, "read_text", full)
        with pytest.raises(OSError, match="Too many"):
            pids_of(tmp_path)
    posted: list[events.Event] = []

    async def report(*_: object) -> events.Event:
        raise AssertionError("it was read all the same")

    readings = DeviceReadings(
        cast(Any, SimpleNamespace(report=report, devices=NoDevices(""))),
        cast(Any, None),
        cast(Any, SimpleNamespace(post=posted.append)),
    )
    monkeypatch.setattr(device_readings, "out_of_files", lambda: True)
    asyncio.run(readings.look())
    assert posted == []


def test_it_is_known_by_trying(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is out is found out by opening a file."""
    assert not out_of_files()
    assert errno.EMFILE in OUT_OF_FILES
    monkeypatch.setattr(os, "open", full)
    assert out_of_files()


@pytest.mark.parametrize("missing", ["pipe", "pidfd"])
def test_a_launcher_that_runs_out_leaks_none(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that fails for want of descriptors holds none afterwards, and leaves no child behind."""
    if missing == "pipe":
        pipe = os.pipe
        order = [pipe, full]
        monkeypatch.setattr(os, "pipe", lambda: order.pop(0)())
    else:
        monkeypatch.setattr(spawning, "Process", full)
    fork, children = os.fork, list[int]()

    def noted() -> int:
        children.append(fork())
        return children[-1]

    monkeypatch.setattr(os, "fork", noted)
    gc.collect()  # what earlier tests left open does not close meanwhile
    before, output = len(os.listdir("/proc/self/fd")), os.open(os.devnull, os.O_WRONLY)
    try:
        with pytest.raises(OSError, match="Too many"):
            spawn(StartOrder("i", ("true",)), OURSELVES, output, die_with_us=True)
    finally:
        os.close(output)
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(children) == (missing == "pidfd")
    for pid in children:  # other tests of this process have children, too: a container, for one
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def test_a_process_that_cannot_be_held_for_want_of_files_is_not_called_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator who kills it and reads that it is not there looks no further."""
    monkeypatch.setattr(os, "pidfd_open", full)
    with pytest.raises(Unavailable, match="can open no more files, so nothing was done to process 12"):
        asyncio.run(processes.kill(12, cast(Any, None), cast(Any, None), force=False))
