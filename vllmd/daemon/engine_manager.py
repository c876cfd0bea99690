"""The engine processes, as the daemon knows them: carries out the core's commands to engines, and reports the outcome.

Theory of operation. The core books memory for an engine as long as it believes that engine to be there, and gives the
memory to the next one when it hears that the engine is gone. So the one thing that must never fail is the report:

* Every command (start, wake, sleep, stop, prove, probe) ends in exactly one event, also when its task breaks by a
  defect (``_run``) or its engine dies meanwhile. A command that ends in none leaves its model starting for ever.
* A replica has at most one task (``EngineProcess.task``). A stop cancels the task that it finds, waits for that one's
  end, and then does its own work: an order to start that is on its way to the launcher is not taken back, so the stop
  waits until it is known what the order came to (``EngineProcess.ordered``).
* Before a failed start or a stop is reported, the engine's whole cgroup is ended, by SIGKILL if need be. What
  withstands even that keeps its memory booked: ``EngineStopped.missing`` tells the core how much.
* An engine's end comes from the launcher (``on_exit``), at any time. While a task runs, that task reports it; else it
  is reported at once. Ends of engines that nobody here knows are kept for a while: they may be about to be adopted.

Nothing here decides when an engine starts or stops. One thing is decided: whether a start that failed is made once more
(``_start_again``), of which the core hears nothing. One that was to be quicker than usual, of a standby or with a fast
loader, is made without them; one whose TCP port another process took is made on another port.

Log lines of an engine that is starting tell its phase and, if it fails, why. They are dropped once it is ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path

from vllmd.config import secrets
from vllmd.config.types import ModelConfig
from vllmd.core import commands, events
from vllmd.core.types import Footprint, Placement, Source
from vllmd.daemon import health
from vllmd.daemon.boot_clock import dated
from vllmd.daemon.calls import (
    Liveness,
    answers,
    call,
    check_liveness,
    complete,
    next_line,
    nobody_listens,
    timed_probe,
    within,
)
from vllmd.daemon.engine_process import EngineProcess, log_fields
from vllmd.daemon.failure_text import how_it_ended, with_hint, with_last_lines, with_root
from vllmd.daemon.last_starts import Start, Starts, in_words
from vllmd.daemon.launch_planner import LaunchPlanner, Paths
from vllmd.daemon.loaders import Loaders
from vllmd.daemon.memory import Memory
from vllmd.daemon.sleeps import Sleeps, finish_work
from vllmd.daemon.standbys import Standbys
from vllmd.daemon.tasks import Tasks
from vllmd.engines.base import Listen, Progress
from vllmd.engines.estimate import Estimate
from vllmd.engines.plain import PROBE
from vllmd.engines.start_phases import WARM_UP, fields
from vllmd.engines.start_times import first_phase, share_begun
from vllmd.errors import OUT_OF_FILES, ConfigError, LauncherFailed, VllmdError
from vllmd.launcher.client import ExitReport, LauncherClient, StartOrder
from vllmd.proxy.peers import Impostor
from vllmd.proxy.upstream import OutOfFiles, describe
from vllmd.systemd.throttle import Repeated

log = logging.getLogger("vllmd.engines")

READY_POLL = 0.02  # seconds between probes while starting: the lag after true readiness stays under 50 ms
READY = Progress("ready")
KILL_LIMIT = 10.0  # seconds for a killed cgroup to become empty before the engine is given up
LOG_BACKLOG = 1000  # lines for a reader of the log that does not keep up; the rest it misses
WATCH_FAILURES = 2  # failed liveness checks after which a remote server may count as gone
SILENCE = 5.0  # seconds for which a remote server may leave liveness checks without an answer
MOST_PORTS_LOST = 3  # attempts at one start that may lose their TCP port to another process
ENDS_KEPT = 256  # reports of ends of engines that are not known here
# The time limit of a start of a standby or with a fast loader: so many times the seconds that the replica's starts
# usually take, and at least so many seconds.
PATIENCE, SHORTEST_PATIENCE = 4.0, 120.0
WHOLE_LOG = 1000  # lines to begin with when an engine's log is followed from its start: all of them

Usual = Callable[[str, str], float]  # replica, kind of ``core.costs`` -> the seconds that it usually takes, 0: unknown
Post = Callable[[events.Event], None]
WITH_REASON = (events.EngineStartFailed, events.EngineWakeFailed, events.EngineSleepFailed, events.EngineExited)


async def _no_readings() -> None:
    """The stand-in for reading the devices, where none are read."""


class EngineManager:
    """Starts, wakes, puts to sleep and stops engines through the launcher."""

    def __init__(
        self,
        launcher: LauncherClient,
        post: Post,
        memory: Memory,
        launch_planner: LaunchPlanner,
        logs: Path | None = None,
        on_phase: Callable[[], None] = lambda: None,
        look: Callable[[], Awaitable[None]] = _no_readings,
        usual: Usual = lambda model, kind: 0.0,
        ended: Callable[[str, str], None] = lambda engine, instance: None,
        starts: Starts | None = None,
        standbys: Standbys | None = None,
        loaders: Loaders | None = None,
    ) -> None:
        """``on_phase`` is called when a start has come further; ``look`` reads the devices and reports to the core.

        ``ended`` is called with the id and the instance of each engine that was started and is gone. ``starts``: how
        each engine's last start went. ``logs``: the folder of engines' log files.
        """
        self.processes: dict[str, EngineProcess] = {}
        self._on_phase = on_phase
        self._look = look
        self._on_ended = ended
        self.starts = Starts() if starts is None else starts
        self._launcher = launcher
        self._report = post
        self._models: Mapping[str, ModelConfig] = {}
        self._memory = memory
        self.launch_planner = launch_planner
        self._logs = logs
        self._usual = usual
        self.standbys = standbys or Standbys(None, launch_planner.standby_of)
        self.loaders = loaders or Loaders()
        self._sleeps = Sleeps(memory, self.annotate, usual)
        self.tasks = Tasks()
        self._annotate_trouble = Repeated(log)
        self._ended: dict[str, ExitReport] = {}  # instance -> the end of an engine that may be about to be adopted
        self._unmanaged: dict[str, EngineProcess] = {}  # instance -> an engine being ended that the core does not know

    def configure(self, models: Mapping[str, ModelConfig], estimates: Mapping[str, Estimate]) -> None:
        """Start engines by these settings from now on. ``estimates``: what each is expected to take, by model."""
        self._models = models
        self.launch_planner.configure(models, estimates)
        if self._logs and any(model.log_file for model in models.values()):  # few ask for one
            # At a start the package may be another version's. If it is already, that start tells.
            with contextlib.suppress(OSError, ImportError):
                importlib.import_module("vllmd.daemon.logfile")

    @property
    def configured(self) -> Mapping[str, ModelConfig]:
        """The settings of every engine that may be started, by id."""
        return self._models

    def relocate(self, paths: Paths, first_port: int, last_port: int) -> None:
        """Start engines beneath these paths, and on ports of this range, from now on."""
        self.launch_planner.relocate(paths, first_port, last_port)

    def _post(self, event: events.Event) -> None:
        """Report an event. A reason may quote the engine's log, so secrets that the engine was given are taken out."""
        if isinstance(event, WITH_REASON) and (model := self._models.get(event.replica)) is not None:
            event = replace(event, reason=secrets.kept_out(event.reason, secrets.known_of(model)))
        self._report(event)

    # -- commands of the core ------------------------------------------------------------

    def start(self, command: commands.StartEngine) -> None:
        """Begin a start; ends in EngineReady or EngineStartFailed."""
        try:
            process, order = self.launch_planner.prepare(command)
        except VllmdError as error:
            permanent = isinstance(error, ConfigError)
            self._post(events.EngineStartFailed(command.replica, error.message, permanent=permanent))
            return
        except Exception as error:  # a defect must not leave the model starting for ever
            if isinstance(error, OSError) and error.errno in OUT_OF_FILES:
                why = f"{command.replica}: vllmd cannot start it now: {error.strerror}"
                self._post(events.EngineStartFailed(command.replica, why))
                return
            log.exception("%s: its start cannot be prepared", command.replica)
            why = f"{command.replica}: internal error: {type(error).__name__}: {error}"
            self._post(events.EngineStartFailed(command.replica, why))
            return
        self.processes[command.replica] = process
        if order and (standby := self.standbys.claim(process.standby, self.launch_planner.needs(process.model))):
            order, process.given = replace(order, standby=standby), standby
        process.command = command
        last = self.starts.get(process.name)
        process.is_first_start = last is None or last.like != process.compiled_with
        work = self._load_and_start(process, order, command.memory) if order else self._reach(process)
        self._run(process, work, lambda why: events.EngineStartFailed(process.name, why))

    def wake(self, command: commands.WakeEngine) -> None:
        """Begin a wake; ends in EngineAwake or EngineWakeFailed."""
        process = self.processes[command.replica]
        self._run(
            process, self._sleeps.wake(process, command.level), lambda why: events.EngineWakeFailed(process.name, why)
        )

    def sleep(self, command: commands.SleepEngine) -> None:
        """Begin a sleep; ends in EngineAsleep or EngineSleepFailed."""
        process = self.processes[command.replica]
        self._run(
            process, self._sleeps.sleep(process, command), lambda why: events.EngineSleepFailed(process.name, why)
        )

    def stop(self, command: commands.StopEngine) -> None:
        """Begin a stop, whatever else is under way; ends in EngineStopped."""
        process = self.processes.get(command.replica)
        if process is None:
            self._post(events.EngineStopped(command.replica))
            return
        overruled = process.task
        if overruled:
            overruled.cancel()
        self._run(
            process,
            self._stop(process, overruled, kill=command.kill),
            lambda why: events.EngineStopped(process.name),
        )

    def prove_freeze(self, command: commands.ProveFreeze) -> None:
        """Freeze a request of vllmd's own and see whether it completes; ends in FreezeProved."""
        process = self.processes[command.replica]
        self._run(
            process, self._sleeps.prove_freeze(process), lambda why: events.FreezeProved(process.name, survived=False)
        )

    def probe(self, command: commands.ProbeReplica) -> None:
        """Ask a replica a short question, beside its task; ends in ReplicaProbed."""
        process = self.processes.get(command.replica)
        if process is None:
            self._post(events.ReplicaProbed(command.request, None, "its engine is gone"))
            return

        async def work() -> None:
            try:
                seconds, why = await timed_probe(process, command.limit)
            except OutOfFiles as error:
                self._post(events.ReplicaProbed(command.request, None, error.message, unsent=True))
            else:
                self._post(events.ReplicaProbed(command.request, seconds, why))

        self.tasks.spawn(work())

    def rename(self, command: commands.RenameReplica) -> None:
        """Give an engine another id, since its model has got replicas or lost them.

        A task that is under way goes on, and reports by the new id.
        """
        if command.replica in self.starts:
            self.starts[command.now] = self.starts.pop(command.replica)
        process = self.processes.pop(command.replica, None)
        if process:
            process.model = self.launch_planner.renamed(process.model, command.now)
            self.processes[command.now] = process
            self.tasks.spawn(self.annotate(process, model=command.now))

    # -- the tasks -----------------------------------------------------------------------

    async def _load_and_start(self, process: EngineProcess, order: StartOrder, memory: int) -> events.Event:
        """Choose the loader of a start, then start.

        ``memory``: bytes that are promised to the engine on each device.
        """

        def room(weights: int) -> int:
            return memory - weights // max(1, len(process.placement.devices))

        order, process.loading = await self.loaders.choose(process.model, process.engine, order, room)
        return await self._start(process, order)

    async def _start(self, process: EngineProcess, order: StartOrder) -> events.Event:
        # Shielded: a stop that cancels this task must learn whether the launcher has started the process (``_stop``).
        process.ordered = asyncio.ensure_future(self._launcher.start(order))
        try:
            process.running = await asyncio.shield(process.ordered)
        except LauncherFailed as error:
            self._forget(process)
            reason = with_hint(error.message, process.engine.failure([error.message]).hint)
            return events.EngineStartFailed(process.name, reason, permanent=getattr(error, "permanent", False))
        process.listen = replace(process.listen, owner=process.running.uid)
        pid, unit = process.running.pid, process.running.unit
        made = f", made of {process.running.standby}" if process.running.standby else ""
        if order.standby and not made:
            made = f"; {order.standby} should have become it and did not, which the launcher's log explains"
            if process.standby:
                self.standbys.not_taken(process.standby)
        log.info("%s: started as pid %d in %s%s", process.name, pid, unit, made, extra=log_fields(process))
        process.phases.enter(Progress(first_phase(process.engine.kind)))
        self._watch_health(process)
        await self.follow(process)
        return await self.await_ready(process)

    async def _reach(self, process: EngineProcess) -> events.Event:
        """Count a remote server as started when it answers, and watch it from then on."""
        if failure := await call(process, process.engine.ready(process.model)):
            self._forget(process)
            return events.EngineStartFailed(process.name, failure)
        process.phases.now, process.ready_after = READY, time.monotonic() - process.started
        self.tasks.spawn(self._watch(process))
        log.info("%s: %s answers", process.name, describe(process.listen), extra=log_fields(process))
        return events.EngineReady(process.name, None)

    async def _watch(self, process: EngineProcess) -> None:
        """Report when a remote server has stopped answering: there is no process here whose end would tell.

        A server at whose address nobody listens is gone; one that only does not answer gets ``SILENCE`` seconds.
        """
        silent_since, failures = 0.0, 0
        limit = min(PROBE, 2 * process.watch)
        while True:
            await asyncio.sleep(process.watch)
            if self.processes.get(process.name) is not process:
                return
            liveness, failure = await check_liveness(process, limit)
            if not failure or liveness is Liveness.UNKNOWN:
                failures = 0
                continue
            failures, silent_since = failures + 1, silent_since if failures else time.monotonic()
            if failures == 1:
                self._post(events.ServerSilent(process.name, failure))
            is_over = liveness is Liveness.REFUSED or time.monotonic() - silent_since >= SILENCE
            if failures >= WATCH_FAILURES and is_over:
                break
        if self.processes.get(process.name) is process and process.task is None:
            self._forget(process)
            self._post(events.EngineExited(process.name, f"it is gone: {failure}"))

    async def await_ready(self, process: EngineProcess) -> events.Event:
        """Wait for the end of a start, whenever it was begun: the engine is ready, has exited, or is out of time."""
        limit = self._longest_start(process)
        ready = asyncio.ensure_future(self._probe_until_ready(process))
        exited = asyncio.ensure_future(process.exited.wait())
        timeout = asyncio.ensure_future(self._start_limit(process))
        try:
            await asyncio.wait({ready, exited, timeout}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for waiting in (ready, exited, timeout):
                waiting.cancel()
        if ready.done() and not ready.cancelled():
            if isinstance(impostor := ready.exception(), Impostor):
                await self._end(process, kill=True)
                return await self._start_failed(process, impostor.message)
            ready.result()
            return await self._note_ready(process)
        if not process.exited.is_set():
            await self._end(process, kill=True)
            why = f"it was not ready after start_timeout ({limit:g} s), last phase: {process.phase.phase}"
            return await self._start_failed(process, why)
        return await self._start_failed(process, how_it_ended(process.report))

    async def _note_ready(self, process: EngineProcess) -> events.Event:
        # 1. One short request, so that the first client does not wait for what the engine sets up lazily.
        if process.model.warm_up and "/v1/completions" in process.engine.routes(process.model):
            process.phases.enter(Progress(WARM_UP))
            body = {"model": process.engine.served_name(process.model), "prompt": "Hello", "max_tokens": 1}
            if await complete(process, body) is None:
                log.warning("%s: the warm-up request failed", process.name, extra=log_fields(process))
        # 2. What this start teaches about the next ones.
        process.ready_after, spent = time.monotonic() - process.started, process.phases.end()
        process.phases.now = READY
        loader = process.loader
        self.starts.note(process.name, Start(process.ready_after, spent, process.compiled_with, loader))
        self.loaders.came_up(process.loading, spent, alone=self._started_alone(process))
        if process.running and process.running.standby and process.standby:
            self.standbys.note_outcome(process.standby, good=True)
        # 3. Its log is not read any more, unless it is kept in a file. What the devices say of its memory counts more
        #    than what its log says.
        if not process.file:
            with contextlib.suppress(LauncherFailed):
                await self._launcher.unfollow(process.instance)
        await self.annotate(process, state="ready", level="0")
        held = {} if process.self_managed else await self._memory.held(process)
        words = in_words(spent, loader)
        extra = {"journal": {**log_fields(process)["journal"], **fields(spent, loader)}}
        log.info("%s: ready after %.1f s%s", process.name, process.ready_after, f": {words}" * bool(words), extra=extra)
        measured = _measured(process.engine.footprint(list(process.lines)), held)
        process.forget_start()
        return events.EngineReady(process.name, measured)

    def _started_alone(self, process: EngineProcess) -> bool:
        """Whether no other engine of this machine was starting while this one did."""
        others = (each for each in self.processes.values() if each is not process and each.running)
        return all(
            each.ready_after is not None and each.started + each.ready_after <= process.started for each in others
        )

    async def _start_failed(self, process: EngineProcess, what: str) -> events.Event:
        """The event of a start that failed, the engine being gone; or that of a second, plainer attempt."""
        lines = process.all_lines()
        failure = process.engine.failure(lines)
        if process.command and process.is_special and (process.loader or not failure.memory):
            how = f"with its weights loaded by {process.loader}" if process.loader else "made of a standby"
            log.warning("%s: it failed to start %s, and is started without: %s", process.name, how, failure.reason,
                        extra=log_fields(process))  # fmt: skip
            return await self._start_plainly(process, process.command)
        # The kernel may give a port to an outgoing connection between our look and the engine's bind().
        if process.command and failure.port and process.listen.port and process.ports_lost < MOST_PORTS_LOST:
            process.ports_lost += 1
            log.warning("%s: another process took its port %d while it was starting; it is started on another one",
                        process.name, process.listen.port, extra=log_fields(process))  # fmt: skip
            self._discard(process)
            return await self._start_again(process, process.command)
        if process.phase.detail and "phase" not in what:
            what = f"{what} in its phase {process.phase.phase!r}"
        reason = with_last_lines(with_root(what, failure) if lines else what, lines, failure.reason)
        if failure.memory:  # another process took it: before the core makes more room it must know how much there is
            await self._look()
        self._forget(process)
        return events.EngineStartFailed(
            process.name,
            reason,
            memory=failure.memory,
            needed=failure.needed,
            permanent=failure.permanent,
        )

    def _longest_start(self, process: EngineProcess) -> float:
        """The limit of a start, in seconds; shorter where the engine could be started again in a plainer way."""
        longest, usual = process.model.start_timeout, self._usual(process.name, "start")
        if not (process.is_special and process.command and usual):
            return longest
        return min(longest, max(SHORTEST_PATIENCE, PATIENCE * usual))

    async def _start_plainly(self, process: EngineProcess, command: commands.StartEngine) -> events.Event:
        """Start the engine again without standby and fast loader, either of which may have been at fault.

        Where both were used the loader is blamed: that the engine got as far as loading shows that the standby was
        good.
        """
        loading = process.loading if process.loader else None
        if loading:
            self.loaders.failed(process.model.name, loading)
        elif process.standby:
            self.standbys.note_outcome(process.standby, good=False)
        self._discard(process)
        event = await self._start_again(process, command)
        if isinstance(event, events.EngineStartFailed):  # so neither was at fault
            if loading:
                self.loaders.failed_without(process.model.name, loading)
            elif process.standby:
                self.standbys.note_outcome(process.standby, good=True)
        return event

    async def _start_again(self, process: EngineProcess, command: commands.StartEngine) -> events.Event:
        """Start an engine that was discarded once more: as another instance, and in the plain way."""
        try:
            fresh, order = self.launch_planner.prepare(command)
        except VllmdError as error:
            fresh, order, why = process, None, error.message
        if order is None:
            self._forget(process)
            return events.EngineStartFailed(process.name, why)
        process.restart_as(fresh)
        if process.ports_lost:  # the next port may be lost as well; a plain attempt that failed is not made again
            process.command = command
        return await self._start(process, order)

    async def _probe_until_ready(self, process: EngineProcess) -> None:
        """Send readiness probes until one is answered: no event tells when another process is ready.

        During most of a start nobody listens at the engine's address, which the kernel says for much less than a
        connection costs: probing all the same took a fortieth of a processor (measured).
        """
        probe, listens = process.engine.ready(process.model), False
        while not await answers(process.listen, probe):
            await asyncio.sleep(READY_POLL)
            while not listens and nobody_listens(process.listen):  # noqa: ASYNC110
                await asyncio.sleep(READY_POLL)
            listens = True

    async def _start_limit(self, process: EngineProcess) -> None:
        """Sleep for the start's time limit; the time of a download does not count."""
        spent, then, limit = 0.0, time.monotonic(), self._longest_start(process)
        while spent < limit:
            await asyncio.sleep(min(1.0, limit - spent))
            now = time.monotonic()
            spent += 0.0 if process.phase.phase == "download" else now - then
            then = now

    async def log_of(self, process: EngineProcess, lines: int, *, follow: bool) -> AsyncIterator[str]:
        """An engine's last log lines, and with ``follow`` those that come until the engine ends; without secrets."""
        queue: asyncio.Queue[str] = asyncio.Queue(LOG_BACKLOG)
        known = secrets.known_of(process.model)
        process.listeners.add(queue)
        try:
            if follow:
                await self._launcher.follow(process.instance, lines)
            else:
                for line in await self._launcher.tail(process.instance, lines):
                    yield secrets.kept_out(line, known)
            while follow:
                line_or_end = await next_line(queue, process.exited)
                if line_or_end is None:
                    return
                yield secrets.kept_out(line_or_end, known)
        finally:
            process.listeners.discard(queue)

    async def log_of_ended(self, model: ModelConfig, instance: str, lines: int) -> list[str]:
        """The last log lines of an engine that has ended. Raises LauncherFailed."""
        known = secrets.known_of(model)
        return [secrets.kept_out(line, known) for line in await self._launcher.tail(instance, lines)]

    async def kill(self, process: EngineProcess, limit: float) -> bool:
        """Send SIGKILL to the engine's cgroup; the core, which has not asked for that, hears of the exit.

        True if the engine is gone within ``limit`` seconds.
        """
        try:
            await self._launcher.kill(process.instance)
        except LauncherFailed:
            if not process.exited.is_set():
                raise
        return await within(process.exited.wait(), limit)

    async def _stop(self, process: EngineProcess, overruled: asyncio.Task[None] | None, *, kill: bool) -> events.Event:
        # 1. The task that was under way has been cancelled. What it had ordered may have become a process meanwhile.
        if overruled:
            with contextlib.suppress(BaseException):
                await asyncio.wait({overruled})
        if process.given and not process.ordered:
            self.standbys.not_used(process.given)
        if process.ordered:
            await asyncio.wait({process.ordered})
            if not process.ordered.cancelled() and not process.ordered.exception():
                process.running = process.ordered.result()
        # 2. The engine's work, then the engine.
        if not kill:
            await finish_work(process)
        before, ownerless = await self._memory.held(process), self._memory.ownerless()
        is_gone = process.running is None or (await self._end(process, kill=kill) and _is_empty(process))
        # 3. The memory: what a driver has not given back, or what processes that cannot be killed hold. Where nobody
        #    knows how much that is, one byte of each device has the core avoid the device.
        if is_gone:
            missing = await self._memory.missing(before, ownerless)
        else:
            missing = dict(before) or dict.fromkeys(process.placement.devices, 1)
            log.error("%s: its processes could not be ended", process.name, extra=log_fields(process))
        self._forget(process)
        return events.EngineStopped(process.name, missing)

    async def _end(self, process: EngineProcess, *, kill: bool) -> bool:
        """End an engine: its stop command, or a signal to its main process; then SIGKILL to its cgroup.

        True once no process is left.
        """
        if not kill:
            process.ending = True
            if process.stop:
                await self._run_stop(process)
            else:
                with contextlib.suppress(LauncherFailed):
                    await self._launcher.signal(process.instance, process.stop_signal)
            if await within(process.exited.wait(), process.model.stop_timeout):
                return True
            log.warning("%s: still there %.0f s after it was told to end, killing its cgroup", process.name,
                        process.model.stop_timeout, extra=log_fields(process))  # fmt: skip
        was_told, process.ending = process.ending, True
        try:
            await self._launcher.kill(process.instance)
        except LauncherFailed as error:
            if not getattr(error, "answered", False):  # the launcher is away: it is to kill the engine once it is back
                self._launcher.abandon(process.instance)
        is_gone = await within(process.exited.wait(), KILL_LIMIT)
        if process.stop and not was_told:  # a container outlives its client, and holds the device until it is stopped
            await self._run_stop(process)
        return is_gone

    async def _run_stop(self, process: EngineProcess) -> None:
        """Run the engine's stop command as the engine's user and wait for its end; a failure is logged."""
        helper = EngineProcess(process.model, process.engine, f"{process.instance}-stop", Listen(), Placement(), "")
        self._unmanaged[helper.instance] = helper
        try:
            await self._launcher.start(self.launch_planner.stop_order(process, helper.instance))
            if not await within(helper.exited.wait(), process.model.stop_timeout):
                await self._launcher.kill(helper.instance)
            elif helper.report and helper.report.status != 0:
                log.warning("%s: its stop command failed: %s", process.name, helper.reason(), extra=log_fields(process))
        except LauncherFailed as error:
            log.warning("%s: its stop command failed: %s", process.name, error.message, extra=log_fields(process))
        finally:
            self._unmanaged.pop(helper.instance, None)

    # -- what the launcher tells ---------------------------------------------------------

    def on_exit(self, report: ExitReport) -> None:
        """Take in that an engine's, or a standby's, whole cgroup is empty."""
        if self.standbys.ended(report):
            return
        process = self._by_instance(report.instance)
        if process is None:
            self._ended[report.instance] = report
            if len(self._ended) > ENDS_KEPT:
                del self._ended[next(iter(self._ended))]
            return
        process.report = report
        process.exited.set()
        if process.stop and not process.ending:  # its processes may be a container's, which outlives its client
            process.ending = True
            self.tasks.spawn(self._run_stop(process))
        # Else the task that waits for the end reports it.
        if process.task is None and process.instance not in self._unmanaged:
            self._forget(process)
            self._post(events.EngineExited(process.name, process.reason()))

    def on_log(self, instance: str, lines: list[str]) -> None:
        """Take in log lines of an engine that is followed: into its file, to its readers, and for its phase."""
        process = self._by_instance(instance)
        if process is None:
            return
        if process.file:
            process.file.write(lines)
        for line in lines:
            process.lines.append(line)
            for queue in process.listeners:
                if not queue.full():
                    queue.put_nowait(line)
            if process.ready_after is None and (progress := process.engine.progress(line)):
                is_new = process.phases.enter(progress)  # or it is further on in the same phase
                share = share_begun(process.engine.kind, progress.phase)
                if share is not None and is_new:
                    self._post(events.StartProgressed(process.name, share))
                self._on_phase()

    # -- adoption ------------------------------------------------------------------------

    def key_of(self, instance: str) -> str:
        """The API key that an engine was started with."""
        return self.launch_planner.keys.of(instance)

    def adopt(self, process: EngineProcess) -> None:
        """Take in an engine that was found running."""
        self.processes[process.name] = process
        self._watch_health(process)

    def resume_start(self, process: EngineProcess) -> None:
        """Go on waiting for an adopted engine that is still starting."""

        async def work() -> events.Event:
            process.phases.whole = False  # its log comes in one go now, so nobody knows how long each phase took
            await self.follow(process)
            return await self.await_ready(process)

        self._run(process, work(), lambda why: events.EngineStartFailed(process.name, why))

    def has_ended(self, instance: str) -> bool:
        """Whether the end of an engine has been reported that is not adopted (yet)."""
        return instance in self._ended

    def catch_up(self, process: EngineProcess) -> None:
        """Report the end of an adopted engine that ended after the launcher listed it."""
        if report := self._ended.pop(process.instance, None):
            self.on_exit(report)

    async def end_unmanaged(self, process: EngineProcess) -> None:
        """Stop an unmanaged engine: one that the core does not know, and that is not in ``processes``."""
        self._unmanaged[process.instance] = process
        self.catch_up(process)
        kill = process.running is None or process.running.ending
        if not (await self._end(process, kill=kill) and _is_empty(process)):
            log.error("%s: its processes could not be ended", process.name, extra=log_fields(process))
        self._unmanaged.pop(process.instance, None)

    # -- small things --------------------------------------------------------------------

    def _watch_health(self, process: EngineProcess) -> None:
        async def kill(why: str) -> None:
            log.error("%s: %s", process.name, why, extra=log_fields(process))
            process.verdict = why
            with contextlib.suppress(LauncherFailed):  # the health watch comes to the same verdict again
                await self.kill(process, KILL_LIMIT)

        process.watcher = asyncio.ensure_future(health.watch(process, kill))

    def note_answer(self, model: str, status: int, *, failed: bool) -> None:
        """Note that a request to a model's only engine was answered with ``status``, or ``failed`` on its way.

        Of a model with replicas nothing is noted here: the scheduler judges each replica by the core's events.
        """
        process = self.processes.get(model)
        if process and not process.model.replica_of:
            process.health.note(status, failed)

    async def follow(self, process: EngineProcess, lines: int = WHOLE_LOG) -> None:
        """Have the engine's output come to ``on_log``, and into its log file where the configuration asks for one."""
        if process.model.log_file and self._logs:
            from vllmd.daemon import logfile  # see ``configure``

            name = str(process.listen.port or process.instance)
            with contextlib.suppress(OSError):  # the log file meets the same error, and logs it
                logfile.forget_old_runs(self._logs, process.name)
                logfile.forget_removed_models(self._logs, self._models)
            process.file = logfile.LogFile(logfile.path_of(self._logs, process.name, name))
            log.info("%s: its output is also in %s", process.name, process.file.path, extra=log_fields(process))
        try:
            await self._launcher.follow(process.instance, lines)
        except LauncherFailed as error:  # the lines that are missed are for people, and the engine is what matters
            log.warning("%s: its output is not read: %s", process.name, error, extra=log_fields(process))

    async def annotate(self, process: EngineProcess, **metadata: str) -> None:
        """Write what a later daemon must know beside the engine's cgroup; an engine that runs elsewhere has none."""
        if not process.running:
            return
        if "state" in metadata:
            metadata |= dated("since")
        try:
            await self._launcher.annotate(process.instance, metadata)
        except LauncherFailed as error:
            self._annotate_trouble.say(
                logging.WARNING,
                "cannot note the state of engines for the next daemon: %s",
                error,
                fields=log_fields(process)["journal"],
            )

    def _run(
        self, process: EngineProcess, work: Awaitable[events.Event], failed: Callable[[str], events.Event]
    ) -> None:
        """Carry out ``work`` as the process's one task, and post its event; that of ``failed`` when ``work`` breaks."""

        async def carry_out() -> None:
            try:
                event = await work
            except asyncio.CancelledError:
                raise
            except Exception as error:
                if isinstance(error, LauncherFailed):
                    log.error("%s: %s", process.name, error, extra=log_fields(process))
                    event = failed(error.message)
                else:
                    log.exception("%s: a defect in vllmd", process.name, extra=log_fields(process))
                    event = failed(f"internal error: {type(error).__name__}: {error}")
                if isinstance(event, events.EngineStartFailed | events.EngineStopped):
                    # Nothing of the engine may be left when it is said to be gone.
                    with contextlib.suppress(Exception):
                        await self._end(process, kill=True)
                    self._forget(process)
            process.asleep = isinstance(event, events.EngineAsleep)
            if process.task is asyncio.current_task():
                process.task = None
            if process.exited.is_set() and self.processes.get(process.name) is process:
                # It exited meanwhile, whatever its last call said, and ``on_exit`` has left the report to this task.
                self._forget(process)
                event = events.EngineExited(process.name, process.reason())
            self._post(event)

        process.task = self.tasks.spawn(carry_out())

    def _by_instance(self, instance: str) -> EngineProcess | None:
        known = (process for process in self.processes.values() if process.instance == instance)
        return next(known, self._unmanaged.get(instance))

    def _forget(self, process: EngineProcess) -> None:
        """Drop an engine that is gone, unless another one has taken its id, and release what belonged to it."""
        if self.processes.get(process.name) is process:
            del self.processes[process.name]
        self._discard(process)

    def _discard(self, process: EngineProcess) -> None:
        """Release what belonged to an engine that has exited: its port, its health watcher, its log file."""
        self.launch_planner.release(process)
        if process.running:
            self._on_ended(process.name, process.instance)
        if process.watcher:
            process.watcher.cancel()
        if process.file:
            process.file.close()


def _is_empty(process: EngineProcess) -> bool:
    """Whether no process of an engine that has ended withstood every attempt to kill it."""
    return process.report is None or process.report.empty


def _measured(logged: Footprint | None, held: Mapping[int, int]) -> Footprint | None:
    """The footprint of an engine that is ready, by its log and, with precedence, by the bytes held of each device."""
    awake = max(held.values(), default=0)
    if not awake:
        return logged
    return Footprint(
        starting=max(awake, logged.starting if logged else 0),
        awake=awake,
        asleep=logged.asleep if logged else 0,
        host=logged.host if logged else 0,
        source=Source.MEASURED,
    )
