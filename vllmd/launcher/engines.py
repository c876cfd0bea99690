"""The life of every engine, from the order to the report of its end.

    PLACING    forked, waiting at its gate; systemd is making the scope
      | the start job is `done`: metadata written, gate opened
    EXECUTING  the child executes the command
      | the error pipe is closed by the exec: answer Started
    RUNNING
      | the main process ended
    ENDING     the rest gets GRACE seconds, then SIGKILL; when the group is empty the unit is
               retired and the end reported: at once if it was asked for, else with the log's tail

A failure or the time limit leads from PLACING and EXECUTING to ENDING as well,
with SIGKILL at once; the answer is then Failed, after everything is gone.
Nothing is let through the gate unless the job's result was `done`, and unless
what the next launcher has to know (the main process, the user, the run directory)
is written on the control group, where only root writes.

An order may name a standby, a process that has the engine's modules imported already
(``handover``): then that process is what is placed, and it takes the order in the
place of executing the command. Should that fail, the same order begins anew without it.

We may be root, so what an engine is acted on by is checked each time anew: the
run directory lies beneath one of ``roots`` and is tidied by the engine's user
only (an engine whose user is not known is not tidied), and a main process found
in a note counts only if it is in the engine's own group.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import logging
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from vllmd.launcher.backend import Backend, Group, Placed
from vllmd.launcher.cgroup import cgroup_of
from vllmd.launcher.handover import LIMIT, READY, TAKEN, HandOver, Link, refusal, without_standby
from vllmd.launcher.loop import Loop, Timer
from vllmd.launcher.process import Ending, Process, memory_of
from vllmd.launcher.protocol import (
    ExitReport,
    Failed,
    ProtocolError,
    Running,
    Started,
    StartOrder,
    check_metadata,
    check_path,
    is_beneath,
    unit_of,
)
from vllmd.launcher.spawn import (
    AGAIN,
    Child,
    User,
    Users,
    environment,
    prepare,
    read_failure,
    spawn,
    sweep,
    tidy,
    unused,
)

log = logging.getLogger(__name__)

MAX_ENGINES = 1024
GRACE = 0.5  # seconds between the main process's end and SIGKILL for what it left behind
KILL_LIMIT = 20.0  # seconds for the kernel to end killed processes; a stuck driver can hold them
RETIRE_LIMIT = 10.0  # seconds for systemd to forget the unit
STATUS_TRIES, STATUS_WAIT = 20, 0.01  # for the exit status of one that is not our child
TIDY_AGAIN, SWEEP_SOON, SWEEP_AGAIN = 10.0, 5.0, 30.0  # seconds
TAIL_LINES = 50  # read where the end was not asked for: somebody will want to know why
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGKILL)

# Ours, next to the daemon's metadata; the dot keeps them apart from every metadata key.
PID, START, RUN_DIR, USER = "launcher.pid", "launcher.start", "launcher.run_dir", "launcher.user"
Answer = Callable[[Started | Failed], None]


class Phase(enum.Enum):
    """Where an engine's life stands; the picture at the head of this file shows what follows what."""

    PLACING = enum.auto()
    EXECUTING = enum.auto()
    RUNNING = enum.auto()
    ENDING = enum.auto()


@dataclass(slots=True)
class Engine:
    """What the launcher knows of one engine.

    ``answer`` is owed to the client that ordered the engine, until it runs or is gone. ``link``: it is a standby.
    ``handover``: it is being made of one.
    """

    instance: str
    phase: Phase
    process: Process | None
    group: Group | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    run_dir: str = ""
    user: User | None = None  # None: found again, and its user is not known
    child: Child | None = None
    answer: Answer | None = None
    failure: Failed | None = None
    ending: Ending | None = None
    retiring: bool = False
    end_requested: bool = False
    exit_reported: bool = False  # its end has been reported; only systemd has not forgotten the unit yet
    successor: tuple[StartOrder, Answer] | None = None  # ordered meanwhile under the same name
    timer: Timer | None = None
    link: Link | None = None
    handover: HandOver | None = None
    standby: str = ""  # the one that it was made of

    def running(self) -> Running:
        """The engine as the daemon is told of it."""
        pid = self.process.pid if self.process else 0
        return Running(
            self.instance,
            pid,
            unit_of(self.instance),
            self.group.location() if self.group else "",
            dict(self.metadata),
            self.phase is Phase.ENDING,
            self.user.uid if self.user else -1,
            self.standby,
        )


class Supervisor:
    """Owns the engines. ``report`` is called once for every one that had run and is gone.

    ``roots``: the directories beneath which run directories may lie; none: anywhere. ``waiting`` is called when a
    standby has come so far that an engine can be made of it, with the bytes that it holds.
    """

    def __init__(
        self,
        loop: Loop,
        backend: Backend,
        users: Users,
        report: Callable[[ExitReport], None],
        roots: Sequence[str] = (),
        waiting: Callable[[str, int], None] = lambda instance, memory: None,
    ) -> None:
        self._waiting = waiting
        self._loop = loop
        self._backend = backend
        self._users = users
        self._report = report
        self._roots = tuple(roots)
        self._engines: dict[str, Engine] = {}
        self._unused: set[str] = set()  # run directories without an engine, at the last look
        self._tidying = 0  # children that remove what engines have left

    def __len__(self) -> int:
        return len(self._engines)

    @property
    def busy(self) -> bool:
        """Whether an engine is still there, or a child that removes what an engine has left in its run directory."""
        return bool(self._engines or self._tidying)

    def has(self, instance: str) -> bool:
        """Whether the engine is starting or running, or its end is still to be reported."""
        return instance in self._engines and not self._engines[instance].exit_reported

    # --- what is asked of it ---

    def start(self, order: StartOrder, answer: Answer) -> None:
        """Start an engine. ``answer`` is called once, now or later."""
        previous = self._engines.get(order.instance)
        if previous and previous.exit_reported and not previous.successor:
            previous.successor = (order, answer)
            return None
        try:
            user = self._users.ordered(order.user)
            self._check_place(order)
            standby = self._engines.get(order.standby)
            if standby and standby.link and standby.link.ready and standby.user == user:
                return self._start_from_standby(order, user, standby, answer)
            if standby and standby.link:  # it was given away for this, and is nobody's any more
                self.kill(order.standby)
            link = Link() if order.waits else None
            child = self._spawn(order, user, link)
        except ValueError as error:
            return answer(Failed(str(error), permanent=True))
        except OSError as error:
            return answer(Failed(f"cannot start a process: {error.strerror}"))
        engine = Engine(order.instance, Phase.PLACING, child.process, child=child, answer=answer, link=link)
        if link:
            self._loop.watch(link.fd, lambda: self._on_standby_message(engine))
        engine.metadata.update(order.metadata)
        engine.run_dir, engine.user = order.run_dir, user
        self._engines[order.instance] = engine
        self._warn_of_limits(order)
        self._loop.watch(child.process.fd, self._guarded(engine, lambda: self._on_main_exit(engine)))
        self._loop.watch(child.errors, self._guarded(engine, lambda: self._on_error_pipe(engine)))
        engine.timer = self._loop.later(order.timeout, lambda: self._on_start_timeout(engine, order.timeout))
        placed: Placed = lambda group, why: self._guarded(engine, lambda: self._on_placed(engine, group, why))()  # noqa: E731
        return self._guarded(engine, lambda: self._backend.place(order, child.process, placed))()

    def _guarded(self, engine: Engine, step: Callable[[], None]) -> Callable[[], None]:
        """The step of a start; a defect in it, or something that nobody has thought of, still becomes the answer."""

        def guarded() -> None:
            try:
                step()
            except Exception as error:
                log.exception("%s: a step of its start failed", engine.instance)
                if engine.answer and engine.phase is not Phase.ENDING:
                    self._fail(engine, Failed(f"the launcher failed: {type(error).__name__}"))

        return guarded

    def signal(self, instance: str, number: int) -> None:
        """Send a signal to the engine's main process only. Raises KeyError if there is no such engine."""
        engine = self._engines[instance]
        # systemd also asks us to stop a scope that it is retiring for us: that is not why the engine ended.
        engine.end_requested |= number in ENDING_SIGNALS and engine.phase is not Phase.ENDING
        if number in ENDING_SIGNALS:
            self._cancel_restart(engine)
        if engine.process:
            engine.process.signal(number)

    def kill(self, instance: str) -> None:
        """Send SIGKILL to every process of the engine. Raises KeyError if there is no such engine."""
        engine = self._engines[instance]
        engine.end_requested |= engine.phase is not Phase.ENDING
        self._cancel_restart(engine)
        if engine.process:
            engine.process.signal(signal.SIGKILL)
        if engine.group:
            engine.group.kill()

    def kill_all(self) -> None:
        """Send SIGKILL to every process of every engine. One that is being made of a standby takes that one away."""
        for instance in tuple(self._engines):
            with contextlib.suppress(KeyError):
                self.kill(instance)

    def stop_requested(self, instance: str) -> None:
        """systemd is stopping the scope and leaves the polite part to us: SIGTERM to the main process alone."""
        with contextlib.suppress(KeyError):
            self.signal(instance, signal.SIGTERM)

    def annotate(self, instance: str, metadata: Mapping[str, str]) -> None:
        """Add to the metadata. Raises KeyError if there is no such engine, ProtocolError if it would be too much."""
        engine = self._engines[instance]
        check_metadata({**engine.metadata, **metadata})
        engine.metadata.update(metadata)
        try:
            if engine.group:
                engine.group.annotate(metadata)
        except OSError as error:
            log.warning("%s: metadata will not survive the launcher: %s", engine.instance, error)

    def list(self) -> list[Running]:
        """The engines that run, or whose end is still to be reported; engines that are still starting are left out."""
        return [engine.running() for engine in self._engines.values() if not engine.answer and not engine.exit_reported]

    def adopt(self) -> None:
        """Take over what an earlier launcher left: main processes by number and start time, the rest to be ended."""
        for found in self._backend.adopt():
            notes = found.group.annotations()
            engine = Engine(found.instance, Phase.RUNNING, _process_of(notes, found.group), found.group)
            engine.metadata = {key: value for key, value in notes.items() if "." not in key}
            engine.run_dir, engine.user = notes.get(RUN_DIR, ""), self._users.noted(notes.get(USER))
            if engine.user is None:
                log.warning(
                    "%s: the user that it runs as is not known: its run directory stays", unit_of(found.instance)
                )
            self._engines[found.instance] = engine
            found.group.watch(lambda engine=engine: self._on_group_change(engine))  # type: ignore[misc]
            if engine.process:
                self._loop.watch(engine.process.fd, lambda engine=engine: self._on_main_exit(engine))  # type: ignore[misc]
            else:
                engine.ending = Ending()
                self._end(engine)
            log.info("found %s again, main process %s", unit_of(found.instance), engine.running().pid or "gone")
        self._sweep(SWEEP_SOON)

    def _sweep(self, again: float = SWEEP_AGAIN) -> None:
        """Now and again: what a launcher that died could not tidy any more, or a disk did not let it.

        A directory without an engine may be that of one whose order is on its way, so it goes when it is seen a second
        time. (Its age would not tell that: somebody may set the clock.)
        """
        self._loop.later(again, self._sweep)
        kept = {os.path.basename(engine.run_dir) for engine in self._engines.values()}
        found: set[str] = set()
        for root in filter(os.path.isdir, self._roots):
            with contextlib.suppress(OSError):  # gone, or not readable now; the next look is soon
                found |= unused(root, kept)
        left, self._unused = found & self._unused, found
        for user in self._users.everybody() if left else ():
            self._await_child(", ".join(self._roots), lambda user=user: sweep(left, user))  # type: ignore[misc]

    # --- starting ---

    def _check_place(self, order: StartOrder) -> None:
        """Raises ValueError where there is no place for it."""
        if order.instance in self._engines:
            raise ValueError(f"{unit_of(order.instance)} is in use or has not gone yet; take another instance name")
        if len(self._engines) >= MAX_ENGINES:
            raise ValueError(f"there are {MAX_ENGINES} engines already")
        if order.run_dir and not self._is_run_dir(order.run_dir):
            roots = " or ".join(self._roots)
            raise ValueError(f"run_dir {order.run_dir} is not beneath {roots}, which the launcher's --run-root says")

    def _is_run_dir(self, path: str) -> bool:
        try:
            check_path("run_dir", path)
        except ProtocolError:
            return False
        return not self._roots or any(is_beneath(path, root) for root in self._roots)

    def _spawn(self, order: StartOrder, user: User, link: Link | None) -> Child:
        output = self._backend.logs.open(order.instance)
        child_end = link.child_end.fileno() if link else None
        try:
            return spawn(
                self._with_markers(order), user, output, die_with_us=self._backend.dies_with_us, link=child_end
            )
        except OSError:
            if link:
                link.close()
            raise
        finally:
            os.close(output)
            if link:
                link.child_end.close()

    def _with_markers(self, order: StartOrder) -> StartOrder:
        return dataclasses.replace(order, env={**order.env, **self._backend.marks})

    def _warn_of_limits(self, order: StartOrder) -> None:
        if (without := order.limits.keys() - set(self._backend.limits)) and not order.waits:
            log.warning("%s: no effect here: %s (%s)", order.instance, ", ".join(sorted(without)), self._backend.detail)

    def _on_placed(self, engine: Engine, group: Group | None, why: str) -> None:
        """The start job has ended. Later than the time limit it changes nothing: the unit is being retired."""
        if engine.phase is not Phase.PLACING:
            return None
        if group is None:  # perhaps because the process has ended, and has said why
            return self._fail(engine, (engine.child and _read_error(engine.child.errors)) or Failed(why))
        engine.group = group
        group.watch(lambda: self._on_group_change(engine))
        if engine.ending or engine.process is None:
            return self._fail(engine, Failed("the process died before it was let through its gate"))
        try:
            group.annotate(_notes_for_adoption(engine, engine.process))  # first: without them nobody finds it again
            group.annotate(engine.metadata)
        except OSError as error:
            if not self._backend.dies_with_us:  # else there is no next launcher
                return self._fail(engine, Failed(f"cannot note beside its processes what they are: {error.strerror}"))
        engine.phase = Phase.EXECUTING
        return self._open_gate(engine)

    # --- standbys ---

    def _start_from_standby(self, order: StartOrder, user: User, standby: Engine, answer: Answer) -> None:
        """Make an engine of the standby, which is a part of nothing else from here on."""
        assert standby.link and standby.process
        process, link = standby.process, standby.link
        standby.process, standby.link, standby.exit_reported, standby.end_requested = None, None, True, True
        link.ready = False
        engine = Engine(order.instance, Phase.PLACING, process, answer=answer, run_dir=order.run_dir, user=user)
        engine.metadata.update(order.metadata)
        engine.handover, engine.standby = HandOver(order, standby.instance, link), standby.instance
        self._engines[order.instance] = engine
        self._warn_of_limits(order)
        for fd in (process.fd, link.fd):
            self._loop.unwatch(fd)
        self._loop.watch(process.fd, self._guarded(engine, lambda: self._on_main_exit(engine)))
        self._loop.watch(link.fd, self._guarded(engine, lambda: self._on_handover_reply(engine)))
        engine.timer = self._loop.later(
            LIMIT, lambda: self._fail(engine, Failed(f"the standby did not take the order in {LIMIT:g} s"))
        )
        self._guarded(engine, lambda: self._prepare(engine, order, user))()

    def _prepare(self, engine: Engine, order: StartOrder, user: User) -> None:
        """Have the run directory made, then the scope."""
        placed: Placed = lambda group, why: self._guarded(engine, lambda: self._on_placed(engine, group, why))()  # noqa: E731
        try:
            child = prepare(order, user)
        except OSError as error:
            return self._fail(engine, Failed(f"cannot start a process: {error.strerror}"))

        def done() -> None:
            ending = child.ending()
            self._loop.unwatch(child.fd)
            child.close()
            if engine.phase is not Phase.PLACING or engine.process is None:
                return None
            if ending not in (None, Ending(0)):  # None: another has reaped it; then the standby will say
                return self._fail(engine, Failed("its run directory cannot be made"))
            return self._backend.place(order, engine.process, placed)

        return self._loop.watch(child.fd, self._guarded(engine, done))

    def _hand_over(self, engine: Engine, handover: HandOver) -> None:
        """The process is in the engine's scope: send it the order. What the standby leaves in its old scope ends."""
        assert engine.user
        self._release_standby(handover.standby)
        order = self._with_markers(handover.order)
        try:
            output = self._backend.logs.open(order.instance)
            try:
                handover.link.send(order, environment(order, engine.user), output)
            finally:
                os.close(output)
        except OSError as error:
            self._fail(engine, Failed(f"the order cannot be sent to the standby: {error.strerror or error}"))

    def _on_handover_reply(self, engine: Engine) -> None:
        handover = engine.handover
        if handover is None or (said := handover.link.receive()) is None:
            return None
        if said != TAKEN or engine.phase is not Phase.EXECUTING:
            return self._fail(engine, Failed(refusal(said)))
        self._end_handover(engine)
        engine.phase = Phase.RUNNING
        _forget_start(self._loop, engine)
        return _answer(engine, Started(engine.running()))

    def _end_handover(self, engine: Engine) -> None:
        assert engine.handover
        self._loop.unwatch(engine.handover.link.fd)
        engine.handover.link.close()
        engine.handover = None

    def _restart_without_standby(self, engine: Engine, handover: HandOver, why: Failed) -> None:
        """The standby was of no use: when it is gone the order is carried out without it, under the same name."""
        log.warning("%s: not made of the standby %s, but started without one: %s", engine.instance, handover.standby,
                    why.message)  # fmt: skip
        self._end_handover(engine)
        self._release_standby(handover.standby)
        if engine.answer:
            engine.successor = (without_standby(handover.order), engine.answer)
        engine.answer, engine.failure = None, why
        engine.exit_reported = engine.end_requested = True
        engine.run_dir = ""  # the successor's

    def _cancel_restart(self, engine: Engine) -> None:
        """Cancel what would follow the engine's end: a start without the standby, or an order of the same name."""
        if engine.handover:
            self._release_standby(engine.handover.standby)
            self._end_handover(engine)
        if engine.successor:
            _, answer = engine.successor
            engine.successor = None
            answer(Failed("the engine was ended before it was started"))

    def _release_standby(self, instance: str) -> None:
        """Forget a standby whose process has become an engine, or is about to be killed; its other processes end."""
        standby = self._engines.get(instance)
        if standby is None:
            return None
        standby.ending, standby.failure = Ending(), Failed("it has been used")
        if standby.group and standby.group.location():
            standby.group.kill()
            return self._end(standby)
        standby.phase = Phase.ENDING  # without a group of its own, the members are counted by their kin: the process
        return self._retire(standby)

    def _on_standby_message(self, engine: Engine) -> None:
        """Read what a standby says: ``ready``, or a reason why it cannot be used."""
        link = engine.link
        if link is None or (said := link.receive()) is None:
            return
        if said == READY and not link.ready:
            link.ready = True
            log.info("the standby %s is ready", engine.instance)
            self._waiting(engine.instance, memory_of(engine.process.pid) if engine.process else 0)
            return
        if said:
            log.warning("the standby %s cannot be used: it said %r", engine.instance, said)
        self._loop.unwatch(link.fd)
        link.ready = False
        if engine.process:
            engine.process.signal(signal.SIGKILL)

    # --- the gate ---

    def _open_gate(self, engine: Engine) -> None:
        if engine.handover:
            return self._hand_over(engine, engine.handover)
        assert engine.child
        with contextlib.suppress(BrokenPipeError):  # it died just now; its pidfd tells
            os.write(engine.child.gate, b"G")
        return None

    def _on_error_pipe(self, engine: Engine) -> None:
        """Read the error pipe.

        Text: the start failed. Its end: the command has been executed, or the child was killed.
        """
        assert engine.child
        try:
            data = os.read(engine.child.errors, 4096)
        except BlockingIOError:
            return None
        self._loop.unwatch(engine.child.errors)
        if data:
            return self._fail(engine, read_failure(data))
        if engine.phase is not Phase.EXECUTING or engine.process is None:
            return None  # killed at the gate: the pidfd tells
        engine.phase = Phase.RUNNING
        _forget_start(self._loop, engine)
        return _answer(engine, Started(engine.running()))

    def _on_start_timeout(self, engine: Engine, limit: float) -> None:
        what = "systemd did not make the scope" if engine.phase is Phase.PLACING else "the command was not executed"
        self._fail(engine, Failed(f"{what} within {limit:g} s; the process was never let go and has been killed"))

    # --- ending ---

    def _fail(self, engine: Engine, failure: Failed) -> None:
        """A start failed: everything goes at once, then the answer."""
        if engine.handover:
            self._restart_without_standby(engine, engine.handover, failure)
        engine.failure = engine.failure or failure
        if engine.process:
            engine.process.signal(signal.SIGKILL)
        if engine.group:
            engine.group.kill()
        self._end(engine)

    def _on_main_exit(self, engine: Engine, tries: int = STATUS_TRIES) -> None:
        assert engine.process
        self._loop.unwatch(engine.process.fd)
        engine.ending = engine.process.ending()
        if engine.ending is None and tries:
            self._loop.later(STATUS_WAIT, lambda: self._on_main_exit(engine, tries - 1))
            return None
        engine.ending = engine.ending or Ending()
        if engine.handover:
            self._on_handover_reply(engine)  # it may have taken the order, and have ended already
            if engine.handover:
                return self._fail(engine, Failed(refusal("")))
        if engine.group:
            engine.group.oom_killed()  # systemd removes the group soon: read it now
        if engine.phase is Phase.EXECUTING and engine.child:
            self._on_error_pipe(engine)  # its words, or the command was executed and has ended already
        elif engine.phase is Phase.PLACING and engine.child:
            engine.failure = _exit_reason(engine.child.errors, engine.ending)
        return self._end(engine)

    def _on_group_change(self, engine: Engine) -> None:
        if engine.group:
            engine.group.oom_killed()
        self._check_empty(engine)

    def _end(self, engine: Engine) -> None:
        """Begin to end the engine, or go on with it."""
        if engine.phase is not Phase.ENDING:
            engine.phase = Phase.ENDING
            _forget_start(self._loop, engine)
            grace = 0.0 if engine.failure else GRACE
            engine.timer = self._loop.later(grace, lambda: self._kill_rest(engine))
        self._check_empty(engine)

    def _kill_rest(self, engine: Engine) -> None:
        if engine.group and not engine.group.empty():
            if not engine.failure:
                log.info("%s: killing what its main process left behind", engine.instance)
            engine.group.kill()
        engine.timer = self._loop.later(KILL_LIMIT, lambda: self._retire(engine))
        self._check_empty(engine)

    def _check_empty(self, engine: Engine) -> None:
        if engine.phase is Phase.ENDING and engine.ending and (engine.group is None or engine.group.empty()):
            if engine.end_requested and not engine.answer:
                self._report_exit(engine)
            self._retire(engine)

    def _retire(self, engine: Engine) -> None:
        """Free the unit's name, once every process has exited or cannot be killed."""
        if engine.retiring:
            return
        engine.retiring = True
        _cancel(engine)
        engine.timer = self._loop.later(RETIRE_LIMIT, lambda: self._on_retired(engine))
        self._backend.retire(engine.instance, lambda: self._on_retired(engine))

    def _on_retired(self, engine: Engine) -> None:
        if self._engines.get(engine.instance) is not engine or engine.timer is None:
            return None  # told already: systemd was later than the limit
        _cancel(engine)
        if engine.end_requested or engine.answer:  # nobody reads its last lines
            return self._finish(engine, ())
        try:
            self._backend.logs.tail(engine.instance, TAIL_LINES, lambda lines: self._finish(engine, lines))
        except OSError as error:
            log.warning("%s: cannot read its log: %s", engine.instance, error)
            return self._finish(engine, ())

    def _finish(self, engine: Engine, log_tail: tuple[str, ...]) -> None:
        del self._engines[engine.instance]
        if engine.answer:
            _answer(engine, engine.failure or Failed("the engine ended before it was started"))
        else:
            self._report_exit(engine, log_tail)
        self._release(engine)
        if engine.successor:
            self.start(*engine.successor)

    def _report_exit(self, engine: Engine, log_tail: tuple[str, ...] = ()) -> None:
        """Report the engine's end to the daemon, at most once."""
        if engine.exit_reported:
            return
        engine.exit_reported = True
        ending = engine.ending or Ending()
        empty = engine.group is None or engine.group.empty()
        oom = engine.group is not None and engine.group.oom_killed()
        self._report(ExitReport(engine.instance, ending.status, ending.signal, empty, oom, log_tail))

    def _release(self, engine: Engine) -> None:
        if engine.process:
            self._loop.unwatch(engine.process.fd)
            engine.process.close()
        if engine.group:
            engine.group.close()
        if engine.link:
            self._loop.unwatch(engine.link.fd)
            engine.link.close()
        self._backend.logs.forget(engine.instance)
        if engine.run_dir and engine.user and self._is_run_dir(engine.run_dir):
            self._tidy(engine.run_dir, engine.user)

    def _tidy(self, run_dir: str, user: User) -> None:
        """Remove the run directory, which a killed engine leaves behind with its sockets."""
        later = lambda: self._loop.later(TIDY_AGAIN, lambda: self._tidy(run_dir, user))  # noqa: E731
        self._await_child(run_dir, lambda: tidy(run_dir, user), later)

    def _await_child(
        self, path: str, fork: Callable[[], Process | None], again: Callable[[], object] = lambda: None
    ) -> None:
        try:
            child = fork()
        except OSError as error:
            log.warning("cannot tidy %s: %s", path, error.strerror)
            return
        if child is None:
            return
        self._tidying += 1

        def reap() -> None:
            self._tidying -= 1
            ending = child.ending()
            if ending and ending.status == AGAIN:  # its disk is read-only, for now
                again()
            self._loop.unwatch(child.fd)
            child.close()

        self._loop.watch(child.fd, reap)


def _process_of(notes: Mapping[str, str], group: Group) -> Process | None:
    """The main process that an earlier launcher wrote down; None if it is gone, or is none of the group's."""
    try:
        process = Process(int(notes[PID]), int(notes[START]))
    except (KeyError, ValueError, OverflowError, OSError):
        return None
    cgroup = cgroup_of(process.pid)
    if cgroup is None or not f"{cgroup.path}/".startswith(f"{group.location()}/"):
        process.close()
        return None
    return process


def _notes_for_adoption(engine: Engine, process: Process) -> dict[str, str]:
    """What a launcher that adopts the engine has to know, as metadata of its control group."""
    assert engine.user
    return {PID: str(process.pid), START: str(process.start_time), RUN_DIR: engine.run_dir, USER: engine.user.name}


def _forget_start(loop: Loop, engine: Engine) -> None:
    """Close the gate and the error pipe of a start; a child that still waits at the gate exits."""
    _cancel(engine)
    if engine.child:
        loop.unwatch(engine.child.errors)
        os.close(engine.child.gate)
        os.close(engine.child.errors)
        engine.child = None


def _cancel(engine: Engine) -> None:
    if engine.timer:
        engine.timer.cancel()
        engine.timer = None


def _read_error(errors: int) -> Failed | None:
    """The failure that a child wrote into its error pipe; None if it wrote nothing."""
    with contextlib.suppress(BlockingIOError):
        if data := os.read(errors, 4096):
            return read_failure(data)
    return None


def _exit_reason(errors: int, ending: Ending) -> Failed:
    """Why a child ended before its exec: what it wrote into its error pipe, else how it ended."""
    if said := _read_error(errors):
        return said
    how = f"signal {ending.signal}" if ending.signal else f"status {ending.status}"
    return Failed(f"the process ended with {how} before the command was executed")


def _answer(engine: Engine, reply: Started | Failed) -> None:
    answer, engine.answer = engine.answer, None
    if answer:
        answer(reply)
