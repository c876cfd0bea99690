"""The engines: each command of the core to one of them is a task here, and ends in exactly one event.

A task never outlives its command: a stop overrules whatever else runs for that
engine. Nothing here decides anything; it does what was decided, bounded in
time, and says how it went.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import signal
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllmd.config.names import instance_name
from vllmd.config.types import ModelConfig
from vllmd.core import commands, events
from vllmd.core.types import Footprint, Placement, Source
from vllmd.daemon.logfile import LogFile, path_of
from vllmd.daemon.memory import RETURN_LIMIT, TOLERANCE, Memory
from vllmd.engines.base import Call, Engine, Failure, Launch, Listen, Place, Progress
from vllmd.errors import ConfigError, LauncherFailed, Unavailable, VllmdError
from vllmd.launcher.client import ExitReport, LauncherClient, Running, StartOrder
from vllmd.proxy.upstream import describe, request

log = logging.getLogger("vllmd.fleet")

READY_POLL = 0.02  # seconds between probes while starting: the lag after true readiness stays under 50 ms
LONGEST_STOP = 3600.0  # seconds between SIGTERM and SIGKILL that the launcher accepts
KILL_LIMIT = 10.0  # seconds for a killed cgroup to become empty before the engine is given up
LOG_LINES = 200  # kept per engine
LOG_BACKLOG = 1000  # lines for a reader of the log that does not keep up; the rest it misses
FREEZE_TOKENS = 64
FREEZE_LIMIT = 120.0  # seconds
WATCH_PAUSE, WATCH_FAILURES = 2.0, 2  # seconds between probes of a server that is not ours; when it is gone
BUSY_POLL = 1.0  # seconds
WHOLE_LOG = 1000  # lines asked for of an engine that has just begun: all of them
REASON_LINES = 12  # of them in a failure's reason

STARTING = Progress("starting")
Post = Callable[[events.Event], None]


@dataclass
class Member:
    """One engine and what the daemon knows of it; owned by the Fleet."""

    model: ModelConfig
    engine: Engine
    instance: str
    listen: Listen
    placement: Placement
    fingerprint: str
    running: Running | None = None
    ordered: asyncio.Future[Running] | None = None
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=LOG_LINES))
    phase: Progress = STARTING
    phase_since: float = field(default_factory=time.monotonic)
    started: float = field(default_factory=time.monotonic)
    ready_after: float | None = None  # seconds its start took
    exited: asyncio.Event = field(default_factory=asyncio.Event)
    report: ExitReport | None = None
    task: asyncio.Task[None] | None = None
    file: LogFile | None = None
    stop: tuple[str, ...] = ()  # Launch.stop
    stop_signal: int = signal.SIGTERM
    self_managed: bool = False
    ending: bool = False  # it was told to go
    listeners: set[asyncio.Queue[str]] = field(default_factory=set)

    def reason(self) -> str:
        """Why it is gone, with its last words where they are at hand."""
        lines, how = self.last_lines(), how_it_ended(self.report)
        return with_last_lines(how, lines) if lines else how

    def last_lines(self) -> list[str]:
        """Its last log lines; the launcher's own copy is the complete one."""
        if self.report and self.report.log_tail:
            return list(self.report.log_tail)
        return list(self.lines)


@dataclass(frozen=True)
class Paths:
    """Where engines live: run directories (sockets), their home (caches), log files where configured."""

    run: Path
    home: Path | None = None
    logs: Path | None = None


class Fleet:
    """Starts, wakes, puts to sleep and stops engines through the launcher."""

    def __init__(
        self,
        launcher: LauncherClient,
        post: Post,
        memory: Memory,
        paths: Paths,
        engine_of: Callable[[ModelConfig], Engine],
        ports: PortPool,
    ) -> None:
        self.members: dict[str, Member] = {}
        self._models: Mapping[str, ModelConfig] = {}
        self._kv_caches: Mapping[str, int] = {}
        self.on_phase: Callable[[], None] = lambda: None
        self.look: Callable[[], Awaitable[None]] = _blind  # has the core told what the devices hold now
        self.last_start: dict[str, float] = {}  # model -> seconds its last start took
        self._launcher = launcher
        self._post = post
        self._memory = memory
        self._paths = paths
        self._engine_of = engine_of
        self._ports = ports
        self._tasks: set[asyncio.Task[None]] = set()
        self._strays: dict[str, Member] = {}  # instance -> an engine being ended that the core does not know

    def configure(self, models: Mapping[str, ModelConfig], kv_caches: Mapping[str, int]) -> None:
        """Start engines by these settings from now on. ``kv_caches``: bytes per device, by model; 0: its own choice."""
        self._models, self._kv_caches = models, kv_caches

    # -- commands of the core ------------------------------------------------------------

    def start(self, command: commands.StartEngine) -> None:
        """Begin a start; ends in EngineReady or EngineStartFailed."""
        try:
            member, order = self._muster(command)
        except VllmdError as error:
            permanent = isinstance(error, ConfigError)
            self._post(events.EngineStartFailed(command.model, error.message, permanent=permanent))
            return
        except Exception as error:  # a defect must not leave the model starting for ever
            log.exception("%s: cannot be started", command.model)
            why = f"{command.model}: internal error: {type(error).__name__}: {error}"
            self._post(events.EngineStartFailed(command.model, why))
            return
        self.members[command.model] = member
        work = self._start(member, order) if order.argv else self._reach(member)
        self._run(member, work, lambda why: events.EngineStartFailed(command.model, why))

    def wake(self, command: commands.WakeEngine) -> None:
        """Begin a wake; ends in EngineAwake or EngineWakeFailed."""
        member = self.members[command.model]
        self._run(member, self._wake(member, command.level), lambda why: events.EngineWakeFailed(command.model, why))

    def sleep(self, command: commands.SleepEngine) -> None:
        """Begin a sleep; ends in EngineAsleep or EngineSleepFailed."""
        member = self.members[command.model]
        self._run(member, self._sleep(member, command), lambda why: events.EngineSleepFailed(command.model, why))

    def stop(self, command: commands.StopEngine) -> None:
        """Begin a stop, whatever else is under way; ends in EngineStopped."""
        member = self.members.get(command.model)
        if member is None:
            self._post(events.EngineStopped(command.model))
            return
        overruled = member.task
        if overruled:
            overruled.cancel()
        self._run(
            member,
            self._stop(member, overruled, kill=command.kill),
            lambda why: events.EngineStopped(command.model),
        )

    def prove_freeze(self, command: commands.ProveFreeze) -> None:
        """Freeze a request of our own and see it complete; ends in FreezeProved."""
        member = self.members[command.model]
        self._run(member, self._prove_freeze(member), lambda why: events.FreezeProved(command.model, survived=False))

    # -- the tasks -----------------------------------------------------------------------

    async def _start(self, member: Member, order: StartOrder) -> events.Event:
        name = member.model.name
        member.ordered = asyncio.ensure_future(self._launcher.start(order))
        try:
            member.running = await asyncio.shield(member.ordered)
        except LauncherFailed as error:
            self._forget(member)
            reason = with_hint(error.message, member.engine.failure([error.message]).hint)
            return events.EngineStartFailed(name, reason, permanent=getattr(error, "permanent", False))
        log.info("%s: started as pid %d in %s", name, member.running.pid, member.running.unit, extra=of(member))
        await self.follow(member)
        return await self.await_ready(member)

    async def _reach(self, member: Member) -> events.Event:
        """A server that is not ours has started when it answers; from then on it is watched."""
        name = member.model.name
        if failure := await self._call(member, member.engine.ready(member.model)):
            self._forget(member)
            return events.EngineStartFailed(name, failure)
        member.phase, member.ready_after = Progress("ready"), time.monotonic() - member.started
        self.spawn(self._watch(member))
        log.info("%s: %s answers", name, describe(member.listen), extra=of(member))
        return events.EngineReady(name, None)

    async def _watch(self, member: Member) -> None:
        """Tell when a server that is not ours has stopped answering; nobody else would."""
        failures, name = 0, member.model.name
        while failures < WATCH_FAILURES:
            await asyncio.sleep(WATCH_PAUSE)
            if self.members.get(name) is not member:
                return
            failure = await self._call(member, member.engine.alive(member.model))
            failures = failures + 1 if failure else 0
        if self.members.get(name) is member and member.task is None:
            self._forget(member)
            self._post(events.EngineExited(name, f"{describe(member.listen)} is gone: {failure}"))

    async def await_ready(self, member: Member) -> events.Event:
        """The rest of a start, from whenever it is taken up: ready, dead or out of time."""
        limit = member.model.start_timeout
        ready = asyncio.ensure_future(self._probe_until_ready(member))
        gone = asyncio.ensure_future(member.exited.wait())
        clock = asyncio.ensure_future(self._start_limit(member))
        try:
            await asyncio.wait({ready, gone, clock}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for waiting in (ready, gone, clock):
                waiting.cancel()
        if ready.done() and not ready.cancelled():
            ready.result()
            return await self._is_ready(member)
        if not member.exited.is_set():
            await self._end(member, kill=True)
            why = f"it was not ready after start_timeout ({limit:g} s), last phase: {member.phase.phase}"
            return await self._start_failed(member, why)
        return await self._start_failed(member, how_it_ended(member.report))

    async def _is_ready(self, member: Member) -> events.Event:
        name = member.model.name
        await self._warm_up(member)
        member.ready_after = self.last_start[name] = time.monotonic() - member.started
        member.phase = Progress("ready")
        if not member.file:
            await self._launcher.unfollow(member.instance)
        await self.annotate(member, state="ready", level="0")
        held = {} if member.self_managed else await self._memory.held(member)
        log.info("%s: ready after %.1f s", name, member.ready_after, extra=of(member))
        return events.EngineReady(name, _measured(member.engine.footprint(list(member.lines)), held))

    async def _start_failed(self, member: Member, what: str) -> events.Event:
        failure = member.engine.failure([*member.lines, *member.last_lines()])
        lines = member.last_lines()
        reason = with_last_lines(with_root(what, failure) if lines else what, lines)
        if failure.memory:  # somebody took it: before more room is made it must be known how much there is
            await self.look()
        self._forget(member)
        return events.EngineStartFailed(
            member.model.name,
            with_hint(reason, failure.hint),
            memory=failure.memory,
            needed=failure.needed,
            permanent=failure.permanent,
        )

    async def _probe_until_ready(self, member: Member) -> None:
        probe = member.engine.ready(member.model)
        # Another process gets ready: no event of ours could tell when.
        while not await self._answers(member.listen, probe):  # noqa: ASYNC110
            await asyncio.sleep(READY_POLL)

    async def _answers(self, listen: Listen, probe: Call) -> bool:
        try:
            status, _, _ = await ask(listen, probe)
        except (OSError, VllmdError):
            return False
        return status == probe.expect

    async def _start_limit(self, member: Member) -> None:
        """Sleep for the start's time limit; a download's time does not count."""
        spent, then = 0.0, time.monotonic()
        while spent < member.model.start_timeout:
            await asyncio.sleep(min(1.0, member.model.start_timeout - spent))
            now = time.monotonic()
            spent += 0.0 if member.phase.phase == "download" else now - then
            then = now

    async def _sleep(self, member: Member, command: commands.SleepEngine) -> events.Event:
        name = member.model.name
        await self._finish_work(member)
        before = await self._memory.held(member)
        await self.annotate(member, state="falling_asleep", level=str(command.level))
        failure = await self._call_all(member, member.engine.sleep(command.level, freeze=command.freeze))
        if failure:
            return events.EngineSleepFailed(name, failure)
        after = await self._memory.settled(member, before)
        freed = {index: before[index] - after.get(index, 0) for index in before}
        if member.self_managed:  # what it had is not what it may take, so what came back tells nothing
            freed = {}
        if freed and max(before.values()) > TOLERANCE > max(freed.values()):
            held = ", ".join(f"{size >> 20} MiB on device {index}" for index, size in after.items())
            why = f"it says that it sleeps, but {RETURN_LIMIT:g} s later it still holds {held}"
            return events.EngineSleepFailed(name, why)
        await self.annotate(member, state="sleeping", level=str(command.level))
        return events.EngineAsleep(name, command.level, freed)

    async def _wake(self, member: Member, level: int) -> events.Event:
        name = member.model.name
        await self.annotate(member, state="waking", level=str(level))
        failure = await self._call_all(member, member.engine.wake(level))
        if failure:
            return events.EngineWakeFailed(name, failure)
        await self.annotate(member, state="ready", level="0")
        return events.EngineAwake(name)

    async def _prove_freeze(self, member: Member) -> events.Event:
        """The same greedy request twice, once with a sleep and a wake in its middle: the answers must be equal."""
        name = member.model.name
        body = {"model": member.engine.served_name(member.model), "prompt": "Count: one, two, three,",
                "max_tokens": FREEZE_TOKENS, "temperature": 0, "ignore_eos": True}  # fmt: skip
        began = time.monotonic()
        undisturbed = await self._complete(member, body)
        frozen = asyncio.ensure_future(self._complete(member, body))
        await asyncio.wait({frozen}, timeout=(time.monotonic() - began) / 2)  # into the middle of its answer
        amid = not frozen.done()
        asleep = await self._call_all(member, member.engine.sleep(1, freeze=True))
        amid = amid and not frozen.done()
        failure = asleep or await self._call_all(member, member.engine.wake(1))
        answer = None if failure else await frozen
        survived = amid and answer is not None and answer == undisturbed
        log.info("%s: a frozen request %s", name, "survived" if survived else "did not survive", extra=of(member))
        return events.FreezeProved(name, survived)

    async def _complete(self, member: Member, body: dict[str, Any]) -> str | None:
        """The text of a completion; None if it failed."""
        try:
            status, _, answer = await request(member.listen, "POST", "/v1/completions", body, timeout=FREEZE_LIMIT)
            return str(json.loads(answer)["choices"][0]["text"]) if status == 200 else None
        except (OSError, VllmdError, ValueError, LookupError):
            return None

    async def _warm_up(self, member: Member) -> None:
        """One short request of our own, so that the first client does not pay for what is made lazily."""
        if member.model.warm_up and "/v1/completions" in member.engine.routes(member.model):
            body = {"model": member.engine.served_name(member.model), "prompt": "Hello", "max_tokens": 1}
            if await self._complete(member, body) is None:
                log.warning("%s: the warm-up request failed", member.model.name, extra=of(member))

    async def log_of(self, member: Member, lines: int, *, follow: bool) -> AsyncIterator[str]:
        """An engine's last log lines, and with ``follow`` what comes until it ends."""
        queue: asyncio.Queue[str] = asyncio.Queue(LOG_BACKLOG)
        member.listeners.add(queue)
        try:
            if follow:
                await self._launcher.follow(member.instance, lines)
            else:
                for line in await self._launcher.tail(member.instance, lines):
                    yield line
            while follow:
                coming = await _next_line(queue, member.exited)
                if coming is None:
                    return
                yield coming
        finally:
            member.listeners.discard(queue)

    async def kill(self, member: Member, limit: float) -> bool:
        """SIGKILL to all of an engine, unasked by the core, which hears of its exit. True once it is gone."""
        try:
            await self._launcher.kill(member.instance)
        except LauncherFailed:
            if not member.exited.is_set():
                raise
        return await within(member.exited.wait(), limit)

    async def _call_all(self, member: Member, calls: Any) -> str:
        """Carry out the calls in order; the first that fails ends it with what went wrong."""
        for call in calls:
            failure = await self._call(member, call)
            if failure and not call.optional:
                return failure
            if failure:
                log.warning("%s: %s (passed over)", member.model.name, failure, extra=of(member))
        return ""

    async def _call(self, member: Member, call: Call) -> str:
        answer = asyncio.ensure_future(ask(member.listen, call))
        gone = asyncio.ensure_future(member.exited.wait())
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                return f"{call.method} {call.path}: the engine died"
            status, _, body = answer.result()
        except (OSError, VllmdError) as error:
            return f"{call.method} {call.path}: {error or type(error).__name__}"
        finally:  # also when a stop overrules it
            answer.cancel()
            gone.cancel()
        if status == call.expect:
            return ""
        return f"{call.method} {call.path} answered {status} instead of {call.expect}: {body[:300]!r}"

    async def _stop(self, member: Member, overruled: asyncio.Task[None] | None, *, kill: bool) -> events.Event:
        if overruled:
            with contextlib.suppress(BaseException):
                await asyncio.wait({overruled})
        if member.ordered:
            await asyncio.wait({member.ordered})
            if not member.ordered.cancelled() and not member.ordered.exception():
                member.running = member.ordered.result()
        if not kill:
            await self._finish_work(member)
        before, ownerless = await self._memory.held(member), self._memory.ownerless()
        empty = member.running is None or (await self._end(member, kill=kill) and _is_empty(member))
        missing = await self._memory.missing(before, ownerless) if empty else _stuck(member, before)
        self._forget(member)
        if not empty:
            log.error("%s: its processes could not be ended", member.model.name, extra=of(member))
        return events.EngineStopped(member.model.name, missing)

    async def _finish_work(self, member: Member) -> None:
        """Let it finish what no open request shows, such as a queue of its own; at most for the drain limit."""
        probe, limit = member.engine.busy(), member.model.drain_limit
        until = None if limit is None else time.monotonic() + limit
        # Its queue is its own: no event of ours could tell when it is empty.
        while probe and await self._is_busy(member, probe) and (until is None or time.monotonic() < until):  # noqa: ASYNC110
            await asyncio.sleep(BUSY_POLL)

    async def _is_busy(self, member: Member, probe: Call) -> bool:
        """Whether a list of the answer is not empty; an engine that does not answer has nothing to finish."""
        try:
            status, _, body = await ask(member.listen, probe)
            answer = json.loads(body) if status == probe.expect else {}
        except (OSError, VllmdError, ValueError):
            return False
        return isinstance(answer, dict) and any(isinstance(value, list) and value for value in answer.values())

    async def _end(self, member: Member, *, kill: bool) -> bool:
        """Its stop command, or a signal to the main process only; then the whole cgroup. True once nothing is left."""
        if not kill:
            await self._tell_to_go(member)
            if await within(member.exited.wait(), member.model.stop_timeout):
                return True
            log.warning("%s: still there %.0f s after it was told to end, killing its cgroup", member.model.name,
                        member.model.stop_timeout, extra=of(member))  # fmt: skip
        with contextlib.suppress(LauncherFailed):
            await self._launcher.kill(member.instance)
        return await within(member.exited.wait(), KILL_LIMIT)

    async def _tell_to_go(self, member: Member) -> None:
        member.ending = True
        if member.stop:
            await self._run_stop(member)
            return
        with contextlib.suppress(LauncherFailed):
            await self._launcher.signal(member.instance, member.stop_signal)

    async def _run_stop(self, member: Member) -> None:
        """Run the stop command as the engine's user; its end is awaited, what went wrong is logged."""
        helper = Member(member.model, member.engine, f"{member.instance}-stop", Listen(), Placement(), "")
        self._strays[helper.instance] = helper
        try:
            await self._launcher.start(self._stop_order(member, helper.instance))
            if not await within(helper.exited.wait(), member.model.stop_timeout):
                await self._launcher.kill(helper.instance)
            elif helper.report and helper.report.status != 0:
                log.warning("%s: its stop command: %s", member.model.name, helper.reason(), extra=of(member))
        except LauncherFailed as error:
            log.warning("%s: its stop command: %s", member.model.name, error.message, extra=of(member))
        finally:
            self._strays.pop(helper.instance, None)

    def _stop_order(self, member: Member, instance: str) -> StartOrder:
        home = {"HOME": str(self._paths.home)} if self._paths.home else {}
        return StartOrder(
            instance=instance,
            argv=member.stop,
            env={**home, **member.model.env},
            run_dir=str(self._paths.run / instance),
            description=f"vllmd stops {member.model.name}",
        )

    # -- what the launcher tells ---------------------------------------------------------

    def on_exit(self, report: ExitReport) -> None:
        """An engine's whole cgroup is empty."""
        member = self._by_instance(report.instance)
        if member is None:
            return
        member.report = report
        member.exited.set()
        if member.stop and not member.ending:  # its processes may be a container's, which outlives its client
            member.ending = True
            self.spawn(self._run_stop(member))
        if member.task is None and member.instance not in self._strays:
            self._forget(member)
            self._post(events.EngineExited(member.model.name, member.reason()))

    def on_log(self, instance: str, lines: list[str]) -> None:
        """Log lines of an engine that is followed."""
        member = self._by_instance(instance)
        if member is None:
            return
        if member.file:
            member.file.write(lines)
        for line in lines:
            member.lines.append(line)
            for queue in member.listeners:
                if not queue.full():
                    queue.put_nowait(line)
            progress = member.engine.progress(line)
            if progress and member.ready_after is None:
                member.phase, member.phase_since = progress, time.monotonic()
                self.on_phase()

    # -- small things --------------------------------------------------------------------

    def adopt(self, member: Member) -> None:
        """Take in an engine that was found running."""
        self.members[member.model.name] = member

    async def end_stray(self, member: Member) -> None:
        """Stop an engine that is nobody's: not the core's, not in ``members``."""
        self._strays[member.instance] = member
        if not (await self._end(member, kill=member.running is None or member.running.ending) and _is_empty(member)):
            log.error("%s: its processes could not be ended", member.model.name, extra=of(member))
        self._strays.pop(member.instance, None)

    def has_devices(self, placement: Placement) -> bool:
        """Whether all devices of a placement are there."""
        return all(any(device.index == index for device in self._memory.inventory) for index in placement.devices)

    def resume_start(self, member: Member) -> None:
        """Wait on for an adopted engine that is still starting."""
        self._run(
            member,
            self._resume_start(member),
            lambda why: events.EngineStartFailed(member.model.name, why),
        )

    async def follow(self, member: Member, lines: int = WHOLE_LOG) -> None:
        """Have its output come to ``on_log``; into its file, too, where the configuration says so."""
        if member.model.log_file and self._paths.logs:
            name = str(member.listen.port or member.instance)
            member.file = LogFile(path_of(self._paths.logs, member.model.name, name))
            log.info("%s: its output is also in %s", member.model.name, member.file.path, extra=of(member))
        await self._launcher.follow(member.instance, lines)

    async def _resume_start(self, member: Member) -> events.Event:
        await self.follow(member)
        return await self.await_ready(member)

    async def annotate(self, member: Member, **metadata: str) -> None:
        """Write what a later daemon must know beside the engine's cgroup."""
        try:
            await self._launcher.annotate(member.instance, metadata)
        except LauncherFailed as error:
            log.warning("%s: cannot note %s: %s", member.model.name, metadata, error, extra=of(member))

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a side task, kept alive until it ends."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _run(self, member: Member, work: Awaitable[events.Event], failed: Callable[[str], events.Event]) -> None:
        """Carry out ``work`` as the member's one task; its result is posted, also when it breaks."""

        async def carry_out() -> None:
            try:
                event = await work
            except asyncio.CancelledError:
                raise
            except Exception as error:
                log.exception("%s: a defect in vllmd", member.model.name, extra=of(member))
                event = failed(f"internal error: {type(error).__name__}: {error}")
                if isinstance(event, events.EngineStartFailed | events.EngineStopped):
                    await self._abandon(member)
            if member.task is asyncio.current_task():
                member.task = None
            if member.exited.is_set() and self.members.get(member.model.name) is member:
                # It died meanwhile, whatever its last call said, and nobody else will tell.
                self._forget(member)
                event = events.EngineExited(member.model.name, member.reason())
            self._post(event)

        task = asyncio.ensure_future(carry_out())
        member.task = task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _abandon(self, member: Member) -> None:
        """Whatever went wrong, nothing of it may be left when it is said to be gone."""
        with contextlib.suppress(Exception):
            await self._end(member, kill=True)
        self._forget(member)

    def _muster(self, command: commands.StartEngine) -> tuple[Member, StartOrder]:
        """Everything a start needs, decided before anything is done. Raises ConfigError."""
        model = self._models[command.model]
        engine = self._engine_of(model)
        instance = instance_name(model.name)
        run_dir = self._paths.run / instance
        place = self._place(command, run_dir)
        port = 0
        try:
            launch = engine.launch(model, place)
            port = launch.listen.port
        finally:
            if port != place.port:
                self._ports.release(place.port)
        member = Member(model, engine, instance, launch.listen, command.placement, fingerprint(model))
        member.stop, member.stop_signal, member.self_managed = launch.stop, launch.stop_signal, launch.self_managed
        return member, self._order(member, launch, run_dir)

    def _place(self, command: commands.StartEngine, run_dir: Path) -> Place:
        devices = self._memory.devices_of(command.placement)
        return Place(
            run_dir=run_dir,
            device_ids=tuple(device.id for device in devices),
            memory=command.memory if devices else 0,
            device_memory=min((device.memory for device in devices), default=0),
            port=self._ports.reserve(),
            device_files=self._memory.files_of(command.placement),
            kv_cache=self._kv_caches.get(command.model, 0),
        )

    def _order(self, member: Member, launch: Launch, run_dir: Path) -> StartOrder:
        home = {"HOME": str(self._paths.home)} if self._paths.home else {}
        return StartOrder(
            instance=member.instance,
            argv=launch.argv,
            env={**home, **launch.env, **member.model.env},
            cwd=launch.cwd,
            run_dir=str(run_dir),
            listen_uds=launch.listen.uds,
            description=f"vllmd model {member.model.name}",
            stop_timeout=min(max(member.model.stop_timeout, 1.0), LONGEST_STOP),
            limits={key: value for key, value in asdict(member.model.limits).items() if value is not None},
            metadata={
                "model": member.model.name,
                "listen": json.dumps(asdict(member.listen)),
                "devices": json.dumps(member.placement.devices),
                "fingerprint": member.fingerprint,
                "state": "starting",
                "level": "0",
                "run_dir": str(run_dir),
                "ending": json.dumps([member.stop, member.stop_signal, member.self_managed]),
            },
        )

    def _by_instance(self, instance: str) -> Member | None:
        known = (member for member in self.members.values() if member.instance == instance)
        return next(known, self._strays.get(instance))

    def _forget(self, member: Member) -> None:
        if self.members.get(member.model.name) is member:
            del self.members[member.model.name]
        self._ports.release(member.listen.port)
        if member.file:
            member.file.close()


class PortPool:
    """TCP ports for engines that have no Unix sockets: each given once until it comes back."""

    def __init__(self, start: int, end: int) -> None:
        self._free = deque(range(start, end + 1))
        self._range = range(start, end + 1)

    def reserve(self) -> int:
        """A port that no other engine of ours has and nobody listens on. Raises Unavailable when there is none."""
        for _ in range(len(self._free)):
            port = self._free.popleft()
            if _is_free(port):
                return port
            self._free.append(port)
        raise Unavailable(f"all engine ports {self._range.start}-{self._range.stop - 1} are in use")

    def release(self, port: int) -> None:
        """Give it back, to be used last again."""
        if port in self._range and port not in self._free:
            self._free.append(port)


def _is_free(port: int) -> bool:
    """Whether nobody listens on the loopback port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def fingerprint(model: ModelConfig) -> str:
    """What of a model's settings its engine depends on; another value means another engine."""
    parts = {key: value for key, value in asdict(model).items() if key not in _NOT_THE_ENGINES}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


_NOT_THE_ENGINES = {  # settings that take effect without another engine
    *("where", "aliases", "idle", "pin", "preload", "warm_up", "priority", "concurrency", "on_busy", "preempt"),
    *("queue_limit", "queue_timeout", "drain_limit", "start_timeout", "stop_timeout"),
    *("max_restarts", "restart_backoff", "log_file"),
}


def how_it_ended(report: ExitReport | None) -> str:
    """``exited with status 1``, ``was killed by SIGKILL``, ..."""
    if report is None or (report.status is None and report.signal is None):
        return "the engine is gone (exit status unknown)"
    why = ", for lack of host memory" if report.oom else ""
    if report.signal is not None:
        return f"the engine was killed by {_signal_name(report.signal)}{why}"
    return f"the engine exited with status {report.status}{why}"


def _signal_name(number: int) -> str:
    """``SIGKILL``; a number where Python has no name (real-time signals)."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def with_root(what: str, failure: Failure) -> str:
    """``what``, and the error in the log that led to it; it may be far above the last lines."""
    return "; ".join(part for part in (f"{what}: {failure.reason}", failure.hint) if part)


def with_last_lines(what: str, lines: list[str]) -> str:
    """``what``, and the engine's last words below it."""
    if not lines:
        return f"{what}; it logged nothing"
    return "\n".join([f"{what}; its last log lines:", *lines[-REASON_LINES:]])


def of(member: Member) -> dict[str, dict[str, str]]:
    """The journal fields that say which engine a record is about."""
    unit = {"VLLMD_UNIT": member.running.unit} if member.running else {}
    return {"journal": {"MODEL": member.model.name, **unit}}


async def _next_line(queue: asyncio.Queue[str], exited: asyncio.Event) -> str | None:
    """The next log line; None when the engine has exited and all its lines were read."""
    line, gone = asyncio.ensure_future(queue.get()), asyncio.ensure_future(exited.wait())
    try:
        await asyncio.wait({line, gone}, return_when=asyncio.FIRST_COMPLETED)
        return line.result() if line.done() else None
    finally:
        line.cancel()
        gone.cancel()


def with_hint(what: str, hint: str) -> str:
    """``what``, and below it what would help."""
    return f"{what}\n{hint}" if hint else what


async def ask(listen: Listen, call: Call) -> tuple[int, Any, bytes]:
    """Make a call. Raises UpstreamFailed."""
    return await request(listen, call.method, call.path, call.json, timeout=call.timeout, headers=call.headers)


async def within(awaitable: Awaitable[Any], seconds: float) -> bool:
    """True if it completed within ``seconds``."""
    try:
        await asyncio.wait_for(awaitable, seconds)
    except TimeoutError:
        return False
    return True


async def _blind() -> None:
    """Nobody looks."""


def _is_empty(member: Member) -> bool:
    """Whether its end was told, and nothing of it withstood every attempt to kill it."""
    return member.report is None or member.report.empty


def _stuck(member: Member, held: Mapping[int, int]) -> dict[int, int]:
    """What an engine that cannot be killed keeps on its devices; a byte where that cannot be known, to avoid them."""
    return dict(held) or dict.fromkeys(member.placement.devices, 1)


def _measured(told: Footprint | None, held: Mapping[int, int]) -> Footprint | None:
    """The device's word counts more than the log's."""
    awake = max(held.values(), default=0)
    if not awake:
        return told
    return Footprint(
        starting=max(awake, told.starting if told else 0),
        awake=awake,
        asleep=told.asleep if told else 0,
        host=told.host if told else 0,
        source=Source.MEASURED,
    )
