"""Standbys: processes with an engine's imports done, begun while the machine is calm, and given to the starts they fit.

When. A standby is begun ``CALM`` seconds after the last start or waiting request, of the kind that was started last
(``engines.standby`` says what must be equal), as long as a model that could use it is not loaded. A daemon that takes
over engines goes by what was started before it; one that finds none waits for its first start, for it may be there for
a single question only. A standby is given to one start (``claim``). Whatever goes wrong with it costs that start the
seconds that it would have saved (``launcher.handover``); a kind that has failed ``TRIES`` times in a row is not tried
again until a reload.

Memory. A standby holds host memory. That is booked with the core (``held``) but promised to no model: a standby is
ended when the machine runs short, when an engine that is about to start needs the memory, and when level-1 sleepers do.

Life. A standby ends with the daemon's connection to the launcher, whichever side ends that; an idle exit does not wait
for it.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vllmd.config.names import instance_name
from vllmd.config.types import ModelConfig
from vllmd.daemon.failure_text import how_it_ended
from vllmd.daemon.tasks import Tasks
from vllmd.engines.standby import Standby
from vllmd.errors import LauncherFailed
from vllmd.launcher.client import ExitReport, LauncherClient, StartOrder
from vllmd.place import host_memory, memory_of_machine
from vllmd.sizes import GiB, in_words

log = logging.getLogger("vllmd.standby")

CALM = 5.0  # seconds without a start or a waiting request before one is begun
LOOK = 2.0  # seconds between looks
IMPORT_LIMIT = 300.0  # seconds for its imports; a busy machine's disk may be slow
EXPECTED = GiB  # bytes that a standby is expected to hold until the launcher tells
SMALLEST_MACHINE = 16 * GiB  # bytes of memory of a machine on which ``auto`` keeps a standby
SPARE, SPARE_AUTO = GiB, 4 * GiB  # bytes that must stay available to begin a standby; below half of it one is ended
TRIES = 2  # failures in a row after which one is not tried again until the configuration is read anew
SEEK = 30.0  # seconds between looks through the models while nothing starts or ends; `engine use` may change them
MODELS = 32  # that are looked through at a time
REMEMBERED = 8  # kinds of standbys

Find = Callable[[ModelConfig], Standby | None]


def available(root: Path = Path("/")) -> int:
    """Bytes of memory that the kernel says are available; 0 if it does not say."""
    return memory_of_machine(root)[1] or 0


@dataclass
class StandbyProcess:
    """A standby process, which imports or waits. ``memory``: bytes; ``since``: by ``time.monotonic``."""

    instance: str
    standby: Standby
    since: float = field(default_factory=time.monotonic)
    ready: bool = False
    memory: int = EXPECTED


class Standbys:
    """Owns them. Nothing here waits: the work is in side tasks."""

    def __init__(
        self,
        launcher: LauncherClient | None,
        find: Find,
        held: Callable[[int], None] = lambda size: None,
        spare: Callable[[], int] = available,
        machine: Callable[[], int] = host_memory,
    ) -> None:
        """``find`` gives the kind of standby that fits a model now. ``held`` is called with the bytes of all.

        ``spare``: bytes available now. ``machine``: bytes that engines may have in all.
        """
        self._launcher, self._find, self._on_held = launcher, find, held
        self._spare, self._machine = spare, machine
        self.kept: dict[str, StandbyProcess] = {}
        self.count: int | None = 0
        self._models: Iterable[ModelConfig] = ()
        self._recent = OrderedDict[Standby, int]()  # what was started, the last one last, and its failures in a row
        self._tasks = Tasks()
        self._busy_until = self._reviewed_at = 0.0
        self._running_then: frozenset[str] | None = None  # replicas with an engine, when the models were looked through
        self._searched_at = 0.0  # when that was
        self._useful: list[Standby] = []  # what there could be, by how lately such an engine was started
        self._reported = 0

    def configure(self, count: int | None, models: Iterable[ModelConfig]) -> None:
        """Keep so many from now on (None: as many as the machine's size allows), for these models' engines."""
        self.count, self._models, self._running_then = count, models, None
        for standby in self._recent:
            self._recent[standby] = 0

    @property
    def held(self) -> int:
        """Bytes of host memory that all standbys hold."""
        return sum(one.memory for one in self.kept.values())

    @property
    def in_use(self) -> bool:
        """Whether there is one, or may be one soon: then ``look`` wants to be called."""
        return bool(self.kept or (self._recent and self.count != 0))

    # -- starts

    def remember(self, models: Sequence[ModelConfig]) -> None:
        """Take in which engines an earlier daemon, whose engines run on, has started; the last one last."""
        self._busy_until = time.monotonic() + CALM
        for model in models[-REMEMBERED:]:
            if standby := self._find(model):
                self._note_start(standby)

    def claim(self, standby: Standby | None, needs: int = 0) -> str:
        """The instance of a standby that fits, reserved for the caller; "" if there is none.

        ``needs``: bytes of host memory that the start will take; for that standbys may be ended.
        """
        self._busy_until = time.monotonic() + CALM
        chosen = None
        if standby is not None and self._launcher is not None:
            self._note_start(standby)
            chosen = next((one for one in self.kept.values() if one.ready and one.standby == standby), None)
        if chosen:
            del self.kept[chosen.instance]
            self._report_held()
        if needs:
            self.make_room(needs + SPARE // 2)
        return chosen.instance if chosen else ""

    def _note_start(self, standby: Standby) -> None:
        self._recent.setdefault(standby, 0)
        self._recent.move_to_end(standby)
        self._running_then = None
        while len(self._recent) > REMEMBERED:
            self._recent.popitem(last=False)

    def not_used(self, instance: str) -> None:
        """End a standby that was claimed and does not become an engine after all."""
        if self._launcher:
            self._tasks.spawn(self._kill(instance))

    def make_room(self, wanted: int) -> None:
        """End as many standbys as it takes until ``wanted`` bytes are available."""
        short = wanted - self._spare() if self.kept else 0
        while short > 0 and self.kept:
            one = next(iter(self.kept.values()))
            short -= one.memory
            self._give_up(one, "its memory is needed")

    def not_taken(self, standby: Standby) -> None:
        """A standby that was claimed did not become the engine: the launcher has started that without it."""
        if standby in self._recent:
            self._recent[standby] += 1

    def note_outcome(self, standby: Standby, *, good: bool) -> None:
        """An engine that was made of such a one has come up, or not."""
        if good:
            self._recent[standby] = 0
        else:
            log.warning("an engine made of a standby of %s failed; it is started anew, and no such standby is kept",
                        standby.program)  # fmt: skip
            self._recent[standby] = TRIES
            for one in [one for one in self.kept.values() if one.standby == standby]:
                self._give_up(one, "another one failed")

    # -- what the launcher tells

    def mark_ready(self, instance: str, memory: int) -> None:
        """Note that a standby has imported everything: from now on a start may claim it."""
        if one := self.kept.get(instance):
            one.ready, one.memory = True, memory or EXPECTED
            seconds = time.monotonic() - one.since
            log.info("the standby %s is ready after %.1f s, with %s", instance, seconds, in_words(one.memory))
            self._report_held()

    def ended(self, report: ExitReport) -> bool:
        """A standby has ended by itself. Returns False if the report is about another process."""
        one = self.kept.pop(report.instance, None)
        if one is None:
            return False
        if report.status is None and report.signal is None:  # the launcher has ended, and its standbys with it
            self._report_held()
            return True
        why = f"its last line: {report.log_tail[-1]}" if report.log_tail else "its log is empty"
        self._failed(one, f"{how_it_ended(report, 'the process')}; {why}")
        return True

    # -- chores

    def review(self, *, busy: bool, running: Iterable[str] = (), over: int = 0) -> None:
        """Begin or end standbys, if it is time for that. ``busy``: an engine starts, or a request waits for one.

        ``running``: the replicas that have an engine. ``over``: bytes of the standbys that models have been promised.
        """
        now = time.monotonic()
        if busy:
            self._busy_until = now + CALM
        if now < self._reviewed_at + LOOK or not self.in_use:
            return
        self._reviewed_at = now
        wanted = self._wanted(frozenset(running), now)
        for one in list(self.kept.values()):
            if one.standby not in wanted:
                self._give_up(one, "no model could use it any more")
            elif not one.ready and now > one.since + IMPORT_LIMIT:
                self._failed(one, f"it has not imported everything in {IMPORT_LIMIT:g} s")
                self._give_up(one, "it takes too long")
            else:
                wanted.remove(one.standby)
        calm = now >= self._busy_until and all(one.ready for one in self.kept.values())
        if self.kept and over > 0:
            self._give_up(next(iter(self.kept.values())), "its memory is promised to models")
        elif self.kept and self._spare() < self._reserve() // 2:
            self._give_up(next(iter(self.kept.values())), "the machine is short of memory")
        elif wanted and not busy and calm and over <= 0 and self._spare() >= EXPECTED + self._reserve():
            self._begin(wanted[0])

    def _reserve(self) -> int:
        return SPARE_AUTO if self.count is None else SPARE

    def _wanted(self, running: frozenset[str], now: float) -> list[Standby]:
        """The standbys that there should be now; several of one kind where there are fewer kinds than places."""
        count = self.count
        if count is None:
            count = 1 if self._machine() >= SMALLEST_MACHINE else 0
        if not count or self._launcher is None:
            return []
        if running != self._running_then or now > self._searched_at + SEEK:
            self._running_then, self._searched_at, self._useful = running, now, self._find_useful(running, count)
        kinds = [standby for standby in self._useful if self._recent.get(standby, TRIES) < TRIES]
        return [kinds[number % len(kinds)] for number in range(count)] if kinds else []

    def _find_useful(self, running: frozenset[str], count: int) -> list[Standby]:
        """The kinds of standbys that models without an engine could be started from; only the first ``MODELS`` are
        looked at.
        """
        lately, useful = list(reversed(self._recent)), set[Standby]()
        for model in itertools.islice((one for one in self._models if one.name not in running), MODELS):
            standby = self._find(model)
            if standby is not None and standby in self._recent:
                useful.add(standby)
            if lately[:count] == [each for each in lately if each in useful][:count]:
                break
        return [standby for standby in lately if standby in useful]

    def _begin(self, standby: Standby) -> None:
        one = StandbyProcess(instance_name(f"standby-{Path(standby.program).name}"), standby)
        self.kept[one.instance] = one
        self._report_held()
        order = StartOrder(
            one.instance,
            standby.argv(),
            standby.variables(),
            limits={"cpu_weight": 1},  # engines and requests go first
            metadata={"standby": "yes"},
            waits=True,
        )
        self._tasks.spawn(self._start(one, order))

    async def _start(self, one: StandbyProcess, order: StartOrder) -> None:
        assert self._launcher
        try:
            await self._launcher.start(order)
        except LauncherFailed as error:
            if self.kept.pop(one.instance, None):
                self._failed(one, error.message)

    def _failed(self, one: StandbyProcess, why: str) -> None:
        log.warning("%s: no standby: %s", one.instance, why)
        if one.standby in self._recent:
            self._recent[one.standby] += 1
        self._report_held()

    def _give_up(self, one: StandbyProcess, why: str) -> None:
        del self.kept[one.instance]
        log.info("the standby %s is ended: %s", one.instance, why)
        self._report_held()
        self._tasks.spawn(self._kill(one.instance))

    async def _kill(self, instance: str) -> None:
        assert self._launcher
        try:
            await self._launcher.kill(instance)
        except LauncherFailed as error:
            if not getattr(error, "answered", False):
                self._launcher.abandon(instance)

    def _report_held(self) -> None:
        if (held := self.held) != self._reported:
            self._reported = held
            self._on_held(held)
