"""How engines of other kinds live and end: stop commands, work that no request shows, memory that comes and goes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

from tests.daemon.rig import AWAKE, FakeEngine, Rig, soon, tell
from vllmd.core import commands, events
from vllmd.daemon.adoption import adopt_all
from vllmd.daemon.engine_resolver import EngineResolver
from vllmd.launcher.client import LauncherFailed, Running

SERVER = ("serve", "--uds", "${SOCKET}")
CONTAINER: dict[str, Any] = {"stop": "podman stop ${INSTANCE}"}


def configure(rig: Rig, **options: Any) -> None:
    rig.configure(engine="command", command=SERVER, options=options)


def stop(rig: Rig, *, kill: bool = False) -> None:
    rig.engine_manager.stop(commands.StopEngine("m", "asked", kill=kill))


def helpers(rig: Rig) -> list[tuple[str, ...]]:
    """The command lines of the stop commands that were run."""
    return [order.argv for order in rig.launcher.orders if order.instance.endswith("-stop")]


def let_stop_command_work(rig: Rig, instance: str) -> None:
    """``podman stop``: the container's client and the command itself both end."""

    def prepare(engine: FakeEngine) -> None:
        if rig.launcher.orders[-1].instance.endswith("-stop"):
            asyncio.get_running_loop().call_soon(rig.launcher.exit, instance, 0)
            asyncio.get_running_loop().call_soon(rig.launcher.exit, f"{instance}-stop", 0)

    rig.prepare = prepare


def test_a_container_is_stopped_by_its_command(tmp_path: Path) -> None:
    """Not by a signal to its client; run as the engine's user, in a unit of its own."""

    async def story(rig: Rig) -> None:
        configure(rig, **CONTAINER)
        await rig.ready()
        instance = rig.instance
        let_stop_command_work(rig, instance)
        stop(rig)
        assert isinstance(await rig.event(), events.EngineStopped)
        assert helpers(rig) == [("podman", "stop", instance)]
        assert rig.launcher.signals == []
        await rig.nothing_more()

    tell(story, tmp_path)


def test_a_container_whose_client_was_killed_is_stopped_as_well(tmp_path: Path) -> None:
    """It would live on, with the device's memory; nobody else knows of it."""

    async def story(rig: Rig) -> None:
        configure(rig, **CONTAINER)
        await rig.ready()
        instance = rig.instance
        rig.launcher.exit(instance, -9)
        assert isinstance(await rig.event(), events.EngineExited)
        while not helpers(rig):
            rig.launcher.ordered.clear()
            await soon(rig.launcher.ordered.wait())
        rig.launcher.exit(f"{instance}-stop", 0)
        await rig.nothing_more()
        assert helpers(rig) == [("podman", "stop", instance)]

    tell(story, tmp_path)


def test_a_stop_command_that_cannot_run_does_not_keep_the_engine(tmp_path: Path) -> None:
    """What went wrong is logged; then its cgroup is killed."""

    async def story(rig: Rig) -> None:
        configure(rig, **CONTAINER)
        await rig.ready()
        rig.launcher.refusal = LauncherFailed("there is no command 'podman'", permanent=True)
        stop(rig)
        assert isinstance(await rig.event(), events.EngineStopped)
        assert rig.launcher.signals == ["SIGKILL"]

    tell(story, tmp_path)


def test_an_adopted_container_is_still_stopped_by_its_command(tmp_path: Path) -> None:
    """How it is to be ended is noted beside it, for the daemon after this one."""

    async def story(rig: Rig) -> None:
        configure(rig, **CONTAINER)
        await rig.ready()
        instance, notes = rig.instance, rig.launcher.notes[rig.instance]
        assert json.loads(notes["ending"]) == [["podman", "stop", instance], signal.SIGTERM, False]
        rig.engine_manager.processes.clear()
        running = Running(instance, 1, "unit", metadata=notes, uid=os.geteuid())
        await adopt_all(rig.engine_manager, [running], {"m": rig.model}, EngineResolver(), rig.posted.put_nowait)
        assert isinstance(await rig.event(), events.EngineAdopted)
        assert rig.engine_manager.processes["m"].stop == ("podman", "stop", instance)

    tell(story, tmp_path)


def test_a_sleeper_that_cannot_be_asked_is_adopted_by_its_notes(tmp_path: Path) -> None:
    """It lives and only we could have woken it; in the middle of a change nobody knows, and it has to go."""

    async def story(rig: Rig) -> None:
        call = {"path": "/free"}
        configure(rig, sleep={2: call}, wake={2: call}, health="/ok", alive="/alive")
        engine = await rig.ready()
        for state, adopted in (("sleeping", True), ("waking", False)):
            rig.engine_manager.processes.clear()
            notes = rig.launcher.notes[rig.instance] | {"state": state, "level": "2"}
            running = Running(rig.instance, 1, "unit", metadata=notes, uid=os.geteuid())
            await adopt_all(rig.engine_manager, [running], {"m": rig.model}, EngineResolver(), rig.posted.put_nowait)
            assert ("m" in rig.engine_manager.processes) is adopted
        assert "/alive" in engine.asked

    tell(story, tmp_path)


def test_work_that_no_request_shows_is_finished_before_the_stop(tmp_path: Path) -> None:
    """An engine with a queue of its own is asked for it."""

    async def story(rig: Rig) -> None:
        configure(rig, busy="/queue")
        engine = await rig.ready()
        engine.answers["/queue"] = (200, b'{"queue_running": ["job"], "queue_pending": []}')
        engine.was_asked.clear()
        stop(rig)
        await soon(engine.was_asked.wait())
        assert rig.launcher.signals == []
        engine.answers["/queue"] = (200, b'{"queue_running": [], "queue_pending": []}')
        assert isinstance(await rig.event(), events.EngineStopped)
        assert rig.launcher.signals == ["SIGTERM"]

    tell(story, tmp_path)


def test_a_forced_stop_asks_nobody(tmp_path: Path) -> None:
    """Whoever forces it accepts what is lost."""

    async def story(rig: Rig) -> None:
        configure(rig, busy="/queue")
        engine = await rig.ready()
        engine.answers["/queue"] = (200, b'{"queue_running": ["job"]}')
        stop(rig, kill=True)
        assert isinstance(await rig.event(), events.EngineStopped)
        assert "/queue" not in engine.asked

    tell(story, tmp_path)


def test_what_an_engine_manages_itself_is_never_taken_for_what_it_needs(tmp_path: Path) -> None:
    """It holds nothing when it is ready and takes tens of gigabytes with the first job."""

    async def story(rig: Rig) -> None:
        configure(rig, self_managed=True, sleep={2: {"path": "/free"}}, wake={2: {"path": "/ok"}})
        await rig.start()
        assert await rig.event() == events.EngineReady("m", None)
        rig.engine.gpu.hold(0)
        sampled = await rig.memory.report(rig.engine_manager.processes, {("m", 0): AWAKE})
        assert sampled is not None
        assert sampled.replicas.get(("m", 0), AWAKE) == AWAKE
        rig.engine_manager.sleep(commands.SleepEngine("m", 2))
        assert await rig.event() == events.EngineAsleep("m", 2, {})

    tell(story, tmp_path)


def test_a_missing_program_says_what_to_install(tmp_path: Path) -> None:
    """Below what the launcher says."""

    async def story(rig: Rig) -> None:
        rig.configure(engine="llama.cpp", model="a.gguf")
        rig.launcher.refusal = LauncherFailed("there is no command 'llama-server': looked in /usr/bin", permanent=True)
        await rig.start()
        failed = await rig.event()
        assert isinstance(failed, events.EngineStartFailed)
        assert failed.permanent
        assert "; vllmctl engine install llama.cpp" in failed.reason

    tell(story, tmp_path)
