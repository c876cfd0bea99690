"""Adoption: an engine that runs when the daemon starts is taken over in the state it is really in, or stopped.

The launcher knows which engines there are and what an earlier daemon noted beside each; the engine itself knows whether
it sleeps. A daemon that was killed in the middle of a sleep or a wake has noted what it was about to do, so the engine
is asked, for as long as such a call takes. Where notes and answer do not make sense together the engine is stopped: a
stop is always right, and an engine in a state that the core does not have is not.

Nothing may be decided before every engine is accounted for: the core would give away memory that one of them holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from vllmd.config.types import ModelConfig
from vllmd.core import events
from vllmd.core.types import Placement, State
from vllmd.daemon.boot_clock import date_of, seconds_since
from vllmd.daemon.calls import ask
from vllmd.daemon.engine_manager import EngineManager
from vllmd.daemon.engine_process import EngineProcess, fingerprint, noted_by_older
from vllmd.engines.base import Engine, Listen
from vllmd.engines.unusable import Unusable
from vllmd.errors import ConfigError, VllmdError
from vllmd.frozen import frozen
from vllmd.launcher.client import Running
from vllmd.proxy.peers import Impostor

log = logging.getLogger("vllmd.adoption")

RESOLVE_LIMIT = 10.0  # seconds for a half-done sleep or wake to come to its end
RESOLVE_POLL = 0.1
RECENT_LOG = 50  # lines of an adopted engine's output that its log file gets, perhaps again
UNMANAGED_LIMIT = 5.0  # seconds for which the start waits for unmanaged engines to end; then they end beside the others
Ended = Callable[[], bool]  # whether the engine has ended meanwhile


@frozen
class Found:
    """A running engine and its state. ``state`` None: it must be ended, and ``why``. ``idle``: seconds."""

    process: EngineProcess
    state: State | None
    level: int = 0
    idle: float = 0.0
    why: str = ""


async def adopt_all(
    engine_manager: EngineManager,
    running: list[Running],
    models: Mapping[str, ModelConfig],
    engine_of: Callable[[ModelConfig], Engine],
    post: Callable[[events.Event], None],
) -> None:
    """Adopt the engines that can be adopted and end the others, all at once; returns when each is accounted for."""
    unmanaged = await asyncio.gather(*(_adopt(engine_manager, one, models, engine_of, post) for one in running))
    ending = [engine_manager.tasks.spawn(engine_manager.end_unmanaged(process)) for process in unmanaged if process]
    if ending:
        await asyncio.wait(ending, timeout=UNMANAGED_LIMIT)


async def _adopt(
    engine_manager: EngineManager,
    running: Running,
    models: Mapping[str, ModelConfig],
    engine_of: Callable[[ModelConfig], Engine],
    post: Callable[[events.Event], None],
) -> EngineProcess | None:
    """Adopt one engine, or return it as one that must be ended."""
    found = await examine(running, models, engine_of, engine_manager.key_of, engine_manager.has_ended)
    process = found.process
    if found.state is None or process.model.name in engine_manager.processes:
        why = found.why or "it is a second one of its model"
        log.warning("%s: stopping an engine left by an earlier daemon: %s", process.model.name, why)
        return process
    process.asleep = found.state is State.SLEEPING
    engine_manager.adopt(process)
    if process.model.log_file and found.state is not State.STARTING:
        engine_manager.tasks.spawn(engine_manager.follow(process, RECENT_LOG))
    log.info("%s: adopted pid %d, %s", process.model.name, running.pid, found.state.value)
    since = seconds_since(running.metadata, "since")
    post(events.EngineAdopted(process.model.name, process.placement, found.state, found.level, found.idle, since=since))
    if found.state is State.STARTING:
        engine_manager.resume_start(process)
    engine_manager.catch_up(process)
    return None


async def examine(
    running: Running,
    models: Mapping[str, ModelConfig],
    engine_of: Callable[[ModelConfig], Engine],
    key_of: Callable[[str], str] = str,
    ended: Callable[[str], bool] = lambda instance: False,
) -> Found:
    """Find out the state of an engine, by the notes beside its cgroup and by asking it.

    ``key_of``: the key of an instance. ``ended``: whether its end has been reported meanwhile.
    """
    noted = running.metadata
    model = _engine_of(noted.get("model", ""), models)
    if "pull" in noted:
        return Found(_unmanaged_process(running), None, why="it is a download; the next one goes on where it is")
    if "standby" in noted:
        return Found(_unmanaged_process(running), None, why="it is a standby; each daemon has its own")
    if model is None:
        return Found(_unmanaged_process(running), None, why="its model is no longer configured")
    try:
        process, level = _process_of(running, model, engine_of(model), key_of), int(noted.get("level") or 0)
    except (KeyError, TypeError, ValueError) as error:
        return Found(
            _unmanaged_process(running), None, why=f"its notes are unreadable ({type(error).__name__}: {error})"
        )
    if running.ending:
        return Found(process, None, why="it is ending already")
    if process.fingerprint not in (fingerprint(model), noted_by_older(model)):
        return Found(process, None, why="its model's settings have changed")
    try:
        return await _resolve(process, noted, level, lambda: ended(running.instance))
    except Impostor as error:  # another process listens there, and the engine never will
        return Found(process, None, why=error.message)


def _engine_of(noted: str, models: Mapping[str, ModelConfig]) -> ModelConfig | None:
    """The settings of the engine that was noted. Its model may have got replicas since, or have lost them.

    Versions up to 0.1.0 noted the model's name for the first of several replicas as well.
    """
    if noted in models:
        return models[noted]
    first = next((model for model in models.values() if model.replica_of == noted), None)
    return first or models.get(noted.rpartition("@")[0])


async def _resolve(process: EngineProcess, noted: Mapping[str, str], level: int, ended: Ended) -> Found:
    """Compare what was noted with what the engine says."""
    idle, tells = seconds_since(noted, "idle_since"), process.engine.asleep() is not None
    match noted.get("state"):
        case "starting":
            return Found(process, State.STARTING)
        case "ready":
            return await _expect(process, Found(process, State.READY, 0, idle), ended, asleep=False)
        case "sleeping" if not tells:  # only a daemon could have woken it, and none was there
            return await _expect(process, Found(process, State.SLEEPING, level, idle), ended, asleep=False)
        case "sleeping" | "falling_asleep" if tells:
            return await _expect(process, Found(process, State.SLEEPING, level, idle), ended, asleep=True)
        case "waking" if tells and level == 1:
            return await _expect(process, Found(process, State.READY, 0, idle), ended, asleep=False)
        case state:
            return Found(process, None, why=f"it was left {state}, at level {level}")


async def _expect(process: EngineProcess, found: Found, ended: Ended, *, asleep: bool) -> Found:
    """``found`` once the engine confirms it, within the limit; else the engine must be ended."""
    answer: object = "nothing"
    with contextlib.suppress(TimeoutError):
        # The daemon's whole start waits meanwhile, also for an engine that never answers.
        async with asyncio.timeout(RESOLVE_LIMIT):
            while not ended():
                answer = await _is_asleep(process)
                if answer is asleep:
                    process.ready_after = 0.0
                    return found
                await asyncio.sleep(RESOLVE_POLL)
            return Found(process, None, why="it has just ended")
    return Found(process, None, why=f"expected it {'asleep' if asleep else 'awake'}, it said {answer}")


async def _is_asleep(process: EngineProcess) -> object:
    """True or False as the engine says; False for an engine that cannot be asked, and lives. Raises Impostor."""
    probe = process.engine.asleep() or process.engine.alive(process.model)
    try:
        status, _, body = await ask(process.listen, probe)
        if status != probe.expect:
            return f"status {status}"
        return json.loads(body)["is_sleeping"] if process.engine.asleep() else False
    except Impostor:
        raise
    except (OSError, VllmdError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"


def _process_of(running: Running, model: ModelConfig, engine: Engine, key_of: Callable[[str], str]) -> EngineProcess:
    noted = running.metadata
    listen = Listen(**json.loads(noted["listen"]))
    process = EngineProcess(
        model=model,
        engine=engine,
        instance=running.instance,
        listen=replace(listen, key=key_of(running.instance) if listen.key else "", owner=running.uid),
        placement=Placement(tuple(json.loads(noted["devices"]))),
        fingerprint=noted["fingerprint"],
        environment=noted.get("environment"),
        running=running,
        started=time.monotonic() - seconds_since(noted, "started"),
    )
    if started := date_of(noted, "started"):
        process.started_at = started[1]
    else:
        process.started_at -= time.monotonic() - process.started
    _set_ending(process, noted)
    return process


def _set_ending(process: EngineProcess, noted: Mapping[str, str]) -> None:
    """Set how the engine is to be ended, as noted at its start."""
    if "ending" in noted:
        stop, process.stop_signal, process.self_managed = json.loads(noted["ending"])
        process.stop = tuple(stop)


def _unmanaged_process(running: Running) -> EngineProcess:
    """Enough of a member to end an engine that is not ours any more."""
    name = running.metadata.get("model", running.instance)
    engine = Unusable(ConfigError(f"{name} is not configured"))
    process = EngineProcess(ModelConfig(name), engine, running.instance, Listen(), Placement(), "", running)
    with contextlib.suppress(ValueError, TypeError):
        _set_ending(process, running.metadata)
    return process
