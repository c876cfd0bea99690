"""The engines: each command of the core to one of them is a task here, and ends in exactly one event.

A task never outlives its command: a stop overrules whatever else runs for that
engine. Nothing here decides anything; it does what was decided, bounded in
time, and says how it went.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllmd.config.types import ModelConfig
from vllmd.core import commands, events
from vllmd.core.types import Footprint, Placement, Source
from vllmd.daemon.calls import answers, asked, call, complete, looked_at, next_line, within
from vllmd.daemon.logfile import LogFile, path_of
from vllmd.daemon.member import Member, of
from vllmd.daemon.memory import Memory
from vllmd.daemon.orders import Orders
from vllmd.daemon.sleeps import Sleeps, finish_work
from vllmd.daemon.words import how_it_ended, with_hint, with_last_lines, with_root
from vllmd.engines.base import Listen, Progress
from vllmd.engines.plain import PROBE
from vllmd.errors import ConfigError, LauncherFailed, VllmdError
from vllmd.launcher.client import ExitReport, LauncherClient, StartOrder
from vllmd.proxy.peers import Impostor
from vllmd.proxy.upstream import describe

log = logging.getLogger("vllmd.fleet")

READY_POLL = 0.02  # seconds between probes while starting: the lag after true readiness stays under 50 ms
KILL_LIMIT = 10.0  # seconds for a killed cgroup to become empty before the engine is given up
LOG_BACKLOG = 1000  # lines for a reader of the log that does not keep up; the rest it misses
WATCH_FAILURES = 2  # looks at a server that is not ours that must fail before it counts as gone
SILENCE = 5.0  # seconds that it may leave looks without an answer
WHOLE_LOG = 1000  # lines asked for of an engine that has just begun: all of them

Post = Callable[[events.Event], None]


class Fleet:
    """Starts, wakes, puts to sleep and stops engines through the launcher."""

    def __init__(
        self,
        launcher: LauncherClient,
        post: Post,
        memory: Memory,
        orders: Orders,
        logs: Path | None = None,
    ) -> None:
        self.members: dict[str, Member] = {}
        self.on_phase: Callable[[], None] = lambda: None
        self.look: Callable[[], Awaitable[None]] = _blind  # has the core told what the devices hold now
        self.last_start: dict[str, float] = {}  # model -> seconds its last start took
        self._launcher = launcher
        self._post = post
        self._memory = memory
        self._orders = orders
        self._logs = logs
        self._sleeps = Sleeps(memory, self.annotate)
        self._tasks: set[asyncio.Task[None]] = set()
        self._strays: dict[str, Member] = {}  # instance -> an engine being ended that the core does not know

    def configure(self, models: Mapping[str, ModelConfig], kv_caches: Mapping[str, int]) -> None:
        """Start engines by these settings from now on. ``kv_caches``: bytes per device, by model; 0: its own choice."""
        self._orders.configure(models, kv_caches)

    # -- commands of the core ------------------------------------------------------------

    def start(self, command: commands.StartEngine) -> None:
        """Begin a start; ends in EngineReady or EngineStartFailed."""
        try:
            member, order = self._orders.muster(command)
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
        work = self._start(member, order) if order else self._reach(member)
        self._run(member, work, lambda why: events.EngineStartFailed(command.model, why))

    def wake(self, command: commands.WakeEngine) -> None:
        """Begin a wake; ends in EngineAwake or EngineWakeFailed."""
        member = self.members[command.model]
        self._run(
            member, self._sleeps.wake(member, command.level), lambda why: events.EngineWakeFailed(command.model, why)
        )

    def sleep(self, command: commands.SleepEngine) -> None:
        """Begin a sleep; ends in EngineAsleep or EngineSleepFailed."""
        member = self.members[command.model]
        self._run(member, self._sleeps.sleep(member, command), lambda why: events.EngineSleepFailed(command.model, why))

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
        self._run(
            member, self._sleeps.prove_freeze(member), lambda why: events.FreezeProved(command.model, survived=False)
        )

    def probe(self, command: commands.ProbeReplica) -> None:
        """Ask a replica a short question; ends in ReplicaProbed."""
        member = self.members.get(command.model)
        if member is None:
            self._post(events.ReplicaProbed(command.request, None, "its engine is gone"))
        else:
            self.spawn(self._probe(member, command))

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
        member.listen = replace(member.listen, owner=member.running.uid)
        log.info("%s: started as pid %d in %s", name, member.running.pid, member.running.unit, extra=of(member))
        await self.follow(member)
        return await self.await_ready(member)

    async def _reach(self, member: Member) -> events.Event:
        """A server that is not ours has started when it answers; from then on it is watched."""
        name = member.model.name
        if failure := await call(member, member.engine.ready(member.model)):
            self._forget(member)
            return events.EngineStartFailed(name, failure)
        member.phase, member.ready_after = Progress("ready"), time.monotonic() - member.started
        self.spawn(self._watch(member))
        log.info("%s: %s answers", name, describe(member.listen), extra=of(member))
        return events.EngineReady(name, None)

    async def _watch(self, member: Member) -> None:
        """Tell when a server that is not ours has stopped answering; nobody else would.

        One that nobody listens for is gone at once; one that only does not answer gets ``SILENCE`` seconds.
        """
        silent_since, looks, name = 0.0, 0, member.model.name
        limit = min(PROBE, 2 * member.watch)
        while True:
            await asyncio.sleep(member.watch)
            if self.members.get(name) is not member:
                return
            failure, refused = await looked_at(member, limit)
            if not failure:
                looks = 0
                continue
            looks, silent_since = looks + 1, silent_since if looks else time.monotonic()
            if looks == 1:
                self._post(events.ServerSilent(name, failure))
            if looks >= WATCH_FAILURES and (refused or time.monotonic() - silent_since >= SILENCE):
                break
        if self.members.get(name) is member and member.task is None:
            self._forget(member)
            self._post(events.EngineExited(name, f"it is gone: {failure}"))

    async def _probe(self, member: Member, command: commands.ProbeReplica) -> None:
        seconds, why = await asked(member, command.limit)
        self._post(events.ReplicaProbed(command.request, seconds, why))

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
            if isinstance(stranger := ready.exception(), Impostor):
                await self._end(member, kill=True)
                return await self._start_failed(member, stranger.message)
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
            reason,
            memory=failure.memory,
            needed=failure.needed,
            permanent=failure.permanent,
        )

    async def _probe_until_ready(self, member: Member) -> None:
        probe = member.engine.ready(member.model)
        # Another process gets ready: no event of ours could tell when.
        while not await answers(member.listen, probe):  # noqa: ASYNC110
            await asyncio.sleep(READY_POLL)

    async def _start_limit(self, member: Member) -> None:
        """Sleep for the start's time limit; a download's time does not count."""
        spent, then = 0.0, time.monotonic()
        while spent < member.model.start_timeout:
            await asyncio.sleep(min(1.0, member.model.start_timeout - spent))
            now = time.monotonic()
            spent += 0.0 if member.phase.phase == "download" else now - then
            then = now

    async def _warm_up(self, member: Member) -> None:
        """One short request of our own, so that the first client does not pay for what is made lazily."""
        if member.model.warm_up and "/v1/completions" in member.engine.routes(member.model):
            body = {"model": member.engine.served_name(member.model), "prompt": "Hello", "max_tokens": 1}
            if await complete(member, body) is None:
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
                coming = await next_line(queue, member.exited)
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

    async def _stop(self, member: Member, overruled: asyncio.Task[None] | None, *, kill: bool) -> events.Event:
        if overruled:
            with contextlib.suppress(BaseException):
                await asyncio.wait({overruled})
        if member.ordered:
            await asyncio.wait({member.ordered})
            if not member.ordered.cancelled() and not member.ordered.exception():
                member.running = member.ordered.result()
        if not kill:
            await finish_work(member)
        before, ownerless = await self._memory.held(member), self._memory.ownerless()
        empty = member.running is None or (await self._end(member, kill=kill) and _is_empty(member))
        missing = await self._memory.missing(before, ownerless) if empty else _stuck(member, before)
        self._forget(member)
        if not empty:
            log.error("%s: its processes could not be ended", member.model.name, extra=of(member))
        return events.EngineStopped(member.model.name, missing)

    async def _end(self, member: Member, *, kill: bool) -> bool:
        """Its stop command, or a signal to the main process only; then the whole cgroup. True once nothing is left."""
        if not kill:
            await self._tell_to_go(member)
            if await within(member.exited.wait(), member.model.stop_timeout):
                return True
            log.warning("%s: still there %.0f s after it was told to end, killing its cgroup", member.model.name,
                        member.model.stop_timeout, extra=of(member))  # fmt: skip
        told, member.ending = member.ending, True
        with contextlib.suppress(LauncherFailed):
            await self._launcher.kill(member.instance)
        gone = await within(member.exited.wait(), KILL_LIMIT)
        if member.stop and not told:  # a container outlives its client, and holds the device until it is stopped
            await self._run_stop(member)
        return gone

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
            await self._launcher.start(self._orders.stop_order(member, helper.instance))
            if not await within(helper.exited.wait(), member.model.stop_timeout):
                await self._launcher.kill(helper.instance)
            elif helper.report and helper.report.status != 0:
                log.warning("%s: its stop command: %s", member.model.name, helper.reason(), extra=of(member))
        except LauncherFailed as error:
            log.warning("%s: its stop command: %s", member.model.name, error.message, extra=of(member))
        finally:
            self._strays.pop(helper.instance, None)

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

    def key_of(self, instance: str) -> str:
        """The key that an engine with keys was started with."""
        return self._orders.keys.of(instance)

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
        if member.model.log_file and self._logs:
            name = str(member.listen.port or member.instance)
            member.file = LogFile(path_of(self._logs, member.model.name, name))
            log.info("%s: its output is also in %s", member.model.name, member.file.path, extra=of(member))
        await self._launcher.follow(member.instance, lines)

    async def _resume_start(self, member: Member) -> events.Event:
        await self.follow(member)
        return await self.await_ready(member)

    async def annotate(self, member: Member, **metadata: str) -> None:
        """Write what a later daemon must know beside the engine's cgroup; one that runs elsewhere has none."""
        if not member.running:
            return
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

    def _by_instance(self, instance: str) -> Member | None:
        known = (member for member in self.members.values() if member.instance == instance)
        return next(known, self._strays.get(instance))

    def _forget(self, member: Member) -> None:
        if self.members.get(member.model.name) is member:
            del self.members[member.model.name]
        self._orders.release(member)
        if member.file:
            member.file.close()


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
