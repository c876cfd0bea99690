"""What peers do, as policies behind the same interface: for the simulator and the benchmark, not for production.

Each is its owner's rule as read in its source in 2026, given the same sleep
mechanism, the same memory ledger and the same one swap per device as ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from vllmd.core.eviction import oldest_first
from vllmd.core.fit import fits
from vllmd.core.policies import POLICIES, plain
from vllmd.core.policy import Outlook, Plan, Policy, PolicyInput


class _Baseline:
    """A sleeper wakes where it sleeps."""

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


BASELINES: Mapping[str, Policy] = {p.name: p for p in (LlamaSwap(), Ollama())}
ALL: Mapping[str, Policy] = {**POLICIES, **BASELINES}
