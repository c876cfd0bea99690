"""What peers do, as policies behind the same interface: for the simulator and the benchmark, not for production.

Each is its owner's rule as read in its source in 2026, given the same sleep
mechanism, the same memory ledger and the same one swap per device as ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from vllmd.core.eviction import oldest_first
from vllmd.core.fit import fits
from vllmd.core.policies import POLICIES, Lru, plain
from vllmd.core.policy import Outlook, Plan, Policy, PolicyInput, Resident, Victim, Waiting


class _Baseline:
    """A sleeper wakes where it sleeps."""

    in_order = False
    moves = False

    def outlook(self, s: PolicyInput, model: str) -> Outlook | None:
        """Always None: these rules promise no waiter a time."""
        return None


class LlamaSwap(_Baseline):
    """llama-swap (``internal/router``): a loaded model is always served; a swap waits until its victims are idle.

    New requests for the loaded model keep overtaking the waiting one, without bound.
    """

    name = "llama-swap"

    def choose(self, s: PolicyInput) -> Plan | None:
        """The first in the queue whose victims, least recently used, have nothing in flight."""
        return plain(s) or next(self._plans(s), None)

    def _plans(self, s: PolicyInput) -> Iterator[Plan]:
        busy = {r.model for r in s.residents if r.running or r.queued}
        for w in s.waiting:
            eviction = oldest_first(s, w, s.residents)
            if eviction and busy.isdisjoint(v.model for v in eviction.victims):
                yield Plan(w.model, eviction.devices, eviction.victims, why="its victims are idle")


class Ollama(_Baseline):
    """Ollama (``server/sched.go``): one queue whose head blocks it; the victim is the first idle one by name.

    Requests for a loaded model bypass the queue, so a busy victim can keep the head waiting without bound.
    """

    name = "ollama"

    def choose(self, s: PolicyInput) -> Plan | None:
        """Only the head of the queue; as many idle models leave as it needs."""
        for w in s.waiting[:1]:
            devices = fits(s, w)
            if devices is not None:
                return Plan(w.model, devices, why="it fits")
            idle = [r._replace(used=0.0) for r in s.residents if not r.running and not r.queued]
            eviction = oldest_first(s, w, idle)
            if eviction:
                return Plan(w.model, eviction.devices, eviction.victims, why="idle ones make room")
        return None


class InOrder(_Baseline):
    """A naive script: one model at a time, whichever is asked for next; requests strictly in order of arrival."""

    name = "in-order"
    in_order = True

    def choose(self, s: PolicyInput) -> Plan | None:
        """Everything else leaves for the oldest request."""
        for w in s.waiting[:1]:
            awake = [r for r in s.residents if not r.asleep]
            devices = fits(s, w)
            if devices is not None and not awake:
                return Plan(w.model, devices, why="it is next")
            return self._swap(s, w, awake)
        return None

    def _swap(self, s: PolicyInput, w: Waiting, awake: Sequence[Resident]) -> Plan | None:
        eviction = oldest_first(s, w, awake)
        if eviction is None:
            return None
        where = set(eviction.devices)
        leaving = tuple(Victim(r.model, r.options[0]) for r in awake if not where.isdisjoint(r.devices))
        return Plan(w.model, eviction.devices, leaving, why="it is next")


class EvictAtOnce(Lru):
    """LRU that never drains: the victims' requests are frozen at once, where that is possible."""

    name = "lru-at-once"

    def choose(self, s: PolicyInput) -> Plan | None:
        """As LRU does, with no time to drain."""
        plan = super().choose(s)
        return plan and plan._replace(drain=0.0)


BASELINES: Mapping[str, Policy] = {p.name: p for p in (LlamaSwap(), Ollama(), InOrder(), EvictAtOnce())}
ALL: Mapping[str, Policy] = {**POLICIES, **BASELINES}
