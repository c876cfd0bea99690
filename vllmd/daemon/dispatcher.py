"""Events go to the core, its commands to the parts that execute them.

``post`` may be called from anywhere in the event loop, also while another event
is being handled: events are taken one after the other, and executing a command
never waits. Slow work is a task whose result is posted as an event.

Whoever needs to know what becomes of an event does not look at the core's state
before or after, but asks: the core's ``Answer`` comes before what follows from it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from vllmd.core import commands, events
from vllmd.core.scheduler import Scheduler
from vllmd.core.types import Decision
from vllmd.daemon.admission_gate import AdmissionGate
from vllmd.daemon.engine_manager import EngineManager
from vllmd.daemon.read_ahead import ReadAhead
from vllmd.errors import InternalError
from vllmd.systemd.throttle import Throttle

log = logging.getLogger("vllmd")

DECISIONS = 300  # of a kind that are logged per minute
FAILURES = ("fail", "crash")  # what nobody decided: journalctl -p err finds them in the morning
FAILED = "vllmd could not do it; its log says why"


def _ignore_decision(decision: Decision, now: float) -> None:
    """Ignore a decision: the default, where nothing records them."""


def _refusal(event: events.Event) -> list[commands.Command]:
    """The commands that refuse an event's sender because the scheduler failed at it."""
    if isinstance(event, events.RequestArrived):
        return [commands.Reject(event.request, commands.RejectReason.DEFECT, FAILED)]
    return [commands.Answer(getattr(event, "ask", ""), refused=FAILED, error=commands.RejectReason.DEFECT)]


def executors(
    engine_manager: EngineManager,
    admission_gate: AdmissionGate,
    add_replica: Callable[[commands.AddReplica], None],
    read_ahead: ReadAhead,
) -> dict[type, Callable[[Any], None]]:
    """The function that executes each command, by the command's class."""

    def start(command: commands.StartEngine) -> None:
        read_ahead.starting(command)
        engine_manager.start(command)

    def wake(command: commands.WakeEngine) -> None:
        read_ahead.starting(command)
        engine_manager.wake(command)

    return {
        commands.StartEngine: start,
        commands.WakeEngine: wake,
        commands.ReadAhead: read_ahead.begin,
        commands.StopReadAhead: read_ahead.stop,
        commands.SleepEngine: engine_manager.sleep,
        commands.StopEngine: engine_manager.stop,
        commands.ProveFreeze: engine_manager.prove_freeze,
        commands.ProbeReplica: engine_manager.probe,
        commands.RenameReplica: engine_manager.rename,
        commands.AddReplica: add_replica,
        commands.Admit: admission_gate.admit,
        commands.Reject: admission_gate.reject,
        commands.CutRequest: admission_gate.cut,
    }


class Dispatcher:
    """Owns the scheduler: only the dispatcher hands it events; others may ask it for views."""

    def __init__(
        self,
        scheduler: Scheduler,
        execute: Mapping[type, Callable[[Any], None]],
        decided: Callable[[Decision, float], None] = _ignore_decision,
        changed: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``execute``: who carries out which kind of command (``executors``).

        ``decided`` is told of each decision, with the core's clock; ``changed`` is called after each event.
        """
        self._scheduler = scheduler
        own: dict[type, Callable[[Any], None]] = {commands.Record: self._record, commands.Answer: self._answer}
        self._execute = {**execute, **own}
        self._asked: dict[str, Callable[[commands.Answer], None]] = {}
        self._numbers = itertools.count(1)
        self._decided = decided
        self._changed = changed
        self._clock = clock  # the loop's own may stand still for a turn (``event_loop``)
        self._inbox: deque[events.Event] = deque()
        self._handling = False
        self._failed: events.Event | None = None  # the last one that the scheduler failed at
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = math.inf  # when it does: when the core wants to hear that time has passed, or earlier
        self._loop = asyncio.get_running_loop()
        self._throttles: dict[str, Throttle] = {}  # of the log, by kind of decision

    @property
    def scheduler(self) -> Scheduler:
        """For snapshots; events go through ``post``."""
        return self._scheduler

    def now(self) -> float:
        """The core's clock, in seconds."""
        return self._clock()

    def post(self, event: events.Event) -> None:
        """Take an event in; returns after its commands, and those of all it led to, were begun."""
        self._inbox.append(event)
        if self._handling:
            return
        self._handling = True
        try:
            # 1. The event, and the events that carrying out its commands led to.
            while self._inbox:
                event = self._inbox.popleft()
                try:
                    decided = self._scheduler.handle(event, self._clock())
                except Exception:  # a defect: say so, and keep serving everybody else
                    log.exception("the scheduler could not handle %s", event)
                    self._failed, decided = event, _refusal(event)
                for command in decided:
                    try:
                        self._execute[type(command)](command)
                    except Exception:
                        log.exception("could not carry out %s", command)
        finally:
            self._handling = False
        # 2. The timer. It is moved only when it would come too late: a request puts off what is due, and whoever comes
        #    too early looks again.
        if self._scheduler.wants_time_before(self._timer_due):
            self._set_timer()
        # 3. Those that follow what changes (``vllmctl watch``, the progress of a load).
        self._changed()

    def perform(self, event: events.Event) -> None:
        """Take an operator's event in, as ``post`` does. Raises InternalError if the scheduler fails at it.

        Not for events that carrying out a command leads to: those are taken in later.
        """
        self.post(event)
        if self._failed is event:
            raise InternalError(FAILED)

    def ask(self, event: events.Asking, answered: Callable[[commands.Answer], None]) -> None:
        """Take an event in, as ``post`` does. ``answered`` is called once, before what follows from it begins.

        What ``answered`` raises before this returns is raised here.
        """
        name, raised, asking = str(next(self._numbers)), list[Exception](), True

        def hear(answer: commands.Answer) -> None:
            try:
                answered(answer)
            except Exception as error:
                if not asking:
                    raise
                raised.append(error)

        self._asked[name] = hear
        self.post(replace(event, ask=name))
        asking = False
        if raised:
            raise raised[0]

    def _answer(self, command: commands.Answer) -> None:
        answered = self._asked.pop(command.ask, None)
        if answered:
            answered(command)

    def _set_timer(self) -> None:
        """Have ``_on_timer`` called when the core wants to hear that time has passed."""
        due = self._scheduler.next_timer()
        if due is None or due >= self._timer_due:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_due = self._loop.call_later(max(0.0, due - self.now()), self._on_timer), due

    def _on_timer(self) -> None:
        self._timer, self._timer_due = None, math.inf
        due = self._scheduler.next_timer()
        if due is not None and due <= self.now():
            self.post(events.TimePassed())
        else:
            self._set_timer()

    def _record(self, command: commands.Record) -> None:
        decision = command.decision
        numbers = {f"VLLMD_{key.upper()}": value for key, value in decision.numbers.items()}
        replica = {"VLLMD_REPLICA": decision.replica} if decision.replica else {}
        fields = {"MODEL": decision.model, "DECISION": decision.what, **replica, **numbers}
        about = decision.replica or decision.model or "vllmd"  # of no model's: a device is drained, say
        # Clients lead to many of them, refused requests above all: each kind has a rate of its own.
        throttle = self._throttles.setdefault(decision.what, Throttle(log, burst=DECISIONS, clock=self._clock))
        level = logging.ERROR if decision.what in FAILURES else logging.INFO
        throttle.say(level, "%s: %s: %s", about, decision.what, decision.why, fields=fields)
        self._decided(decision, self._clock())

    def flush_log(self) -> None:
        """Say how many decisions were not logged, if none came since that would have said so."""
        for throttle in self._throttles.values():
            throttle.flush()

    def close(self) -> None:
        """Cancel the timer: the core hears nothing more."""
        if self._timer:
            self._timer.cancel()
