"""Engines on their way out: drained, frozen or cut, then asleep or stopped (6 in ``design.md``).

One command per device at a time. vLLM measures free memory while it starts: two that start together mis-size
themselves, and one that starts while another gives memory back aborts with "AssertionError: Error in memory
profiling". So a replica whose last request has ended may still have to wait for another engine on its devices.
"""

from __future__ import annotations

from vllmd.core.common import Core
from vllmd.core.events import KeptAlive, MachineSlept
from vllmd.core.idle import Rest, rest
from vllmd.core.lifecycle import Kind, Reason
from vllmd.core.model import INFINITY, Job, KeepAlive, Replica
from vllmd.core.planner import Planner
from vllmd.core.types import State

DEEPEN_RETRY = 5.0  # seconds between two looks for room in which to sleep deeper


class Unloading:
    """Replicas whose gate is closed, and sleepers that are to stop, until their command is out."""

    def __init__(self, core: Core, planner: Planner) -> None:
        self._core = core
        self._planner = planner

    def advance(self) -> None:
        """Let go each replica that only waited for its requests to end or for a device to come to rest."""
        for r in list(self._core.engines.leaving):
            job = r.job
            if job is None or r not in self._core.engines.leaving:
                continue  # what went before it in this list changed its job
            if r.running and r.state is State.DRAINING and not job.force:
                self._press(r, job)
            elif self._core.engines.free_to_move(r):  # 6.1
                self._go(r, job)

    def _press(self, r: Replica, job: Job) -> None:
        """Freeze or cut requests that take longer than they were given."""
        core = self._core
        level = self._planner.level(r, job.level)
        if core.now >= job.freeze_at and r.freezable and level and core.engines.free_to_move(r):  # 6.2
            target, frozen = job.target.id if job.target else "", len(r.running)
            core.engines.record("freeze", r, job.why, {"frozen": frozen, "for": target, "cause": job.reason.value})
            core.engines.sleep(r, level, freeze=True)
        elif core.now >= job.cut_at:  # 6.3
            core.engines.record("cut", r, "its drain limit has passed", {"cut": len(r.running)})
            core.engines.cut(r, "the model has to leave and its drain limit has passed")

    def _go(self, r: Replica, job: Job) -> None:
        """Give the command that the job was waiting for; a sleep that cannot be has become a stop."""
        core = self._core
        if job.kind is Kind.PROVE:
            core.engines.prove(r)
            return
        level = self._planner.level(r, job.level) if r.state is State.DRAINING else 0
        idle, cause = round(core.now - r.idle_since, 3), job.reason.value
        core.engines.record("sleep" if level else "stop", r, job.why, {"level": level, "idle": idle, "cause": cause})
        if level:
            core.engines.sleep(r, level)
        else:
            core.engines.stop(r, job.why, job.force)

    # -- age

    def age(self, r: Replica) -> None:
        """4.4: what an unused model does next, if its time has come."""
        core = self._core
        action = rest(r, core.now)
        why = f"unused for {core.now - r.idle_since:.0f} s"
        if action is Rest.STOP:
            core.engines.ask(r, Job(Kind.STOP, Reason.IDLE, why, core.now))
        elif action is Rest.SLEEP:
            core.engines.ask(r, Job(Kind.SLEEP, Reason.IDLE, why, core.now, r.spec.idle.level))
        elif action is Rest.DEEPEN:  # as soon as there is room for it
            core.engines.ask(r, Job(Kind.SLEEP, Reason.DEEPEN, why, core.now, 2))

    def kept_alive(self, e: KeptAlive) -> None:
        """4.5: a client's ``keep_alive`` replaces its own last one; with 0 it needs the model no more."""
        core = self._core
        for r in core.named(e.model):
            kept = r.model.keep_alive
            others = {name: until for name, until in kept.until.items() if until > core.now and name != e.client}
            until = {**others, e.client: core.now + e.seconds} if e.seconds > 0 else others
            r.model.keep_alive = KeepAlive(until, kept.let_go if until else core.now)
            core.mark_for_review(r)

    def can_deepen(self, r: Replica) -> bool:
        """Whether a level-1 sleeper can go to level 2: vLLM has to wake it in between, for which there must be room.

        A second ``/sleep`` of an engine that sleeps does nothing and is answered as if it had.
        """
        core = self._core
        claimed = not core.swaps.claims().keys().isdisjoint(r.placement.devices)
        return core.engines.free_to_move(r) and not claimed and core.fit.has_room(r)

    def slept(self, e: MachineSlept) -> None:
        """4.6: what was unused was so meanwhile, and leases and ``keep_alive`` end by the time of day."""
        for r in self._core.replicas.values():
            if r.loaded:
                r.idle_since -= e.seconds
        for model in self._core.models.values():
            kept = model.keep_alive
            if kept.until or kept.let_go > -INFINITY:
                earlier = {client: until - e.seconds for client, until in kept.until.items()}
                kept = model.keep_alive = KeepAlive(earlier, kept.let_go - e.seconds)
            for lease in model.leases.values():
                lease.deadline -= e.seconds
            if model.leases or kept.until or any(r.loaded for r in model.replicas):
                for r in model.replicas:
                    self._core.mark_for_review(r)
