"""What the answers of a model's replicas earn them, and which replicas are probed (8.2, 8.3 in ``design.md``).

Outlier detection, as Envoy has it, of the replicas of models with ``replicas:``; nothing here applies to the others.

    NEW --a probe passed--> SERVING --three late answers--> SLOW ----a probe passed, after a pause--> SERVING
                            SERVING --a request failed, a server silent, a probe failed--> EJECTED --(the same)

Passive: answers that begin much later than the fastest replica's, and requests that failed. Active: a probe, which is
a short request of the daemon's own, when an engine has come up, when its pause is over (1 s, doubling to 60 s), or when
it leaves requests unanswered.

The last is *suspicion*: "no answer for longer than its answers ever took" may be a long prompt, or an engine that hangs
with its port open. So a suspected replica goes on serving while it is probed. If others were answered meanwhile it was
only busy, and what the probe did not get says nothing (``vouched``: no suspicion until then); else it is ejected, and
what it left unanswered is cut, so that the proxy can send it to another replica.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from vllmd.core.balancing import ENOUGH_ANSWERS, fastest, quickest
from vllmd.core.common import Core
from vllmd.core.events import ProbeAsked, ReplicaProbed, ServerSilent
from vllmd.core.lifecycle import Kind, Reason
from vllmd.core.model import INFINITY, Health, HealthStatus, Job, Latency, Replica
from vllmd.core.types import ReplicaRules, State

LEAST = 0.0005  # seconds; nothing takes no time
QUICK = 0.1  # seconds; whoever answers sooner is not slow, however fast the others are
NEWEST = 0.2  # weight of the newest answer in a replica's latency
PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds until one that was set aside or ejected is probed; doubles each time
QUICKEST_PROBE = 0.5  # seconds that every probe may take
LONGEST_PROBE = 120.0
NO_NUMBERS: Mapping[str, float] = {}
ALONE = ReplicaRules(probe=False)


class HealthChecks:
    """The health of replicas, and the probes that are under way."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._probes: dict[str, Replica] = {}
        self._numbers = itertools.count(1)

    # -- answers (8.2)

    def answered(self, r: Replica, request: str, streamed: bool) -> None:
        """Learn from the first byte of an answer how late the replica's answers begin."""
        h, rules = r.health, r.model.rules
        began = h.unanswered.pop(request, None) if h else None
        if h is None or rules is None or began is None:
            return
        took, h.seen = max(LEAST, self._core.now - began), self._core.now
        if streamed in h.latencies:
            h.latencies[streamed].learn(took, NEWEST)
        else:
            h.latencies[streamed] = Latency(took)
        if h.status is HealthStatus.SERVING:
            self._judge(r, h, took, fastest(r.model, streamed, but=r), h.latencies[streamed].value)
        self._core.mark_for_review(r)

    def _judge(self, r: Replica, h: Health, took: float, best: float | None, latency: float) -> None:
        """Set a replica aside whose answers are too late too often beside the fastest of the others.

        ``took``: seconds of this answer, ``best``: of the fastest's on average, ``latency``: of this replica's.
        """
        bound = INFINITY if best is None else max(QUICK, self._rules(r).growth * best)
        if took <= bound or latency <= bound:
            h.late, h.timely = 0, h.timely + 1
            h.rounds = 0 if h.timely >= ENOUGH_ANSWERS else h.rounds
            return
        h.late, h.timely = h.late + 1, 0
        if h.late >= ENOUGH_ANSWERS and best is not None:
            numbers = {"latency": round(latency, 3), "fastest": round(best, 3), "bound": round(bound, 3)}
            why = f"its answers begin after {latency:.2f} s, those of the fastest after {best:.2f} s"
            self._set_aside(r, h, HealthStatus.SLOW, why, numbers)

    def ended(self, r: Replica, request: str, failed: str) -> None:
        """A request is over; ``failed``: why its replica gave no answer."""
        h = r.health
        if h is None:
            return
        h.unanswered.pop(request, None)
        if failed and r.is_on and h.status in (HealthStatus.SERVING, HealthStatus.SLOW):
            self._set_aside(r, h, HealthStatus.EJECTED, failed)
            self._core.mark_for_review(r)

    def silent(self, e: ServerSilent) -> None:
        """Send the replica nothing more until it has answered a probe."""
        r = self._core.replica(e.replica)
        if r.health and r.state is State.READY and r.health.status is not HealthStatus.EJECTED:
            self._set_aside(r, r.health, HealthStatus.EJECTED, e.reason)
            self._core.mark_for_review(r)

    def asked(self, e: ProbeAsked) -> None:
        """An operator's probe runs in it as any request does, so that nobody puts it to sleep meanwhile."""
        r = self._core.replicas.get(e.replica)
        serves = r is not None and r.state is State.READY
        why = "" if serves else f"{e.replica} is {r.state.value if r else 'gone'}, and a probe loads nothing"
        self._core.engines.answer(e.ask, e.replica, why)
        if r and serves:
            r.running[e.request] = self._core.now
            self._probes[e.request] = r
            self._core.mark_for_review(r)

    def probed(self, e: ReplicaProbed) -> None:
        """Judge a replica by its probe, which came back or did not."""
        r = self._probes.pop(e.request, None)
        if r is None:
            return
        r.end(e.request)
        self._core.mark_news(r)
        h = r.health
        if h is None or r.model.rules is None or h.probe != e.request:
            return
        h.probe = ""
        if e.unsent:
            # It says nothing. Whoever serves is suspected again later, whoever does not is asked again in a moment.
            h.vouched = self._core.now + self._hang_limit(r, h)
            h.look_at = INFINITY if h.status is HealthStatus.SERVING else self._core.now + PAUSE
        elif e.seconds is not None:
            self._probe_passed(r, h, e.seconds)
        elif h.status is HealthStatus.SERVING and h.seen > h.probed_at:
            h.vouched = self._core.now + self._hang_limit(r, h)  # others were answered meanwhile: it is only busy
        else:
            self._probe_failed(r, h, e.reason)

    def _probe_passed(self, r: Replica, h: Health, seconds: float) -> None:
        h.failed = 0
        h.took, h.vouched = seconds, self._core.now + self._hang_limit(r, h)
        if h.status is HealthStatus.SERVING:
            return  # the suspicion was wrong
        h.status, h.late, h.look_at, h.why = HealthStatus.SERVING, 0, INFINITY, ""
        self._core.engines.record("serve", r, f"it answered a probe in {seconds:.3f} s", {"seconds": seconds})

    def _probe_failed(self, r: Replica, h: Health, why: str) -> None:
        if r.state is not State.READY:
            return
        h.failed += 1
        self._set_aside(r, h, HealthStatus.EJECTED, f"it failed a probe: {why}")
        self._core.engines.cut(r, "its replica does not answer", list(h.unanswered))
        hangs = h.failed > self._rules(r).retries and r.spec.device_count
        if hangs and len(r.running) == len(h.unanswered):
            why = f"its engine hangs: {h.failed} probes in a row failed"
            self._core.engines.ask(r, Job(Kind.STOP, Reason.REPLICA, why, self._core.now, force=True))

    def _set_aside(
        self, r: Replica, h: Health, to: HealthStatus, why: str, numbers: Mapping[str, float] = NO_NUMBERS
    ) -> None:
        h.rounds += 1
        pause = min(LONGEST_PAUSE, PAUSE * 2.0 ** (h.rounds - 1))
        h.status, h.why, h.late, h.timely, h.look_at = to, why, 0, 0, self._core.now + pause
        what = "set aside" if to is HealthStatus.SLOW else "eject"
        self._core.engines.record(what, r, why, {**numbers, "pause": pause, "rounds": h.rounds})

    # -- probes (8.3)

    def look_at(self, r: Replica) -> None:
        """Probe replicas that came up, whose time apart is over, or that leave requests without an answer."""
        h = r.health
        if h is None or h.probe or r.state is not State.READY:
            return
        if h.status is HealthStatus.NEW and not self._rules(r).probe:
            h.status = HealthStatus.SERVING
            self._core.mark_news(r)
        elif h.is_unseen or min(h.look_at, self._hangs_at(r, h)) <= self._core.now:
            self._probe(r, h)

    def _probe(self, r: Replica, h: Health) -> None:
        """Ask the replica a short question, for which it has ``growth`` times as long as the fastest replica took.

        With each attempt in a row it may take as much longer. Where no other serves there is nothing to be slower
        than, and one that is only suspected is to show that it lives: both have ``probe_limit``.
        """
        rules = self._rules(r)
        if not rules.probe and h.status is not HealthStatus.SERVING:
            self._probe_passed(r, h, h.took or 0.0)  # its time apart is all that there is to judge by
            self._core.mark_news(r)
            return
        best = quickest(but=r) if h.status is not HealthStatus.SERVING else None
        limit = rules.probe_limit if best is None else max(QUICKEST_PROBE, rules.growth * best)
        h.probe, h.probed_at = f"probe-{next(self._numbers)}", self._core.now
        self._probes[h.probe] = r
        self._core.mark_for_review(r)
        self._core.engines.probe(r, h.probe, min(LONGEST_PROBE, limit * rules.growth ** min(h.failed, 10)))

    def _hang_limit(self, r: Replica, h: Health) -> float:
        """Seconds without any answer after which the replica is suspected."""
        rules = self._rules(r)
        return max(rules.probe_limit, rules.growth * h.longest)

    def _hangs_at(self, r: Replica, h: Health) -> float:
        if h.status is not HealthStatus.SERVING or not self._rules(r).probe:
            return INFINITY
        oldest = next(iter(h.unanswered.values()), INFINITY)
        return max(h.vouched, max(oldest, h.seen) + self._hang_limit(r, h))

    def due(self, r: Replica) -> float:
        """When the replica is to be probed if nothing else happens; infinite for never."""
        h = r.health
        if h is None or h.probe or r.state is not State.READY:
            return INFINITY
        return min(h.look_at, self._hangs_at(r, h))

    def _rules(self, r: Replica) -> ReplicaRules:
        return r.model.rules or ALONE
