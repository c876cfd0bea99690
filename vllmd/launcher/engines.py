"""The life of every engine, from the order to the report of its end.

    PLACING    forked, waiting at its gate; systemd is making the scope
      | the start job is `done`: metadata written, gate opened
    EXECUTING  the child executes the command
      | the error pipe is closed by the exec: answer Started
    RUNNING
      | the main process ended
    ENDING     the rest gets GRACE_SECONDS, then SIGKILL; when the group is empty the unit is
               retired and the end reported: at once if it was asked for, else with the log's tail

The problem. A process has to be in its scope before it runs a line of the engine's code: its limits must hold from the
start, and a process outside of the scope could never be ended with certainty. But systemd makes a scope around a
process that exists. So the process is forked first and waits at a gate, a pipe, until the scope is there.

The invariants:

- The gate opens only after the job's result was `done`, and after the notes for the next launcher (main process, user,
  run directory) are written on the control group, where only root writes. A launcher that dies before has started
  nothing: its end of the gate closes, and the child exits. Of a standby the main process is noted when it has taken the
  order: a launcher that dies before leaves a scope without one, which the next launcher ends.
- An order has one answer, and an engine that ran has one report of its end. A failed start is answered only after every
  process of it is gone, so that the daemon may use its memory and its name again.
- A failure or the time limit leads from PLACING and EXECUTING to ENDING, with SIGKILL at once.

An order may name a standby, a process that has the engine's modules imported already (``handover``). That process is
placed then, and takes the order instead of executing the command. If that fails, the same order begins again without
it, as the ``successor`` under the same name.

The launcher may be root, so everything that it does to an engine's files and processes is checked each time: the run
directory lies beneath one of ``roots`` and is removed by a child that runs as the engine's user (it stays if that user
is not known), and a main process found in a note counts only if it is in the engine's own group.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import errno
import logging
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from vllmd.launcher.backend import Backend, Group, Placed
from vllmd.launcher.cgroup import cgroup_of
from vllmd.launcher.handover import HANDOVER_SECONDS, READY, TAKEN, HandOver, Link, refusal
from vllmd.launcher.loop import Loop, Timer
from vllmd.launcher.process import GONE, Ending, Process, memory_of
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
GRACE_SECONDS = 0.5  # between the main process's end and SIGKILL for the processes that it left
KILL_SECONDS = 20.0  # for the kernel to end killed processes; a stuck driver can hold them
RETIRE_SECONDS = 10.0  # for systemd to forget the unit
STATUS_TRIES, STATUS_WAIT_SECONDS = 20, 0.01  # for the exit status of a process that is not our child
TIDY_RETRY_SECONDS, FIRST_SWEEP_SECONDS, SWEEP_SECONDS = 10.0, 5.0, 30.0
TAIL_LINES = 150  # of the log, in the report of an end that was not requested
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGKILL)

# The launcher's own notes beside the daemon's metadata; no key of metadata has a dot.
PID, START, RUN_DIR, USER = "launcher.pid", "launcher.start", "launcher.run_dir", "launcher.user"
Answer = Callable[[Started | Failed], None]


class Phase(enum.Enum):
    """The stage of an engine's life; the picture at the head of this file has the transitions."""

    PLACING = enum.auto()
    EXECUTING = enum.auto()
    RUNNING = enum.auto()
    ENDING = enum.auto()


@dataclass(slots=True)
class Engine:
    """The launcher's state of one engine.

    ``answer`` must be called once, when the engine runs or is gone. ``link``: set for a standby. ``handover``: set
    while a standby is becoming this engine.
    """

    instance: str
    phase: Phase
    process: Process | None
    group: Group | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    run_dir: str = ""
    user: User | None = None  # None: adopted, and its user is not known
    child: Child | None = None
    answer: Answer | None = None
    failure: Failed | None = None
    ending: Ending | None = None
    retiring: bool = False
    end_requested: bool = False
    exit_reported: bool = False  # its end has been reported; only systemd has not forgotten the unit yet
    successor: tuple[StartOrder, Answer] | None = None  # an order for the same name that waits for this one's end
    timer: Timer | None = None
    link: Link | None = None
    handover: HandOver | None = None
    standby: str = ""  # the instance of the standby that it was made of

    def running(self) -> Running:
        """The engine as a message to the daemon."""
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
    """Owns the engines. ``report`` is called once for every engine that had run and is gone.

    ``roots``: the directories beneath which run directories may lie; none: anywhere. ``waiting`` is called when a
    standby is ready, with its memory in bytes.
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
        self._unused: set[str] = set()  # run directories without an engine, at the last sweep
        self._children = 0  # those that are making or removing run directories

    def __len__(self) -> int:
        return len(self._engines)

    @property
    def busy(self) -> bool:
        """Whether an engine is still there, or a child that makes or removes a run directory."""
        return bool(self._engines or self._children)

    def has(self, instance: str) -> bool:
        """Whether the engine is starting or running, or its end is still to be reported."""
        return instance in self._engines and not self._engines[instance].exit_reported

    # --- requests ---

    def start(self, order: StartOrder, answer: Answer) -> None:
        """Start an engine. ``answer`` is called once, now or later."""
        previous = self._engines.get(order.instance)
        if previous and previous.exit_reported and not previous.successor:
            previous.successor = (order, answer)
            return None
        try:
            user = self._users.for_order(order.user)
            self._check_order(order)
            standby = self._engines.get(order.standby)
            if standby and standby.link and standby.link.ready and standby.user == user:
                return self._start_from_standby(order, user, standby, answer)
            if standby and standby.link:  # not usable for this order: the daemon will not name it again
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
        """The step of a start, which answers the order with Failed if it raises."""

        def guarded() -> None:
            try:
                step()
            except Exception as error:
                log.exception("engine %s: a step of its start failed", engine.instance)
                if engine.answer and engine.phase is not Phase.ENDING:
                    self._fail(engine, Failed(f"the launcher failed: {type(error).__name__}"))

        return guarded

    def signal(self, instance: str, number: int) -> None:
        """Send a signal to the engine's main process only. Raises KeyError if there is no such engine."""
        engine = self._engines[instance]
        # In ENDING it is systemd that asks, for a scope that it retires: that did not end the engine.
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
        self._kill_group(engine)

    def _kill_group(self, engine: Engine) -> None:
        """Send SIGKILL to every process of the engine's group; if that cannot be, log it: its end is awaited anyway."""
        try:
            if engine.group:
                engine.group.kill()
        except OSError as error:
            log.error("engine %s: its processes cannot be killed now: %s", engine.instance, error.strerror)

    def kill_all(self) -> None:
        """Send SIGKILL to every process of every engine."""
        for instance in tuple(self._engines):
            with contextlib.suppress(KeyError):  # a standby goes with the engine that is being made of it
                self.kill(instance)

    def stop_requested(self, instance: str) -> None:
        """systemd is stopping the scope, whose controller the launcher is: send SIGTERM to the main process alone."""
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
            log.warning("engine %s: metadata will not survive the launcher: %s", engine.instance, error)

    def list(self) -> list[Running]:
        """The engines that run, or whose end is still to be reported; engines that are still starting are left out."""
        return [engine.running() for engine in self._engines.values() if not engine.answer and not engine.exit_reported]

    def adopt(self) -> None:
        """Take over an earlier launcher's engines by their notes; one whose main process is gone is ended.

        Raises OSError where one cannot be looked at: a launcher that is started anew may do better than one that does
        not know its engines.
        """
        for found in self._backend.adopt():
            notes = found.group.annotations()
            engine = Engine(found.instance, Phase.RUNNING, _process_of(notes, found.group), found.group)
            engine.metadata = {key: value for key, value in notes.items() if "." not in key}
            engine.run_dir, engine.user = notes.get(RUN_DIR, ""), self._users.from_note(notes.get(USER))
            if engine.user is None:
                log.warning(
                    "%s: its user is not known, so its run directory will not be removed", unit_of(found.instance)
                )
            self._engines[found.instance] = engine
            found.group.watch(lambda engine=engine: self._on_group_change(engine))  # type: ignore[misc]
            if engine.process:
                self._loop.watch(engine.process.fd, lambda engine=engine: self._on_main_exit(engine))  # type: ignore[misc]
            else:
                engine.ending = Ending()
                self._end(engine)
            log.info("adopted %s, main process %s", unit_of(found.instance), engine.running().pid or "gone")
        self._sweep(FIRST_SWEEP_SECONDS)

    def _sweep(self, seconds_to_next: float = SWEEP_SECONDS) -> None:
        """Remove run directories that a launcher left when it died, or a disk that was read-only for a time.

        A directory without an engine may belong to one whose order is on its way, so it is removed only if it was there
        at the last sweep, too. (Its age does not tell: the wall clock may be set.)
        """
        self._loop.later(seconds_to_next, self._sweep)
        kept = {os.path.basename(engine.run_dir) for engine in self._engines.values()}
        found: set[str] = set()
        for root in filter(os.path.isdir, self._roots):
            with contextlib.suppress(OSError):  # gone, or not readable now; the next sweep is soon
                found |= unused(root, kept)
        stale, self._unused = found & self._unused, found
        for user in self._users.all() if stale else ():
            self._await_child(", ".join(self._roots), lambda user=user: sweep(stale, user))  # type: ignore[misc]

    # --- starting ---

    def _check_order(self, order: StartOrder) -> None:
        """Raises ValueError if the name is in use, there are too many engines, or the run directory is not allowed."""
        if order.instance in self._engines:
            raise ValueError(f"{unit_of(order.instance)} is still in use; take another instance name")
        if len(self._engines) >= MAX_ENGINES:
            raise ValueError(f"there are {MAX_ENGINES} engines already")
        if order.run_dir and not self._is_run_dir(order.run_dir):
            roots = " or ".join(self._roots)
            raise ValueError(f"run_dir {order.run_dir} is not beneath {roots} (the launcher's --run-root)")

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
            names = ", ".join(sorted(without))
            log.warning("engine %s: limits without effect here: %s (%s)", order.instance, names, self._backend.detail)

    def _on_placed(self, engine: Engine, group: Group | None, why: str) -> None:
        """The start job has ended: write the notes, and open the gate."""
        if engine.phase is not Phase.PLACING:
            return None  # the time limit was earlier: the unit is being retired
        if group is None:  # perhaps because the process has ended, and has written why
            return self._fail(engine, (engine.child and _read_error(engine.child.errors)) or Failed(why))
        engine.group = group
        group.watch(lambda: self._on_group_change(engine))
        if engine.ending or engine.process is None:
            return self._fail(engine, Failed("the process ended while its scope was made"))
        assert engine.user
        # The launcher's notes first: without them no next launcher finds the engine.
        notes = {RUN_DIR: engine.run_dir, USER: engine.user.name, **engine.metadata}
        if not self._note(engine, notes if engine.handover else {**_main_process(engine.process), **notes}):
            return None
        engine.phase = Phase.EXECUTING
        if engine.handover:
            return self._hand_over(engine, engine.handover)
        assert engine.child
        with contextlib.suppress(BrokenPipeError):  # the child has just ended; its pidfd reports that
            os.write(engine.child.gate, b"G")
        return None

    def _note(self, engine: Engine, notes: Mapping[str, str]) -> bool:
        """Write notes on the engine's cgroup. If that fails, so does the start."""
        assert engine.group
        try:
            engine.group.annotate(notes)
        except OSError as error:
            if not self._backend.dies_with_us:  # else there is no next launcher
                self._fail(engine, Failed(f"cannot write the engine's notes on its cgroup: {error.strerror}"))
                return False
        return True

    # --- standbys ---

    def _start_from_standby(self, order: StartOrder, user: User, standby: Engine, answer: Answer) -> None:
        """Make an engine of the standby's process. Of the standby only its scope is left, until ``_hand_over``."""
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
            HANDOVER_SECONDS,
            lambda: self._fail(engine, Failed(f"the standby did not take the order in {HANDOVER_SECONDS:g} s")),
        )
        self._guarded(engine, lambda: self._prepare(engine, order, user))()

    def _prepare(self, engine: Engine, order: StartOrder, user: User) -> None:
        """Make the run directory, by a child that runs as the engine's user, then the scope."""
        placed: Placed = lambda group, why: self._guarded(engine, lambda: self._on_placed(engine, group, why))()  # noqa: E731
        try:
            child = prepare(order, user)
        except OSError as error:
            return self._fail(engine, Failed(f"cannot start a process: {error.strerror}"))
        self._children += 1

        def done() -> None:
            self._children -= 1
            ending = child.ending()
            self._loop.unwatch(child.fd)
            child.close()
            if engine.phase is not Phase.PLACING or engine.process is None:
                if order.run_dir and order.instance not in self._engines:  # made after that engine's end had removed it
                    self._tidy(order.run_dir, user)
                return None
            if ending not in (None, Ending(0)):  # None: it was reaped elsewhere; then the standby fails, if it failed
                return self._fail(engine, Failed(f"the run directory {order.run_dir} cannot be made"))
            return self._backend.place(order, engine.process, placed)

        return self._loop.watch(child.fd, self._guarded(engine, done))

    def _hand_over(self, engine: Engine, handover: HandOver) -> None:
        """The process is in the engine's scope: send it the order, and end the standby's old scope."""
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
        if handover is None or (word := handover.link.receive()) is None:
            return None
        if word != TAKEN or engine.phase is not Phase.EXECUTING:
            return self._fail(engine, Failed(refusal(word)))
        # Only now: a next launcher that finds a scope without a main process in its notes ends what is in it. A standby
        # that has not taken the order is no engine, and might wait for ever.
        if engine.process is None or not self._note(engine, _main_process(engine.process)):
            return None
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
        """The hand-over failed: once the process is gone, start the engine without a standby, under the same name."""
        log.warning(
            "engine %s: the standby %s could not be used, so it is started without one: %s",
            engine.instance,
            handover.standby,
            why.message,
        )
        self._end_handover(engine)
        self._release_standby(handover.standby)
        if engine.answer:
            engine.successor = (dataclasses.replace(handover.order, standby=""), engine.answer)
        engine.answer, engine.failure = None, why
        engine.exit_reported = engine.end_requested = True
        engine.run_dir = ""  # it is the successor's: this engine's end must not remove it

    def _cancel_restart(self, engine: Engine) -> None:
        """Cancel the start that would follow the engine's end: without its standby, or of a successor."""
        if engine.handover:
            self._release_standby(engine.handover.standby)
            self._end_handover(engine)
        if engine.successor:
            _, answer = engine.successor
            engine.successor = None
            answer(Failed("the engine was ended before it was started"))

    def _release_standby(self, instance: str) -> None:
        """End a standby whose main process has become an engine or is about to be killed, with its other processes."""
        standby = self._engines.get(instance)
        if standby is None:
            return None
        standby.ending, standby.failure = Ending(), Failed("it has been used")
        if standby.group and standby.group.location():
            self._kill_group(standby)
            return self._end(standby)
        # Without a cgroup, a standby's processes are the descendants of its main process, which is the engine's now.
        standby.phase = Phase.ENDING
        return self._retire(standby)

    def _on_standby_message(self, engine: Engine) -> None:
        """Read a standby's word: ``ready``, or a reason why it cannot be used, or "" at its end."""
        link = engine.link
        if link is None or (word := link.receive()) is None:
            return
        if word == READY and not link.ready:
            link.ready = True
            log.info("the standby %s is ready", engine.instance)
            self._waiting(engine.instance, memory_of(engine.process.pid) if engine.process else 0)
            return
        if word:
            log.warning("the standby %s cannot be used: it said %r", engine.instance, word)
        self._loop.unwatch(link.fd)
        link.ready = False
        if engine.process:
            engine.process.signal(signal.SIGKILL)

    # --- the gate ---

    def _on_error_pipe(self, engine: Engine) -> None:
        """Read the error pipe. Text: the start failed. Its end: the command was executed, or the child was killed."""
        assert engine.child
        try:
            data = os.read(engine.child.errors, 4096)
        except BlockingIOError:
            return None
        self._loop.unwatch(engine.child.errors)
        if data:
            return self._fail(engine, read_failure(data))
        if engine.phase is not Phase.EXECUTING or engine.process is None:
            return None  # killed at the gate: the pidfd reports that
        engine.phase = Phase.RUNNING
        _forget_start(self._loop, engine)
        return _answer(engine, Started(engine.running()))

    def _on_start_timeout(self, engine: Engine, limit: float) -> None:
        late = "systemd did not make the scope" if engine.phase is Phase.PLACING else "the command was not executed"
        self._fail(engine, Failed(f"{late} within {limit:g} s; the process has been killed"))

    # --- ending ---

    def _fail(self, engine: Engine, failure: Failed) -> None:
        """A start failed: kill every process of it; the answer follows when they are gone."""
        if engine.handover:
            self._restart_without_standby(engine, engine.handover, failure)
        engine.failure = engine.failure or failure
        if engine.process:
            engine.process.signal(signal.SIGKILL)
        self._kill_group(engine)
        self._end(engine)

    def _on_main_exit(self, engine: Engine, tries: int = STATUS_TRIES) -> None:
        assert engine.process
        self._loop.unwatch(engine.process.fd)
        engine.ending = engine.process.ending()
        if engine.ending is None and tries:
            # Not our child, so its status is its parent's to read; in a moment it may be there.
            self._loop.later(STATUS_WAIT_SECONDS, lambda: self._on_main_exit(engine, tries - 1))
            return None
        engine.ending = engine.ending or Ending()
        if engine.handover:
            self._on_handover_reply(engine)  # it may have taken the order before it ended
            if engine.handover:
                return self._fail(engine, Failed(refusal("")))
        if engine.group:
            engine.group.oom_killed()  # remembered there: systemd removes the cgroup soon
        if engine.phase is Phase.EXECUTING and engine.child:
            self._on_error_pipe(engine)  # an error, or the command was executed and has ended already
        elif engine.phase is Phase.PLACING and engine.child:
            engine.failure = _exit_reason(engine.child.errors, engine.ending)
        return self._end(engine)

    def _on_group_change(self, engine: Engine) -> None:
        if engine.group:
            engine.group.oom_killed()
        self._check_empty(engine)

    def _end(self, engine: Engine) -> None:
        """Go to ENDING, if the engine is not there yet; the rest happens when its last process is gone."""
        if engine.phase is not Phase.ENDING:
            engine.phase = Phase.ENDING
            _forget_start(self._loop, engine)
            grace = 0.0 if engine.failure else GRACE_SECONDS
            engine.timer = self._loop.later(grace, lambda: self._kill_rest(engine))
        self._check_empty(engine)

    def _kill_rest(self, engine: Engine) -> None:
        if engine.group and not engine.group.empty():
            if not engine.failure:
                log.info("engine %s: killing the processes that its main process left", engine.instance)
            self._kill_group(engine)
        engine.timer = self._loop.later(KILL_SECONDS, lambda: self._retire(engine))
        self._check_empty(engine)

    def _check_empty(self, engine: Engine) -> None:
        if engine.phase is Phase.ENDING and engine.ending and (engine.group is None or engine.group.empty()):
            if engine.end_requested and not engine.answer:
                self._report_exit(engine)
            self._retire(engine)

    def _retire(self, engine: Engine) -> None:
        """Have systemd forget the unit, once every process has exited or cannot be killed."""
        if engine.retiring:
            return
        engine.retiring = True
        _cancel(engine)
        engine.timer = self._loop.later(RETIRE_SECONDS, lambda: self._on_retired(engine))
        self._backend.retire(engine.instance, lambda: self._on_retired(engine))

    def _on_retired(self, engine: Engine) -> None:
        if self._engines.get(engine.instance) is not engine or engine.timer is None:
            return None  # it was retired by the time limit, and systemd is late
        _cancel(engine)
        if engine.end_requested or engine.answer:  # its last lines would explain nothing
            return self._finish(engine, ())
        try:
            self._backend.logs.tail(engine.instance, TAIL_LINES, lambda lines: self._finish(engine, lines))
        except OSError as error:
            log.warning("engine %s: cannot read its log: %s", engine.instance, error)
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
        """Remove the run directory, with the sockets that a killed engine leaves in it."""
        retry = lambda: self._loop.later(TIDY_RETRY_SECONDS, lambda: self._tidy(run_dir, user))  # noqa: E731
        self._await_child(run_dir, lambda: tidy(run_dir, user), retry)

    def _await_child(
        self, path: str, fork: Callable[[], Process | None], retry: Callable[[], object] = lambda: None
    ) -> None:
        try:
            child = fork()
        except OSError as error:
            log.warning("cannot remove the run directory %s: %s", path, error.strerror)
            return
        if child is None:
            return
        self._children += 1

        def reap() -> None:
            self._children -= 1
            ending = child.ending()
            if ending and ending.status == AGAIN:  # its disk is read-only now
                retry()
            self._loop.unwatch(child.fd)
            child.close()

        self._loop.watch(child.fd, reap)


def _main_process(process: Process) -> dict[str, str]:
    """The notes by which the next launcher finds an engine's main process."""
    return {PID: str(process.pid), START: str(process.start_time)}


def _process_of(notes: Mapping[str, str], group: Group) -> Process | None:
    """The main process in an earlier launcher's notes; None if it is gone, or not in the engine's group.

    Raises OSError where that cannot be known, for want of a file descriptor, say: that is not its end.
    """
    try:
        process = Process(int(notes[PID]), int(notes[START]))
    except (KeyError, ValueError, OverflowError, ProcessLookupError):
        return None
    except OSError as error:
        if error.errno in GONE or error.errno == errno.EINVAL:  # the number is a thread's now
            return None
        raise
    try:
        cgroup = cgroup_of(process.pid)
    except OSError:
        process.close()
        raise
    if cgroup is None or not f"{cgroup.path}/".startswith(f"{group.location()}/"):
        process.close()
        return None
    return process


def _forget_start(loop: Loop, engine: Engine) -> None:
    """Close the gate and the error pipe of a start; a child that still waits at the gate then exits."""
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
    """Why a child ended before its exec: the error that it wrote into its pipe, else how it ended."""
    if failure := _read_error(errors):
        return failure
    how = f"signal {ending.signal}" if ending.signal else f"status {ending.status}"
    return Failed(f"the process ended with {how} before the command was executed")


def _answer(engine: Engine, reply: Started | Failed) -> None:
    answer, engine.answer = engine.answer, None
    if answer:
        answer(reply)
