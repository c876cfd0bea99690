"""Hands events to the core, and the core's commands to the parts that execute them.

``post`` may be called from anywhere in the event loop, also while another event is being handled: events are taken one
after the other, and executing a command never waits. Slow work is a task whose result is posted as an event.

To learn what becomes of an event, do not compare the core's state before and after: other events may have been handled
between. Use ``ask``: the core's ``Answer`` to an event comes before anything that follows from the event.

A defect in the core costs the one event at which the core failed; its sender is refused, everything else is served on.
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

DECISIONS = 300  # decisions of one kind that are logged per minute
FAILURES = ("fail", "crash")  # decisions that are logged as errors, for journalctl -p err
FAILED = "vllmd could not do it; its log says why"


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
    """Owns the scheduler: only the dispatcher hands events to it; others may ask it for views."""

    def __init__(
        self,
        scheduler: Scheduler,
        execute: Mapping[type, Callable[[Any], None]],
        decided: Callable[[Decision, float], None] = lambda decision, now: None,
        changed: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``execute``: the function that executes each command, by the command's class (``executors``).

        ``decided`` is called with each decision and the core's clock; ``changed`` after each event.
        """
        self._scheduler = scheduler
        own: dict[type, Callable[[Any], None]] = {commands.Record: self._record, commands.Answer: self._answer}
        self._execute = {**execute, **own}
        self._waiting: dict[str, Callable[[commands.Answer], None]] = {}  # for answers of the core
        self._numbers = itertools.count(1)
        self._decided = decided
        self._changed = changed
        self._clock = clock  # not the loop's, which may stand still for a turn (``event_loop``)
        self._inbox: deque[events.Event] = deque()
        self._handling = False
        self._failed: events.Event | None = None  # the last event at which the scheduler failed
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = math.inf  # when the timer fires: not later than the core wants to hear that time has passed
        self._time_is_held = False
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
        """Handle an event. Returns when its commands, and those of the events that these led to, have been begun."""
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
                except Exception:  # a defect: log it, and keep serving everything else
                    log.exception("the scheduler could not handle %s", event)
                    self._failed, decided = event, _refusal(event)
                for command in decided:
                    try:
                        self._execute[type(command)](command)
                    except Exception:
                        log.exception("could not carry out %s", command)
        finally:
            self._handling = False
        # 2. The timer. It is moved only if it would come too late: most events put off what is due, and moving it each
        #    time would cost more than a timer that comes too early and is set again.
        if self._scheduler.wants_time_before(self._timer_due):
            self._set_timer()
        # 3. What follows changes: ``vllmctl watch``, the progress of a load.
        self._changed()

    def admit_at_once(self, request: str, model: str) -> str | None:
        """The replica that has the request from now on, where nothing else is under way; None: post its arrival."""
        if self._handling:  # events are taken one after the other
            return None
        try:
            replica = self._scheduler.admit_at_once(request, model, self._clock())
        except Exception:  # a defect, as in ``post``
            log.exception("the scheduler could not admit request %s to %s at once", request, model)
            return None
        if replica is not None:
            self._changed()
        return replica

    def finish_at_once(self, request: str) -> bool:
        """Tell the core that a request has ended well, where nothing else follows from it; False: post its end."""
        if self._handling:
            return False
        try:
            is_noted = self._scheduler.finish_at_once(request, self._clock())
        except Exception:  # a defect, as in ``post``
            log.exception("the scheduler could not note the end of request %s at once", request)
            return False
        if not is_noted:
            return False
        if self._scheduler.wants_time_before(self._timer_due):
            self._set_timer()
        self._changed()
        return True

    def perform(self, event: events.Event) -> None:
        """Handle an operator's event, as ``post`` does. Raises InternalError if the scheduler fails at the event.

        Not to be called while a command is being executed: the event would be handled only later.
        """
        self.post(event)
        if self._failed is event:
            raise InternalError(FAILED)

    def ask(self, event: events.Asking, answered: Callable[[commands.Answer], None]) -> None:
        """Handle an event, as ``post`` does. ``answered`` is called once, before what follows from the event begins.

        What ``answered`` raises before ``ask`` returns is raised here.
        """
        name, raised, asking = str(next(self._numbers)), list[Exception](), True

        def on_answer(answer: commands.Answer) -> None:
            try:
                answered(answer)
            except Exception as error:
                if not asking:
                    raise
                raised.append(error)

        self._waiting[name] = on_answer
        self.post(replace(event, ask=name))
        asking = False
        if raised:
            raise raised[0]

    def _answer(self, command: commands.Answer) -> None:
        on_answer = self._waiting.pop(command.ask, None)
        if on_answer:
            on_answer(command)

    def hold_time(self) -> None:
        """Do not tell the core that time has passed, by which models are preloaded, until ``let_time_pass``."""
        self._time_is_held = True

    def let_time_pass(self) -> None:
        """Tell the core of time again."""
        self._time_is_held = False
        self._set_timer()

    def _set_timer(self) -> None:
        """Have ``_on_timer`` called when the core wants to hear that time has passed."""
        due = self._scheduler.next_timer()
        if due is None or due >= self._timer_due or self._time_is_held:
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
        about = decision.replica or decision.model or "vllmd"  # a device is drained, say
        # Clients cause many decisions, above all refusals: each kind is throttled apart, so that none hides another.
        throttle = self._throttles.setdefault(decision.what, Throttle(log, burst=DECISIONS, clock=self._clock))
        level = logging.ERROR if decision.what in FAILURES else logging.INFO
        throttle.say(level, "%s: %s: %s", about, decision.what, decision.why, fields=fields)
        self._decided(decision, self._clock())

    def flush_log(self) -> None:
        """Log how many decisions were not logged, where no later decision of their kind has led to that."""
        for throttle in self._throttles.values():
            throttle.flush()

    def close(self) -> None:
        """Cancel the timer, so that the core gets no more events of it."""
        if self._timer:
            self._timer.cancel()
