"""Replicas: several engines of one model that share its requests (8 in ``design.md``).

``group`` says who is to have a request; here is what their answers earn them, who
is probed, and how many are brought up.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

from vllmd.core.common import Core
from vllmd.core.events import ProbeAsked, ReplicaProbed, ServerSilent
from vllmd.core.group import ENOUGH, QUICK, Group
from vllmd.core.model import INFINITY, Latency, Leave, Model, Replica, Run, Standing
from vllmd.core.planner import RECENT, Planner
from vllmd.core.types import State

LEAST = 0.0005  # seconds; nothing takes no time
NEWEST = 0.2  # weight of the newest answer in a replica's latency
PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds until one that was set aside or ejected is probed; doubles each time
QUICKEST_PROBE = 0.5  # seconds that every probe may take
LONGEST_PROBE = 120.0
NO_NUMBERS: Mapping[str, float] = {}
AGAIN = 5.0  # seconds between two looks for room for another replica


class Replicas:
    """All groups. A model without siblings is in none, and nothing here applies to it."""

    def __init__(self, core: Core, planner: Planner) -> None:
        self._core = core
        self._planner = planner
        self._probes: dict[str, Model] = {}
        self._numbers = itertools.count(1)

    @property
    def due(self) -> float:
        """When time alone changes something for one of them."""
        groups = self._core.groups
        return min([group.due for group in groups.values()]) if groups else INFINITY

    # -- who belongs together

    def regroup(self, names: Iterable[str]) -> None:
        """``names``: the models as configured now, in order. What is known of groups and replicas that stay is kept."""
        core, was = self._core, self._core.groups
        core.groups = {}
        for m in core.models.values():
            m.replica = (m.replica or Replica()) if m.spec.replica_of and not m.removed else None
        for m in (core.models[name] for name in names):
            if m.replica:
                name = m.spec.replica_of
                if name not in core.groups:
                    core.groups[name] = was.get(name) or Group(name)
                    core.groups[name].members = []
                core.groups[name].members.append(m)
        core.unkept = dict(core.groups)

    # -- what is heard of them (8.2)

    def answered(self, m: Model, request: str, streamed: bool) -> None:
        """The first byte of an answer came."""
        r = m.replica
        began = r.unanswered.pop(request, None) if r else None
        group = self._core.group_of(m)
        if r is None or group is None or began is None:
            return
        took, r.seen = max(LEAST, self._core.now - began), self._core.now
        if streamed in r.latencies:
            r.latencies[streamed].learn(took, NEWEST)
        else:
            r.latencies[streamed] = Latency(took)
        if r.standing is Standing.SERVING:
            self._judge(group, m, r, took, group.fastest(streamed, but=m), r.latencies[streamed].value)
        self._core.touch(m)

    def _judge(self, group: Group, m: Model, r: Replica, took: float, fastest: float | None, latency: float) -> None:
        """Too late too often beside the fastest of the others: it is set aside."""
        bound = INFINITY if fastest is None else max(QUICK, group.rules.growth * fastest)
        if took <= bound or latency <= bound:
            r.late, r.timely = 0, r.timely + 1
            r.rounds = 0 if r.timely >= ENOUGH else r.rounds
            return
        r.late, r.timely = r.late + 1, 0
        if r.late >= ENOUGH and fastest is not None:
            numbers = {"latency": round(latency, 3), "fastest": round(fastest, 3), "bound": round(bound, 3)}
            why = f"its answers begin after {latency:.2f} s, those of the fastest after {fastest:.2f} s"
            self._set_aside(m, r, Standing.SLOW, why, numbers)

    def ended(self, m: Model, request: str, failed: str) -> None:
        """A request is over; ``failed``: why its replica gave no answer."""
        r = m.replica
        if r is None:
            return
        r.unanswered.pop(request, None)
        if failed and m.on and r.standing in (Standing.SERVING, Standing.SLOW):
            self._set_aside(m, r, Standing.EJECTED, failed)
            self._core.touch(m)

    def silent(self, e: ServerSilent) -> None:
        """It gets nothing more until it has answered a probe."""
        m = self._core.model(e.model)
        if m.replica and m.state is State.READY and m.replica.standing is not Standing.EJECTED:
            self._set_aside(m, m.replica, Standing.EJECTED, e.reason)
            self._core.touch(m)

    def asked(self, e: ProbeAsked) -> None:
        """An operator's probe runs in it as any request does, so that nobody puts it to sleep meanwhile."""
        m = self._core.model(e.model)
        if m.state is State.READY:
            m.running[e.request] = Run(self._core.now)
            self._probes[e.request] = m
            self._core.touch(m)

    def probed(self, e: ReplicaProbed) -> None:
        """A probe came back, or did not."""
        m = self._probes.pop(e.request, None)
        if m is None:
            return
        m.running.pop(e.request, None)
        m.orphans.discard(e.request)
        self._core.news(m)
        r, group = m.replica, self._core.group_of(m)
        if r is None or group is None or r.probe != e.request:
            return
        r.probe = ""
        if e.seconds is not None:
            self._probe_passed(m, r, e.seconds)
        elif r.standing is Standing.SERVING and r.seen > r.asked:
            r.vouched = self._core.now + self._suspicion(m, r)  # others were answered meanwhile: it is only busy
        else:
            self._probe_failed(m, r, e.reason)

    def _probe_passed(self, m: Model, r: Replica, seconds: float) -> None:
        r.failed = 0
        r.took, r.vouched = seconds, self._core.now + self._suspicion(m, r)
        if r.standing is Standing.SERVING:
            return  # only a suspicion, and it was wrong
        r.standing, r.late, r.look_at, r.why = Standing.SERVING, 0, INFINITY, ""
        self._core.fleet.record("serve", m.name, f"it answered a probe in {seconds:.3f} s", {"seconds": seconds})

    def _probe_failed(self, m: Model, r: Replica, why: str) -> None:
        if m.state is not State.READY:
            return
        r.failed += 1
        self._set_aside(m, r, Standing.EJECTED, f"it failed a probe: {why}")
        self._core.fleet.cut(m, "its replica does not answer", list(r.unanswered))
        if r.failed > m.spec.replicas.retries and m.spec.device_count and len(m.running) == len(r.unanswered):
            self._core.leave(m, Leave(0, "replica", f"its engine hangs: {r.failed} probes in a row failed", kill=True))

    def _set_aside(
        self, m: Model, r: Replica, to: Standing, why: str, numbers: Mapping[str, float] = NO_NUMBERS
    ) -> None:
        r.rounds += 1
        pause = min(LONGEST_PAUSE, PAUSE * 2.0 ** (r.rounds - 1))
        r.standing, r.why, r.late, r.timely, r.look_at = to, why, 0, 0, self._core.now + pause
        what = "set aside" if to is Standing.SLOW else "eject"
        self._core.fleet.record(what, m.name, why, {**numbers, "pause": pause, "rounds": r.rounds})

    def halt(self, m: Model) -> None:
        """An operator took it down: it stays down while others serve. With the last of them all are free again."""
        group = self._core.group_of(m)
        if group is None or m.replica is None:
            return
        m.replica.halted = True
        if all(other.replica.halted for other in group.members if other.replica):
            group.used = -INFINITY  # and none comes up before somebody asks
            for other in group.members:
                self.resume(other)

    def resume(self, m: Model) -> None:
        """It may come up again."""
        if m.replica:
            m.replica.halted = False

    def share_age(self, m: Model) -> None:
        """A replica that is wanted is unused since the model's last use, whichever of them had it."""
        group = self._core.group_of(m)
        if group and m not in group.resting():
            busy = any(other.running for other in group.members)
            m.idle_since = max(m.idle_since, self._core.now if busy else group.used)

    # -- what follows (8.3 to 8.5)

    def upkeep(self) -> bool:
        """Probe who has to show himself, bring up as many as are wanted. Whether there was a group to look at."""
        core = self._core
        if not core.groups and not core.unkept:
            return False  # asked after every event
        groups = {**core.unkept, **{g.name: g for g in core.groups.values() if g.due <= core.now}}
        core.unkept.clear()
        for group in groups.values():
            for m in group.members:
                self._look_at(group, m)
            self._scale(group)
            self._bring_up(group)
            group.due = self._due(group)
        return bool(groups)

    def _look_at(self, group: Group, m: Model) -> None:
        """8.3: who came up, whose time apart is over, or who leaves requests without an answer is probed."""
        r = m.replica
        if r is None or r.probe or m.state is not State.READY:
            return
        if r.standing is Standing.NEW and not group.rules.probe:
            r.standing = Standing.SERVING
            self._core.news(m)
        elif r.standing is Standing.NEW or min(r.look_at, self._suspicious_at(m, r)) <= self._core.now:
            self._probe(group, m, r)

    def _probe(self, group: Group, m: Model, r: Replica) -> None:
        """May take ``growth`` times as long as the fastest's did, and as much longer with each attempt in a row.

        Where no other serves there is nobody to be slower than, and one that is only suspected is to show that it
        lives: both have ``probe_limit``.
        """
        if not group.rules.probe and r.standing is not Standing.SERVING:
            self._probe_passed(m, r, r.took or 0.0)  # its time apart is all that there is to judge by
            self._core.news(m)
            return
        fastest = group.quickest(but=m) if r.standing is not Standing.SERVING else None
        limit = group.rules.probe_limit if fastest is None else max(QUICKEST_PROBE, group.rules.growth * fastest)
        r.probe, r.asked = f"probe-{next(self._numbers)}", self._core.now
        self._probes[r.probe] = m
        self._core.touch(m)
        self._core.fleet.probe(m, r.probe, min(LONGEST_PROBE, limit * group.rules.growth ** min(r.failed, 10)))

    def _suspicion(self, m: Model, r: Replica) -> float:
        """Seconds without an answer that are suspicious."""
        rules = m.spec.replicas
        return max(rules.probe_limit, rules.growth * r.longest)

    def _suspicious_at(self, m: Model, r: Replica) -> float:
        if r.standing is not Standing.SERVING or not m.spec.replicas.probe:
            return INFINITY
        oldest = next(iter(r.unanswered.values()), INFINITY)
        return max(r.vouched, max(oldest, r.seen) + self._suspicion(m, r))

    def _scale(self, group: Group) -> None:
        """8.4: one more or one fewer, when there was too much or too little for long enough."""
        rules, now = group.rules, self._core.now
        least, most = max(1, rules.least), len(group.local)
        group.wanted = max(least, min(group.wanted, most))
        group.crowded = self._since(group.crowded, group.load > rules.busy * group.wanted and group.wanted < most)
        fewer = group.wanted > least and group.load * 2 <= rules.busy * (group.wanted - 1)
        group.calm = self._since(group.calm, fewer)
        if group.crowded + rules.busy_for <= now:
            group.wanted, group.crowded, group.tried = group.wanted + 1, INFINITY, -INFINITY
            self._core.fleet.record("grow", group.name, *self._told(group, "more than", group.wanted - 1))
        elif group.calm + rules.calm_for <= now:
            group.wanted, group.calm = group.wanted - 1, INFINITY
            self._core.fleet.record("shrink", group.name, *self._told(group, "few enough for", group.wanted))

    def _since(self, before: float, holds: bool) -> float:
        return min(before, self._core.now) if holds else INFINITY

    def _told(self, group: Group, what: str, replicas: int) -> tuple[str, dict[str, float | int | str]]:
        numbers: dict[str, float | int | str] = {"requests": group.load, "wanted": group.wanted}
        return f"{group.load} requests are {what} {replicas} of its replicas", numbers

    def _bring_up(self, group: Group) -> None:
        """8.5: those that are missing, where they fit beside what is there; nobody leaves for them."""
        core = self._core
        if not self._in_use(group) or core.now < group.tried + AGAIN:
            return
        missing = list(group.missing(core.now))
        if not missing:
            return
        group.tried = core.now
        for m in missing:
            if m.state is State.FAILED:
                core.fleet.forgive(m)
            number = max(group.wanted, group.rules.least)
            why = f"{group.name} is to have {number} replicas here" if m.spec.device_count else f"{group.name} is used"
            self._planner.bring(m, why, core.now - RECENT, group.taken(m))

    def _in_use(self, group: Group) -> bool:
        recently = self._core.now < group.used + group.rules.calm_for
        return recently or group.load > 0 or any(m.wanted is not None for m in group.members)

    # -- time

    def _due(self, group: Group) -> float:
        due = min(group.crowded + group.rules.busy_for, group.calm + group.rules.calm_for)
        for m in group.members:
            if m.replica and m.state is State.READY and not m.replica.probe:
                due = min(due, m.replica.look_at, self._suspicious_at(m, m.replica))
        if self._in_use(group):
            retries = [m.retry_at for m in group.members if m.state is State.FAILED and m.retry_at > self._core.now]
            due = min([due, *retries])
            if any(True for _ in group.missing(self._core.now)):
                due = min(due, group.tried + AGAIN)
        return due
